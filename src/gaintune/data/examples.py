"""Rows of tokens a model is trained or measured on: what is scored, where texts begin, packing and replay."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from decimal import ROUND_HALF_UP, Decimal

import numpy as np
import torch
from torch.nn import functional as F

from gaintune.data.documents import Passage, drawn_order

IGNORED = -100  # label of a token that is not scored, as transformers and torch's cross-entropy know it


@dataclass(frozen=True)
class Examples:
    """Rows of one length for a causal language model.

    Attributes:
        input_ids: token ids, int64 `(rows, length)`.
        labels: the same ids, and -100 where a token is not scored, int64 `(rows, length)`; the first token of a row is
            never scored, whatever its label.
        position_ids: position of each token in its own text, int64 `(rows, length)`; where it is 0 again, another text
            begins, and neither attends to the other. None where a row is one stream of text.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor | None = None

    def __post_init__(self) -> None:
        assert self.input_ids.shape == self.labels.shape, "one label for each token"
        assert self.position_ids is None or self.position_ids.shape == self.input_ids.shape, "a position for each token"

    @classmethod
    def of_blocks(cls, blocks: torch.Tensor) -> Examples:
        """Make examples of `(blocks, block_size)` of running text, every token scored but the first of a block."""
        return cls(blocks, blocks)

    @property
    def tokens(self) -> int:
        """Number of tokens, scored or not."""
        return self.input_ids.numel()

    @property
    def scored(self) -> tuple[int, ...]:
        """Number of scored tokens of each row."""
        return tuple((self.labels[:, 1:] != IGNORED).sum(dim=1).tolist())

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def __getitem__(self, rows: int | slice | torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the tensors of one row or of several, as the losses of `gaintune.models.loss` take them."""
        picked = {"input_ids": self.input_ids[rows], "labels": self.labels[rows]}
        if self.position_ids is not None:
            picked["position_ids"] = self.position_ids[rows]
        return picked

    def batches(self, size: int) -> Iterator[dict[str, torch.Tensor]]:
        """Yield all rows in order, `size` at a time."""
        for start in range(0, len(self), size):
            yield self[start : start + size]


@dataclass(frozen=True)
class DomainBlocks:
    """A domain ready to train on and to measure.

    `train` and `validation` are blocks, `(blocks, block_size)`. `validation_bytes` are the UTF-8 bytes of the scored
    tokens of each validation block, special tokens counting none. `content_hash` is the SHA-256 of the tokens and of
    the settings that made them. Documents (of instruction data, rows) count if some of their text is in a block;
    `removed_near_duplicates` are those drawn for validation and found in one that is trained on. `beginning` is the
    beginning-of-text token that starts every block of running text, if any; rows of instructions bring their own.
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
        """Settings decided for this domain that no plan states, by section of the plan; empty where there are none."""
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
    """Tokens of one row, which of them are scored (never the first), their UTF-8 bytes, and what they were made of."""

    ids: np.ndarray
    scored: np.ndarray
    bytes: np.ndarray
    passage: Passage

    @property
    def prompt(self) -> int:
        """Number of tokens before the first that is scored."""
        return int(np.argmax(self.scored)) if self.scored.any() else len(self.ids)

    def cut(self, length: int) -> TokenRow:
        """Keep the first `length` tokens, and of those none after the last that is scored."""
        kept = int(np.flatnonzero(self.scored[:length])[-1]) + 1
        return replace(self, ids=self.ids[:kept], scored=self.scored[:kept], bytes=self.bytes[:kept])


@dataclass(frozen=True)
class Packed:
    """Blocks of text or of rows, and what packing left out or cut.

    Attributes:
        examples: the blocks, `(blocks, block_size)`; of several rows in a block, `position_ids` start again at each row
            and where padding begins.
        bytes: UTF-8 bytes of the scored tokens of each block.
        passages: what is in the blocks, in order.
        available: tokens of text that were there, with the beginning-of-text tokens.
        beginning: the beginning-of-text token of every block, None for none.
        cut: rows that were longer than a block; `longest` is the number of tokens of the longest before cutting.
        refused: rows whose prompt alone fills a block, so that nothing of them could be scored.
        padding: tokens of padding.
    """

    examples: Examples
    bytes: tuple[int, ...]
    passages: tuple[Passage, ...]
    available: int = 0
    beginning: int | None = None
    cut: int = 0
    longest: int = 0
    refused: tuple[TokenRow, ...] = ()
    padding: int = 0

    @property
    def documents(self) -> int:
        """How many documents (or rows) have some of their text in a block."""
        return len({passage.document for passage in self.passages})


def pack(rows: Iterable[TokenRow], *, block_size: int, blocks: int, filler: int, packing: bool) -> Packed:
    """Put rows into at most `blocks` blocks, in order; a row that the open block has no room for begins the next.

    Rows are drawn one by one until the blocks are full. A row is never spread over two blocks, and a longer one is cut.
    Without `packing` a row has a block of its own and no position ids: padding, of the token `filler`, comes after it,
    where a causal model cannot see it.
    """
    filled: list[list[TokenRow]] = []
    refused: list[TokenRow] = []
    cut = longest = room = 0
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
    labels, positions = np.full_like(ids, IGNORED), np.zeros_like(ids)
    for block, held in enumerate(filled):
        start = 0
        for row in held:
            piece = slice(start, start + len(row.ids))
            ids[block, piece] = row.ids
            labels[block, piece] = np.where(row.scored, row.ids, IGNORED)
            positions[block, piece] = np.arange(len(row.ids))
            start = piece.stop
        positions[block, start:] = np.arange(block_size - start)
    position_ids = torch.from_numpy(positions) if packing else None
    return Packed(
        examples=Examples(torch.from_numpy(ids), torch.from_numpy(labels), position_ids),
        bytes=tuple(sum(int(row.bytes[row.scored].sum()) for row in held) for held in filled),
        passages=tuple(row.passage for held in filled for row in held),
        cut=cut,
        longest=longest,
        refused=tuple(refused),
        padding=ids.size - sum(len(row.ids) for held in filled for row in held),
    )


def replayed_rows(new: int, ratio: float) -> int:
    """Return how many rows are replayed beside so many new ones: `ratio * new`, halves rounded up."""
    return int((Decimal(str(ratio)) * new).to_integral_value(ROUND_HALF_UP))


def with_replay(new: Examples, earlier: Sequence[Examples], ratio: float, seed: int) -> Examples:
    """Return all rows of a new domain and, after them, rows of the earlier ones; training shuffles them together.

    The earlier domains share the replayed rows evenly, the earliest having one more where it does not come out even. A
    domain's rows are drawn without repetition; one with fewer rows than its share is gone through again. Every epoch
    sees the same rows. `ratio` is the number of replayed rows for each new row. Rows shorter than the longest are
    filled up with tokens that are not scored. Where nothing is replayed, `new` itself is returned.
    """
    count = replayed_rows(len(new), ratio)
    if not earlier or count == 0:
        return new
    share, more = divmod(count, len(earlier))
    parts = [new]
    for number, domain in enumerate(earlier):
        wanted = share + (number < more)
        order = drawn_order(len(domain), seed, f"replay {number} in {len(earlier)}")
        rows = np.resize(order, wanted)  # gone through again where there are too few
        parts.append(Examples(**domain[torch.from_numpy(rows)]))
    return _joined(parts)


@dataclass(frozen=True)
class Stream:
    """Rows of several domains in the order in which they are trained on.

    Attributes:
        rows: the rows of all domains, one domain after another.
        order: index into `rows` of each trained row, in order, int64 `(trained rows,)`; a row stands there once a pass.
        domains: index of the domain of each trained row, int64 `(trained rows,)`.
        ends: how many rows are trained on when each domain's share has ended.
    """

    rows: Examples
    order: torch.Tensor
    domains: torch.Tensor
    ends: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Number of tokens trained on, scored or not."""
        return len(self) * self.rows.input_ids.shape[1]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, row: int, /) -> dict[str, torch.Tensor]:
        return self.rows[int(self.order[row])]


def blend_domains(domains: Sequence[Examples], *, passes: int, blend: float, seed: int) -> Stream:
    """Put the rows of domains in order, so that each domain turns into the next without a border.

    A domain has a stretch of `passes` times its rows, each pass in the shuffled order that a stage of a sequence trains
    in. Around the border of two stretches lies a window of `blend` (0 to 1) times the shorter one. In it the share of
    the next domain's rows rises linearly from 0 to 1: of the first i rows of a window of 2 h rows, i^2 / 4h are of the
    next domain, up to rounding by an offset that the seed draws for each border. A domain's share ends with the window.
    """
    lengths = [passes * len(domain) for domain in domains]
    numbers = torch.arange(len(domains)).repeat_interleave(torch.tensor(lengths))
    borders = np.cumsum(lengths)
    ends = [int(borders[-1])] * len(domains)
    for number, border in enumerate(borders[:-1].tolist()):
        half = int(Decimal(str(blend)) * min(lengths[number : number + 2]) / 2)
        ends[number] = border + half
        if half:
            offset = int(drawn_order(4 * half, seed, f"stream {number}")[0])
            next_rows = (torch.arange(2 * half + 1) ** 2 + offset) // (4 * half)
            numbers[border - half : border + half] = number + next_rows.diff()
    order = torch.empty(len(numbers), dtype=torch.int64)
    first = 0
    for number, domain in enumerate(domains):
        shuffled = [
            torch.randperm(len(domain), generator=torch.Generator().manual_seed(seed + epoch))
            for epoch in range(passes)
        ]
        order[numbers == number] = first + torch.cat(shuffled)
        first += len(domain)
    return Stream(_joined(domains), order, numbers, tuple(ends))


def _joined(parts: Sequence[Examples]) -> Examples:
    """Put all rows under each other, of the longest length; with positions where any part has them."""
    length = max(part.input_ids.shape[1] for part in parts)
    positions = None
    if any(part.position_ids is not None for part in parts):
        positions = torch.cat([_positions(part, length) for part in parts])
    return Examples(
        torch.cat([F.pad(part.input_ids, (0, length - part.input_ids.shape[1])) for part in parts]),
        torch.cat([F.pad(part.labels, (0, length - part.labels.shape[1]), value=IGNORED) for part in parts]),
        positions,
    )


def _positions(part: Examples, length: int) -> torch.Tensor:
    """Return positions of a part's rows: running where a row is one stream of text; its filling is a text by itself."""
    rows, own = part.input_ids.shape
    positions = torch.arange(own).repeat(rows, 1) if part.position_ids is None else part.position_ids
    filling = torch.arange(length - own, dtype=positions.dtype).repeat(rows, 1)
    return torch.cat([positions, filling], dim=1)
