"""Text to tokens, each with the number of UTF-8 bytes of text it stands for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from gaintune.config import BeginningOfText
from gaintune.errors import BaseModelError, ConfigError


@dataclass(frozen=True)
class Encoded:
    """Tokens of one text, and the bytes of text of each; the bytes add up to those of the text."""

    ids: np.ndarray
    bytes: np.ndarray


def encode_texts(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[Encoded]:
    """Tokenise texts without special tokens.

    A fast tokenizer says which characters a token covers. Bytes that no token covers (a space that its offsets leave
    out, a character that it drops) go to the token after them, and a character that several byte-level tokens share to
    the first of them. Without offsets (slow tokenizers) a text's bytes are shared out by the lengths of its decoded
    tokens: right in sum, approximate for a single token.
    """
    batch = tokenizer(
        list(texts),
        add_special_tokens=False,
        return_attention_mask=False,
        return_offsets_mapping=bool(tokenizer.is_fast),
        verbose=False,  # the length of a text is no concern here: blocks are cut later
    )
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
    """Tokenise rows that are given in parts, such as a prompt and its completion, part by part.

    What comes before a part has the tokens it has without it: those that a model is given when it has to go on from
    there. A part's tokens are the ones that are added by tokenising all up to its end. Where that would change what
    comes before (a token across the border, say, or a space that joins the next word), the part is tokenised by itself.
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
    """The token that ends a text: end-of-text, or BERT's separator; BaseModelError for a tokenizer without either."""
    token = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    if not isinstance(token, int):
        raise BaseModelError(
            f"the tokenizer {tokenizer.name_or_path!r} has no end-of-text token to end a text with; "
            f"set eos_token in its tokenizer_config.json"
        )
    return token


def beginning_of_text(tokenizer: PreTrainedTokenizerBase, choice: BeginningOfText = "auto") -> list[int]:
    """Return what comes before every text: the tokenizer's beginning-of-text token, or nothing.

    `auto` is what the tokenizer does by itself; `tokenizer_of` sees to it that it does what the model
    was trained with.

    Raises:
        ConfigError: `always`, and the tokenizer has no such token.
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
    """Tokens that stand for no text, such as the ends of a text and of a turn."""
    added = {number: str(token) for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {**dict(zip(tokenizer.all_special_ids, map(str, tokenizer.all_special_tokens), strict=True)), **added}


def _byte_positions(text: str) -> np.ndarray:
    """How many bytes lie before each character, and after the last one."""
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    widths = 1 + (points > 0x7F).astype(np.int64) + (points > 0x7FF) + (points > 0xFFFF)
    return np.concatenate([[0], np.cumsum(widths)])


def _decoded_boundaries(ids: np.ndarray, total: int, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    lengths = [len(str(tokenizer.decode([int(token)], clean_up_tokenization_spaces=False)).encode()) for token in ids]
    cumulative = np.cumsum(lengths, dtype=np.float64)
    if not len(cumulative) or cumulative[-1] == 0:
        return np.zeros(len(ids), np.int64)
    return np.rint(cumulative * (total / cumulative[-1])).astype(np.int64)
