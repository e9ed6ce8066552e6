"""Text to tokens, each with the number of UTF-8 bytes of text it stands for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase


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
