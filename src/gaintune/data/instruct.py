"""Instruction data to blocks of tokens: split by row, written in a template, completions scored, packed or padded."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Any

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from gaintune.config import DataConfig, DomainConfig, Template
from gaintune.data.documents import read_some
from gaintune.data.domains import characters_needed, load_exchanges
from gaintune.data.encode import beginning_of_text, encode_parts, end_of_text, special_tokens
from gaintune.data.examples import DomainBlocks, Packed, TokenRow, pack
from gaintune.data.exchanges import Exchange
from gaintune.data.neighbours import NeighbourIndex
from gaintune.data.split import drawn_order, split_documents
from gaintune.errors import ConfigError, DataError, one_line
from gaintune.progress import plural

logger = logging.getLogger(__name__)

DATE = "26 Jul 2024"
"""The date of a chat template that asks for today's: what Llama 3 writes where it cannot ask."""

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
    """A piece of a row's text; scored or seen only."""

    text: str
    scored: bool


@dataclass(frozen=True)
class Rendered:
    """A row as text.

    Attributes:
        parts: in order; the first is never scored, the last always.
        ends: whether the text brings its own end-of-turn token.
    """

    parts: tuple[Part, ...]
    ends: bool = False


def render(exchange: Exchange, template: Template, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """Write an exchange in a template.

    `auto` is `chat` for rows of messages and `plain` for a prompt and its completion. `plain` puts the completion
    right after the prompt, adding nothing. `chat` renders what comes before each scored turn as the tokenizer's chat
    template does for generation; what the template adds once the turn is there is scored, up to and including its
    end-of-turn token. Where a template writes today's date, `DATE` stands, so that rows are the same on every day.

    Raises:
        ConfigError: the tokenizer has no chat template.
        DataError: the row does not fit the template, with its file and line.
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
        before = _apply(tokenizer, messages[:index], exchange.origin, add_generation_prompt=True)
        after = _apply(tokenizer, messages[: index + 1], exchange.origin, add_generation_prompt=False)
        if not before.startswith(written) or not after.startswith(before) or not after[len(before) :].strip():
            raise DataError(
                f"{exchange.origin}: the chat template of {tokenizer.name_or_path!r} leaves message {index + 1} out "
                f"or writes what comes before it anew, so that prompt and completion cannot be told apart; make each "
                f"answer a row of its own, or use another template"
            )
        completion = after[len(before) :]
        ends = completion.rstrip().endswith(endings)
        # what a template puts after its end-of-turn token (a new line, often) is never generated: seen, not scored
        learnt = completion.rstrip() if ends else completion
        parts += [Part(before[len(written) :], scored=False), Part(learnt, scored=True)]
        written = before + learnt
    merged = tuple(part for part in parts if part.text)
    return Rendered(merged, ends=ends)


def _apply(tokenizer: Any, messages: list[dict[str, str]], origin: str, *, add_generation_prompt: bool) -> str:
    try:
        template = undated(tokenizer.get_chat_template(), str(tokenizer.name_or_path))
        return tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise DataError(f"{origin}: the model's chat template refuses this row ({one_line(error)})") from None


@cache  # also so that it is said once
def undated(template: str, tokenizer: str) -> str:
    """A chat template that writes `DATE` where it would ask transformers for today's date, in whatever format."""
    if "strftime_now" not in template:
        return template
    logger.warning(
        "the chat template of %s writes today's date; %s is written instead, so that rows are the same on every day",
        tokenizer, DATE,
    )  # fmt: skip
    # the plus keeps a line end that the template may begin with
    return f"{{% macro strftime_now(format) %}}{DATE}{{% endmacro +%}}{template}"


ENCODED_AT_ONCE = 16
NAMED_ROWS = 5
# Instructions that many prompts share, word for word, make no near-duplicate of them.
COMMON_SHARE = 0.05


def load_instruct(domain: DomainConfig, data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> DomainBlocks:
    """Load, split, render and pack a domain of instructions within its budgets, padding included.

    Rows are drawn in an order the seed decides; those whose questions differ by case, spacing or punctuation alone are
    on the same side, and a validation row whose question is nearly one that is trained on is left out. Scored are the
    completions and, unless `data.end_of_text` is false, the end-of-text token after them. A row longer than a block is
    cut and counted in a warning.

    Raises:
        DataError: rows are missing, broken, or have a prompt that leaves no room for the completion; names the line.
        ConfigError: the chat template or a beginning of text is asked for, and the tokenizer has none.
        AssetError: a download failed.
        BaseModelError: the tokenizer has no end-of-text token.
    """
    begin, end = beginning_of_text(tokenizer, data.beginning_of_text), end_of_text(tokenizer)
    template = data.template_of(domain)
    rows = split_documents(
        load_exchanges(domain, characters=characters_needed(data)), data.seed, lambda exchange: exchange.question
    )
    held_out = rows.validation or ()

    def packed(source: Sequence[Exchange], order: Iterable[int], budget: int) -> Packed:
        return pack(
            _token_rows(source, iter(order), template, tokenizer, begin, ends=data.end_of_text),
            block_size=data.block_size,
            blocks=budget // data.block_size,
            filler=end,
            packing=data.packing,
        )

    train = packed(rows.train, drawn_order(len(rows.train), data.seed, "train"), data.train_tokens)
    _check(train, "training", rows.train, domain, rows.source, data, data.train_tokens)
    asked = (row.question for row in read_some(rows.train, train.rows))
    trained_on = NeighbourIndex(zip(train.rows, asked, strict=True), common=COMMON_SHARE)
    removed: set[int] = set()

    def is_new(number: int) -> bool:
        if held_out[number].question in trained_on:
            removed.add(number)
            return False
        return True

    order = filter(is_new, drawn_order(len(held_out), data.seed, "validation"))
    validation = packed(held_out, order, data.validation_tokens)
    if removed:
        named = ", ".join(held_out[number].origin for number in sorted(removed)[:3])
        logger.info(
            "domain %s: left %d validation row(s) out, whose prompts are near-duplicates of training prompts: %s%s",
            domain.name, len(removed), named, ", ..." if len(removed) > 3 else "",
        )  # fmt: skip
    note = f", after {len(removed)} near-duplicate(s) of training prompts were left out" if removed else ""
    _check(validation, "validation", held_out, domain, rows.source, data, data.validation_tokens, note)
    return DomainBlocks(
        name=domain.name,
        train=train.examples,
        validation=validation.examples,
        validation_bytes=validation.bytes,
        content_hash=_content_hash(data, template, end, train, validation),
        train_documents=len(train.rows),
        validation_documents=len(validation.rows),
        removed_near_duplicates=len(removed),
    )


def _token_rows(
    rows: Sequence[Exchange],
    order: Iterator[int],
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    begin: list[int],
    *,
    ends: bool,
) -> Iterator[TokenRow]:
    """Tokens of the rows in an order, each with an end if `ends`: a few at a time, in parallel where that works.

    `begin` comes before every row that has not written it itself, as most chat templates do.
    """
    end = [end_of_text(tokenizer)] if ends else []
    special = np.array(sorted(special_tokens(tokenizer)))
    while numbers := list(islice(order, ENCODED_AT_ONCE)):
        rendered = [render(row, template, tokenizer) for row in read_some(rows, numbers)]
        encoded = encode_parts([[part.text for part in each.parts] for each in rendered], tokenizer)
        for number, text, pieces in zip(numbers, rendered, encoded, strict=True):
            written = np.concatenate([piece.ids for piece in pieces])
            before = [] if written[:1].tolist() == begin else begin
            after = [] if text.ends else end
            ids = np.concatenate([before, written, after]).astype(np.int64)
            scored = np.repeat(
                [False, *(part.scored for part in text.parts), True],
                [len(before), *(len(piece.ids) for piece in pieces), len(after)],
            )
            counted = np.concatenate([[0] * len(before), *(piece.bytes for piece in pieces), [0] * len(after)])
            counted[np.isin(ids, special)] = 0
            scored[0] = False  # nothing of its own row comes before it
            yield TokenRow(ids, scored, counted.astype(np.int64), number)


def _check(
    packed: Packed,
    side: str,
    rows: Sequence[Exchange],
    domain: DomainConfig,
    source: str,
    data: DataConfig,
    budget: int,
    note: str = "",
) -> None:
    """Refuse rows that cannot be learnt and a side without rows; warn of cut rows and of a budget that is not met."""
    if packed.refused:
        named = "; ".join(
            f"{rows[row.number].origin} (row {rows[row.number].row}): a prompt of {row.prompt} tokens, "
            f"{len(row.ids)} with its completion"
            for row in packed.refused[:NAMED_ROWS]
        )
        more = f"; and {len(packed.refused) - NAMED_ROWS} more" if len(packed.refused) > NAMED_ROWS else ""
        needed = max(len(row.ids) for row in packed.refused)
        raise DataError(
            f"domain {domain.name!r}: {len(packed.refused)} row(s) whose prompt fills a block of {data.block_size} "
            f"tokens, so that nothing of the completion is left: {named}{more}. Set data.block_size={needed} or "
            f"more, or shorten or delete these rows"
        )
    blocks, used = len(packed.examples), packed.examples.tokens
    if not blocks:
        raise DataError(f"domain {domain.name!r}, {source}: the {side} part holds no rows{note}; give more rows")
    if packed.cut:
        logger.warning(
            "domain %s: %d of %d %s rows are longer than a block of %d tokens and are cut; the longest has %d "
            "tokens: raise data.block_size to keep them whole",
            domain.name, packed.cut, len(packed.rows), side, data.block_size, packed.longest,
        )  # fmt: skip
    if blocks < budget // data.block_size:
        logger.warning(
            "domain %s: the %s part fills %d tokens, fewer than the %d asked for; using %s of %d%s",
            domain.name, side, used, budget, plural(blocks, "block"), data.block_size, note,
        )  # fmt: skip
    logger.info(
        "domain %s: %d %s rows in %d blocks of %d tokens, %.0f %% of them padding",
        domain.name, len(packed.rows), side, blocks, data.block_size, 100 * packed.padding / used,
    )  # fmt: skip


def _content_hash(data: DataConfig, template: Template, end: int, train: Packed, validation: Packed) -> str:
    """SHA-256 over the settings and both sides' tokens, labels and positions, the same for either byte order."""
    settings = (data.train_tokens, data.validation_tokens, data.block_size, data.seed, template, data.packing, end)
    digest = hashlib.sha256(repr(settings).encode())
    for packed in (train, validation):
        for tensor in packed.examples[:].values():
            digest.update(repr(tuple(tensor.shape)).encode())
            digest.update(tensor.numpy().astype("<i8").tobytes())
    return digest.hexdigest()
