"""Losses as they were measured, block by block: of the untouched base, and of a method after every stage."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gaintune.errors import DataError, RunDirectoryError
from gaintune.results.bootstrap import LARGEST_EXPONENT, percent


@dataclass(frozen=True)
class DomainLoss:
    """Loss of one model on one domain, block by block: sums of nats, scored tokens, UTF-8 bytes of those tokens.

    Without bytes where single tokens of a text are scored, as in masked language models.
    """

    nll: tuple[float, ...]
    tokens: tuple[int, ...]
    bytes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        counts = [len(each) for each in (self.nll, self.tokens, self.bytes) if each is not None]
        if not self.nll or len(set(counts)) > 1:
            raise DataError(f"losses of {counts} blocks: need one of each")
        if not all(map(math.isfinite, self.nll)):
            raise DataError("a block has a loss that is not finite: the model or the block is damaged")
        if min(self.tokens) < 1 or (self.bytes is not None and (min(self.bytes) < 0 or sum(self.bytes) < 1)):
            raise DataError("every block needs at least one scored token, and the domain at least one byte")

    @property
    def nats_per_token(self) -> float:
        return math.fsum(self.nll) / sum(self.tokens)

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.nats_per_token, LARGEST_EXPONENT))

    @property
    def size(self) -> int:
        """All scored tokens' UTF-8 bytes."""
        if self.bytes is None:
            raise DataError("losses of masked tokens have no bytes: bits per byte are for running text")
        return sum(self.bytes)

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers, unlike perplexity."""
        return math.fsum(self.nll) / math.log(2.0) / self.size

    def to_dict(self) -> dict[str, Any]:
        return {"nll": list(self.nll), "tokens": list(self.tokens), "bytes": list(self.bytes or ())}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> DomainLoss:
        try:
            return cls(
                tuple(map(float, value["nll"])), tuple(map(int, value["tokens"])), tuple(map(int, value["bytes"]))
            )
        except (KeyError, TypeError) as error:
            raise RunDirectoryError(f"not the losses of a domain ({error!r}); delete the file and run again") from error


@dataclass(frozen=True)
class Stage:
    """The losses measured after one domain was learnt; domains not evaluated yet are left out."""

    domain: str
    losses: dict[str, DomainLoss]


@dataclass(frozen=True)
class MethodRun:
    """What was measured of one method: the untouched base through the same code, then stage after stage."""

    label: str
    base: dict[str, DomainLoss]
    stages: tuple[Stage, ...] = ()
    info: dict[str, Any] = field(default_factory=dict)


def change(base: DomainLoss, after: DomainLoss) -> float:
    """Change of perplexity against the base in %: 100 * (after / base - 1); exactly 0 for the base itself."""
    return float(percent(np.asarray(after.nats_per_token - base.nats_per_token)))
