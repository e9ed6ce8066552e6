"""Rows of tokens a model is trained or measured on, with what is scored of them and where their texts begin."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

IGNORED = -100
"""The label of a token that is not scored, as transformers and torch's cross-entropy know it."""


@dataclass(frozen=True)
class Examples:
    """Rows of one length for a causal language model.

    Attributes:
        input_ids: token ids, int64 `(rows, length)`.
        labels: the same ids, and -100 where a token is not scored, int64 `(rows, length)`. The first token of a row
            is never scored, whatever stands there.
        position_ids: position of each token in its own text, int64 `(rows, length)`: where it starts anew at 0, another
            text begins, and neither attends to the other. None where a row is one stream of text.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor | None = None

    def __post_init__(self) -> None:
        assert self.input_ids.shape == self.labels.shape, "one label for each token"
        assert self.position_ids is None or self.position_ids.shape == self.input_ids.shape, "a position for each token"

    @classmethod
    def of_blocks(cls, blocks: torch.Tensor) -> Examples:
        """Packed blocks `(blocks, block_size)` of running text, every token scored but the first of a block."""
        return cls(blocks, blocks)

    @property
    def tokens(self) -> int:
        """All tokens, scored or not."""
        return self.input_ids.numel()

    @property
    def scored(self) -> tuple[int, ...]:
        """Scored tokens of each row."""
        return tuple((self.labels[:, 1:] != IGNORED).sum(dim=1).tolist())

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def __getitem__(self, rows: int | slice | torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors of one row or of several, as the losses of `gaintune.models.loss` take them."""
        picked = {"input_ids": self.input_ids[rows], "labels": self.labels[rows]}
        if self.position_ids is not None:
            picked["position_ids"] = self.position_ids[rows]
        return picked

    def batches(self, size: int) -> Iterator[dict[str, torch.Tensor]]:
        """All rows in order, `size` at a time."""
        for start in range(0, len(self), size):
            yield self[start : start + size]


@dataclass(frozen=True)
class DomainBlocks:
    """A domain ready to train on and to be measured.

    `train` and `validation` are blocks, `(blocks, block_size)`. `validation_bytes` are the UTF-8 bytes of the scored
    tokens of each validation block, end-of-text and other special tokens counting none. `content_hash` is the SHA-256
    of the tokens and of the settings that made them. Documents (of instruction data, rows) are counted where some of
    their text is in a block; `removed_near_duplicates` counts those that were drawn for validation and found in one
    that is trained on. `beginning` is the beginning-of-text token that starts every block of running text, None for
    none; rows of instructions bring their own.
    """

    name: str
    train: Examples
    validation: Examples
    validation_bytes: tuple[int, ...]
    content_hash: str
    train_documents: int
    validation_documents: int
    removed_near_duplicates: int
    beginning: int | None = None

    @property
    def settings(self) -> dict[str, dict[str, int]]:
        """What was decided for this domain and no plan says, by section; nothing where there is nothing to say."""
        return {} if self.beginning is None else {"data": {"beginning_of_text": self.beginning}}

    def describe(self) -> dict[str, str | int]:
        """Return what a record keeps of the text: its content hash, how much there was, and what starts its blocks."""
        return {
            "content_hash": self.content_hash,
            "train_tokens": self.train.tokens,
            "validation_tokens": self.validation.tokens,
            "train_documents": self.train_documents,
            "validation_documents": self.validation_documents,
            "removed_near_duplicates": self.removed_near_duplicates,
            **self.settings.get("data", {}),
        }


@dataclass(frozen=True)
class TokenRow:
    """Tokens of one row, which are scored (never the first), and their UTF-8 bytes; `number` tells which row it is."""

    ids: np.ndarray
    scored: np.ndarray
    bytes: np.ndarray
    number: int

    @property
    def prompt(self) -> int:
        """Tokens before the first that is scored."""
        return int(np.argmax(self.scored)) if self.scored.any() else len(self.ids)

    def cut(self, length: int) -> TokenRow:
        """Its first `length` tokens, and of those none after the last that is scored."""
        kept = int(np.flatnonzero(self.scored[:length])[-1]) + 1
        return replace(self, ids=self.ids[:kept], scored=self.scored[:kept], bytes=self.bytes[:kept])


@dataclass(frozen=True)
class Packed:
    """Blocks of rows.

    Attributes:
        examples: the blocks, `(blocks, block_size)`; `position_ids` start anew at each row and where padding begins.
        bytes: UTF-8 bytes of the scored tokens of each block.
        rows: numbers of the rows in the blocks, in order.
        cut: rows that were longer than a block.
        longest: tokens of the longest row before cutting, 0 where there is none.
        refused: rows whose prompt alone fills a block, so that nothing of them could be scored.
        padding: tokens of padding.
    """

    examples: Examples
    bytes: tuple[int, ...]
    rows: tuple[int, ...]
    cut: int
    longest: int
    refused: tuple[TokenRow, ...]
    padding: int


def pack(rows: Iterable[TokenRow], *, block_size: int, blocks: int, filler: int, packing: bool) -> Packed:
    """Put rows into at most `blocks` blocks, in order; a row that the open block has no room for begins the next.

    A row is never spread over two blocks. One that is longer than a block is cut to it. With `packing` off each row
    has a block of its own and no position ids: padding comes after it, where a causal model cannot see it.

    Args:
        rows: drawn one by one, until the blocks are full.
        block_size: tokens of a block.
        blocks: how many there may be.
        filler: token id of the padding, which is never scored.
        packing: several rows in a block, or one.
    """
    filled: list[list[TokenRow]] = []
    refused: list[TokenRow] = []
    cut = longest = 0
    room = 0
    for row in rows:
        if row.prompt >= min(block_size, len(row.ids)):
            refused.append(row)
            continue
        fitting = row if len(row.ids) <= block_size else row.cut(block_size)
        if not packing or len(fitting.ids) > room:
            if len(filled) == blocks:
                break
            filled.append([])
            room = block_size
        filled[-1].append(fitting)
        room -= len(fitting.ids)
        cut += fitting is not row
        longest = max(longest, len(row.ids))
    ids = np.full((len(filled), block_size), filler, np.int64)
    labels = np.full_like(ids, IGNORED)
    positions = np.zeros_like(ids)
    bytes_of_blocks = []
    for block, held in enumerate(filled):
        start = total = 0
        for row in held:
            piece = slice(start, start + len(row.ids))
            ids[block, piece] = row.ids
            labels[block, piece] = np.where(row.scored, row.ids, IGNORED)
            positions[block, piece] = np.arange(len(row.ids))
            total += int(row.bytes[row.scored].sum())
            start = piece.stop
        positions[block, start:] = np.arange(block_size - start)
        bytes_of_blocks.append(total)
    return Packed(
        examples=Examples(
            torch.from_numpy(ids), torch.from_numpy(labels), torch.from_numpy(positions) if packing else None
        ),
        bytes=tuple(bytes_of_blocks),
        rows=tuple(row.number for held in filled for row in held),
        cut=cut,
        longest=longest,
        refused=tuple(refused),
        padding=ids.size - sum(len(row.ids) for held in filled for row in held),
    )
