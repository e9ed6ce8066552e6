"""Rows of a prompt and what is scored of it, packed into blocks in which none attends to another, or padded to one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch

from gaintune.data.examples import Examples
from gaintune.models.loss import IGNORED


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
