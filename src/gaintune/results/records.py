"""Losses as they were measured, and what matrix.json reports of them: frozen data, written and read without loss."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from gaintune.errors import DataError, RunDirectoryError
from gaintune.results.bootstrap import LARGEST_EXPONENT, percent

FORMAT = 1
Place = Literal["learning", "earlier", "later"]


@dataclass(frozen=True)
class DomainLoss:
    """Loss of a model on a domain, block by block: sums of nats, scored tokens, UTF-8 bytes of those tokens.

    Masked language models score single tokens of a text and have no bytes.
    """

    nll: tuple[float, ...]
    tokens: tuple[int, ...]
    bytes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        counts = [len(values) for values in (self.nll, self.tokens, self.bytes) if values is not None]
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
    def bits_per_byte(self) -> float:
        """Loss in bits for each UTF-8 byte, comparable between tokenizers, unlike perplexity."""
        if self.bytes is None:
            raise DataError("losses of masked tokens have no bytes: bits per byte are for running text")
        return math.fsum(self.nll) / math.log(2.0) / sum(self.bytes)

    def to_dict(self) -> dict[str, Any]:
        return {"nll": list(self.nll), "tokens": list(self.tokens), "bytes": list(self.bytes or ())}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> DomainLoss:
        try:
            nll, tokens, sizes = value["nll"], value["tokens"], value["bytes"]
            return cls(tuple(map(float, nll)), tuple(map(int, tokens)), tuple(map(int, sizes)))
        except (KeyError, TypeError) as error:
            raise RunDirectoryError(f"not the losses of a domain ({error!r})") from error


@dataclass(frozen=True)
class Stage:
    """Losses after the training on one domain; domains not evaluated yet are left out."""

    domain: str
    losses: dict[str, DomainLoss]


@dataclass(frozen=True)
class MethodRun:
    """Losses of a method: of the untouched base through the same code, then stage after stage."""

    label: str
    base: dict[str, DomainLoss]
    stages: tuple[Stage, ...] = ()
    info: dict[str, Any] = field(default_factory=dict)


def change(base: DomainLoss, after: DomainLoss) -> float:
    """Return the change of perplexity in %: 100 * (after / base - 1); exactly 0 for the base itself."""
    return float(percent(np.asarray(after.nats_per_token - base.nats_per_token)))


@dataclass(frozen=True)
class Interval:
    """A value with its interval, in one unit: %, points of %, nats, or a share of rows.

    The ends are None where a single block or row leaves nothing to resample.
    """

    value: float
    low: float | None
    high: float | None

    @property
    def sign(self) -> int:
        """-1 or 1 where the whole interval lies on that side of zero, else 0."""
        if self.low is None or self.high is None:
            return 0
        return -1 if self.high < 0 else 1 if self.low > 0 else 0


@dataclass(frozen=True)
class BaseFigures:
    """The untouched base on one domain."""

    perplexity: float
    bits_per_byte: float
    tokens: int
    bytes: int
    blocks: int


@dataclass(frozen=True)
class Cell:
    """A domain after a stage; `change`, `low` and `high` in % of the base's perplexity."""

    perplexity: float
    bits_per_byte: float
    change: float
    low: float | None
    high: float | None

    @property
    def interval(self) -> Interval:
        return Interval(self.change, self.low, self.high)


@dataclass(frozen=True)
class MatrixRow:
    """All domains after a stage; not `finished`, and in no summary, while some are not evaluated."""

    domain: str
    cells: dict[str, Cell]
    finished: bool


@dataclass(frozen=True)
class Summary:
    """The sequence in five figures, in %; None where there is nothing to average, such as no earlier domain."""

    in_domain: Interval | None = None
    backward_transfer: Interval | None = None
    backward_transfer_since_learnt: Interval | None = None
    below_diagonal: Interval | None = None
    forward_interference: Interval | None = None


@dataclass(frozen=True)
class StageSummary:
    """Right after a stage: the domain just trained, and the means over earlier and later domains, in %."""

    domain: str
    in_domain: Interval | None
    earlier: Interval | None
    later: Interval | None


@dataclass(frozen=True)
class MethodMatrix:
    """Report of one method."""

    label: str
    info: dict[str, Any]
    base: dict[str, BaseFigures]
    stages: tuple[MatrixRow, ...]
    summary: Summary
    per_stage: tuple[StageSummary, ...]

    def place(self, stage: int, domain: str) -> Place:
        """Return where a cell lies: on the diagonal ('learning'), below it ('earlier') or above it ('later')."""
        trained = [row.domain for row in self.stages[: stage + 1]]
        return "learning" if domain == trained[-1] else "earlier" if domain in trained else "later"


@dataclass(frozen=True)
class Comparison:
    """Paired differences `label` minus `against` in points of %, after the `stages` that both have finished."""

    label: str
    against: str
    stages: int
    summary: Summary


@dataclass(frozen=True)
class Settings:
    """Settings of the bootstrap behind the intervals."""

    bootstrap_samples: int
    confidence: float
    seed: int


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class Matrix:
    """All numbers of matrix.json; `partial` while a method has not finished every planned stage."""

    domains: tuple[str, ...]
    planned: tuple[str, ...]
    methods: tuple[MethodMatrix, ...]
    comparisons: tuple[Comparison, ...]
    settings: Settings
    partial: bool
    format: int = FORMAT

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for `storage.write_json`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Matrix:
        """Read back what `to_dict` gave.

        Raises:
            RunDirectoryError: the value is not a matrix, or of another format.
        """
        format_ = value.get("format") if isinstance(value, dict) else None
        if format_ != FORMAT:
            raise RunDirectoryError(f"not a matrix of format {FORMAT} (found {format_!r})")
        try:
            matrix = TypeAdapter(cls).validate_python(value)
        except ValidationError as error:
            wrong = error.errors()[0]
            where = ".".join(map(str, wrong["loc"]))
            raise RunDirectoryError(f"a matrix with a part missing or wrong ({where}: {wrong['msg']})") from error
        for method in matrix.methods:
            if unknown := sorted({name for row in method.stages for name in row.cells} - set(method.base)):
                raise RunDirectoryError(f"a matrix with a part missing or wrong (the base on {unknown[0]})")
        return matrix
