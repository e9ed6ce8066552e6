"""From rows to tokens: an exchange written in a template, and tokens with the number of bytes they stand for."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from gaintune.config import BeginningOfText, Template
from gaintune.data.exchanges import Exchange
from gaintune.errors import BaseModelError, ConfigError, DataError, one_line

logger = logging.getLogger(__name__)

DATE = "26 Jul 2024"  # in a chat template that asks for today's date: what Llama 3 writes where it cannot ask

# The formats of Stanford Alpaca (without an input) and of Magicoder, as DISeL uses them (appendix III.1). A completion
# follows "### Response:" on a new line, as the paper prints it.
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{prompt}\n\n### Response:\n"
)
MAGICODER = (
    "You are an exceptionally intelligent coding assistant that consistently delivers accurate and reliable "
    "responses to user instructions.\n\n@@ Instruction\n{prompt}\n\n@@ Response\n"
)


@dataclass(frozen=True)
class Part:
    """A piece of a row's text: scored, or only seen."""

    text: str
    scored: bool


@dataclass(frozen=True)
class Rendered:
    """A row as text: the first of its parts is not scored, the last is; `ends` if it brings its own end of turn."""

    parts: tuple[Part, ...]
    ends: bool = False


def render(exchange: Exchange, template: Template, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """Write an exchange in a template.

    `auto` is `chat` for rows of messages and `plain` for a prompt and its completion. `plain` puts the completion
    right after the prompt, adding nothing. `chat` renders what comes before each scored turn as the tokenizer's chat
    template does for generation; what the template adds once the turn is there is scored, up to and including its
    end-of-turn token. Where a template writes today's date, `DATE` stands, so that rows are the same on every day.
    ConfigError for a tokenizer without a chat template; DataError, with file and line, for a row that does not fit.
    """
    if template == "auto":
        template = "chat" if exchange.chat else "plain"
    if template == "chat":
        return _chat(exchange, tokenizer)
    roles = [turn.role for turn in exchange.turns]
    if roles != ["user", "assistant"]:
        raise DataError(
            f"{exchange.origin}: template {template!r} takes one message of the user and one of the assistant, this "
            f"row has {', '.join(roles)}; use template 'chat'"
        )
    prompt, completion = (turn.content for turn in exchange.turns)
    written = {"plain": "{prompt}", "alpaca": ALPACA, "magicoder": MAGICODER}[template].replace("{prompt}", prompt)
    return Rendered((Part(written, scored=False), Part(completion, scored=True)))


def _chat(exchange: Exchange, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    if tokenizer.chat_template is None:
        raise ConfigError(
            f"data.template: the tokenizer {tokenizer.name_or_path!r} has no chat template; use a chat model, or "
            f"template plain, alpaca or magicoder with a prompt and a completion"
        )
    messages = [{"role": turn.role, "content": turn.content} for turn in exchange.turns]
    endings = tuple(special_tokens(tokenizer).values())
    parts: list[Part] = []
    written, ends = "", False
    for index, turn in enumerate(exchange.turns):
        if not turn.scored:
            continue
        before = _apply(tokenizer, messages[:index], exchange.origin, prompting=True)
        after = _apply(tokenizer, messages[: index + 1], exchange.origin, prompting=False)
        if not before.startswith(written) or not after.startswith(before) or not after[len(before) :].strip():
            raise DataError(
                f"{exchange.origin}: the chat template of {tokenizer.name_or_path!r} leaves message {index + 1} out "
                f"or writes what comes before it anew, so that prompt and completion cannot be told apart; make each "
                f"answer a row of its own, or use another template"
            )
        completion = after[len(before) :]
        ends = completion.rstrip().endswith(endings)
        # what a template puts after its end-of-turn token (a new line, often) is never generated: seen, not scored
        answer = completion.rstrip() if ends else completion
        parts += [Part(before[len(written) :], scored=False), Part(answer, scored=True)]
        written = before + answer
    return Rendered(tuple(part for part in parts if part.text), ends=ends)


def _apply(tokenizer: Any, messages: list[dict[str, str]], origin: str, *, prompting: bool) -> str:
    options = {"tokenize": False, "add_generation_prompt": prompting}
    try:
        template = undated(tokenizer.get_chat_template(), str(tokenizer.name_or_path))
        return tokenizer.apply_chat_template(messages, chat_template=template, **options)
    except (TemplateError, TypeError, ValueError) as error:
        raise DataError(f"{origin}: the model's chat template refuses this row ({one_line(error)})") from None


@cache  # also so that it warns once
def undated(template: str, tokenizer: str) -> str:
    """Return a chat template that writes `DATE` in place of today's date, in whatever format."""
    if "strftime_now" not in template:
        return template
    logger.warning(
        "the chat template of %s writes today's date; %s is written instead, so that rows are the same on every day",
        tokenizer, DATE,
    )  # fmt: skip
    # the plus keeps a line end that the template may begin with
    return f"{{% macro strftime_now(format) %}}{DATE}{{% endmacro +%}}{template}"


@dataclass(frozen=True)
class Encoded:
    """Tokens of one text and the number of its bytes that each stands for; they add up to those of the text."""

    ids: np.ndarray
    bytes: np.ndarray


def encode_texts(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[Encoded]:
    """Tokenize texts without special tokens.

    A fast tokenizer says which characters a token covers. Bytes that no token covers (a space that its offsets leave
    out, a character that it drops) go to the token after them, and a character that several byte-level tokens share to
    the first of them. Without offsets (slow tokenizers) a text's bytes are shared out by the lengths of its decoded
    tokens: right in sum, approximate for a single token.
    """
    # without a warning of long texts: blocks are cut later
    options: dict[str, Any] = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    batch = tokenizer(list(texts), return_offsets_mapping=bool(tokenizer.is_fast), **options)
    for index, text in enumerate(texts):
        ids = np.asarray(batch["input_ids"][index], np.int64)
        if tokenizer.is_fast:
            ends = np.asarray(batch["offset_mapping"][index], np.int64).reshape(-1, 2)[:, 1]
            boundaries = _byte_positions(text)[ends]
        else:
            boundaries = _decoded_boundaries(ids, len(text.encode()), tokenizer)
        if len(ids):
            boundaries[-1] = len(text.encode())
        yield Encoded(ids, np.diff(boundaries, prepend=0))


def encode_parts(rows: Sequence[Sequence[str]], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[Encoded]]:
    """Tokenize rows that are given in parts, such as a prompt and its completion, part by part.

    What comes before a part keeps the tokens that it has without it: those that a model is given to go on from. A
    part's tokens are the ones that are added by tokenizing all text up to its end. Where that would change what comes
    before (a token across the border, say, or a space that joins the next word), the part is tokenized by itself.
    """
    encoded = encode_texts(["".join(parts[: end + 1]) for parts in rows for end in range(len(parts))], tokenizer)
    for parts in rows:
        before = np.empty(0, np.int64)
        pieces: list[Encoded] = []
        for part, whole in zip(parts, encoded, strict=False):
            count = len(before)
            if np.array_equal(whole.ids[:count], before):
                piece = Encoded(whole.ids[count:], whole.bytes[count:].copy())
            else:
                (piece,) = encode_texts([part], tokenizer)
            if len(piece.ids):  # bytes at the border that no token covers belong to the part they come from
                piece.bytes[0] += len(part.encode()) - piece.bytes.sum()
            pieces.append(piece)
            before = np.concatenate([before, piece.ids])
        yield pieces


def end_of_text(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that ends a text, or BERT's separator; BaseModelError for a tokenizer without either."""
    token = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    if not isinstance(token, int):
        raise BaseModelError(
            f"the tokenizer {tokenizer.name_or_path!r} has no end-of-text token to end a text with; "
            f"set eos_token in its tokenizer_config.json"
        )
    return token


def beginning_of_text(tokenizer: PreTrainedTokenizerBase, choice: BeginningOfText = "auto") -> list[int]:
    """Return what comes before every text: the tokenizer's beginning-of-text token, or nothing.

    `auto` is what the tokenizer does by itself, which `tokenizer_of` sets to what the model was trained with. `always`
    raises ConfigError for a tokenizer without such a token.
    """
    if choice == "never":
        return []
    if choice == "always":
        if not isinstance(tokenizer.bos_token_id, int):
            raise ConfigError(
                f"data.beginning_of_text is always, but the tokenizer {tokenizer.name_or_path!r} has no "
                "beginning-of-text token: set it to auto, or set bos_token in its tokenizer_config.json"
            )
        return [tokenizer.bos_token_id]
    added = tokenizer("a")["input_ids"]  # of an empty text the end, which may be the same token, would come first
    return added[:1] if added and added[0] == tokenizer.bos_token_id else []


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Return the tokens that stand for no text, such as the ends of a text and of a turn, with their spelling."""
    added = {number: str(token) for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {**dict(zip(tokenizer.all_special_ids, map(str, tokenizer.all_special_tokens), strict=True)), **added}


def _byte_positions(text: str) -> np.ndarray:
    """Return how many bytes lie before each character, and before the end."""
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    widths = 1 + (points > 0x7F).astype(np.int64) + (points > 0x7FF) + (points > 0xFFFF)
    return np.concatenate([[0], np.cumsum(widths)])


def _decoded_boundaries(ids: np.ndarray, total: int, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    lengths = [len(str(tokenizer.decode([int(token)], clean_up_tokenization_spaces=False)).encode()) for token in ids]
    cumulative = np.cumsum(lengths, dtype=np.float64)
    if not len(cumulative) or cumulative[-1] == 0:
        return np.zeros(len(ids), np.int64)
    return np.rint(cumulative * (total / cumulative[-1])).astype(np.int64)
