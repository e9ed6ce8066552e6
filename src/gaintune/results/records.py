"""What matrix.json holds: the reported numbers as frozen data, written and read back without loss."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from gaintune.errors import RunDirectoryError

FORMAT = 1
Place = Literal["learning", "earlier", "later"]


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
    """One domain after one stage; `change`, `low` and `high` in % of the base's perplexity."""

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
    """All domains after one stage; not `finished` while some are not evaluated, and then in no summary."""

    domain: str
    cells: dict[str, Cell]
    finished: bool


@dataclass(frozen=True)
class Summary:
    """The sequence in five figures, in %; None where there is nothing to average, such as earlier domains of one."""

    in_domain: Interval | None = None
    backward_transfer: Interval | None = None
    backward_transfer_since_learnt: Interval | None = None
    below_diagonal: Interval | None = None
    forward_interference: Interval | None = None


@dataclass(frozen=True)
class StageSummary:
    """Right after one stage: the domain just learnt, and the means over earlier and later domains, in %."""

    domain: str
    in_domain: Interval | None
    earlier: Interval | None
    later: Interval | None


@dataclass(frozen=True)
class MethodMatrix:
    """Everything reported of one method."""

    label: str
    info: dict[str, Any]
    base: dict[str, BaseFigures]
    stages: tuple[MatrixRow, ...]
    summary: Summary
    per_stage: tuple[StageSummary, ...]

    def place(self, stage: int, domain: str) -> Place:
        """Where a cell lies: on the diagonal ('learning'), below it ('earlier') or above it ('later')."""
        learnt = [row.domain for row in self.stages[: stage + 1]]
        return "learning" if domain == learnt[-1] else "earlier" if domain in learnt else "later"


@dataclass(frozen=True)
class Comparison:
    """Paired differences `label` minus `against` in points of %, after the `stages` that both have finished."""

    label: str
    against: str
    stages: int
    summary: Summary


@dataclass(frozen=True)
class Settings:
    """How the intervals were made."""

    bootstrap_samples: int
    confidence: float
    seed: int


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
        """Plain values for `runs.write_json`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Matrix:
        """Read back what `to_dict` gave.

        Raises:
            RunDirectoryError: the value is not a matrix, or of another format.
        """
        found = value.get("format") if isinstance(value, dict) else None
        if found != FORMAT:
            raise RunDirectoryError(f"not a matrix of format {FORMAT} (found {found!r}); run `gaintune sequence` again")
        try:
            return cls(
                domains=tuple(value["domains"]),
                planned=tuple(value["planned"]),
                methods=tuple(_read_method(method) for method in value["methods"]),
                comparisons=tuple(
                    Comparison(one["label"], one["against"], one["stages"], _read_summary(one["summary"]))
                    for one in value["comparisons"]
                ),
                settings=Settings(**value["settings"]),
                partial=value["partial"],
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise RunDirectoryError(f"a matrix with a part missing or wrong ({error!r}); build it again") from error


def _read_interval(value: dict[str, Any] | None) -> Interval | None:
    return None if value is None else Interval(**value)


def _read_summary(value: dict[str, Any]) -> Summary:
    return Summary(**{name: _read_interval(figure) for name, figure in value.items()})


def _read_method(value: dict[str, Any]) -> MethodMatrix:
    rows = (
        MatrixRow(row["domain"], {name: Cell(**cell) for name, cell in row["cells"].items()}, row["finished"])
        for row in value["stages"]
    )
    per_stage = (
        StageSummary(row["domain"], *(_read_interval(row[name]) for name in ("in_domain", "earlier", "later")))
        for row in value["per_stage"]
    )
    base = {name: BaseFigures(**figures) for name, figures in value["base"].items()}
    summary = _read_summary(value["summary"])
    return MethodMatrix(value["label"], dict(value["info"]), base, tuple(rows), summary, tuple(per_stage))
