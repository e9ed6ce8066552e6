"""Rows of tokens a model is trained or measured on, with what is scored of them and where their texts begin."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from gaintune.models.loss import IGNORED


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
    that is trained on.
    """

    name: str
    train: Examples
    validation: Examples
    validation_bytes: tuple[int, ...]
    content_hash: str
    train_documents: int
    validation_documents: int
    removed_near_duplicates: int

    def describe(self) -> dict[str, str | int]:
        """What a record keeps of the text: its content hash and how much there was."""
        return {
            "content_hash": self.content_hash,
            "train_tokens": self.train.tokens,
            "validation_tokens": self.validation.tokens,
            "train_documents": self.train_documents,
            "validation_documents": self.validation_documents,
            "removed_near_duplicates": self.removed_near_duplicates,
        }
