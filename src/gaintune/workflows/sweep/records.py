"""What a comparison of a sweep's methods says: points, matched pairs and curves as frozen data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gaintune.results import CurveDifference, Interval


@dataclass(frozen=True)
class Variant:
    """What is compared: a method at one rank, learning from one budget, over its rates."""

    label: str
    rank: int | None
    budget: int

    def name(self, others: Sequence[Variant]) -> str:
        """As short as tells it from the others."""
        ranks = {other.rank for other in others if other.label == self.label}
        budgets = {other.budget for other in others}
        parts = [self.label, *([f"r={self.rank}"] if len(ranks) > 1 else [])]
        return " ".join([*parts, *([f"{self.budget:,} tokens"] if len(budgets) > 1 else [])])


@dataclass(frozen=True)
class Point:
    """A variant at one rate: means over its replicates, in %, with intervals over them.

    Attributes:
        variant: its name.
        lr: the rate.
        in_domain: in-domain change.
        figure: the figure that is compared.
        replicates: how many seeds or orders stand behind them.
        runs: both numbers of every run.
        failed: how many runs of that rate have no numbers and are not in the means, which flatters these.
    """

    variant: str
    lr: float
    in_domain: Interval
    figure: Interval
    replicates: int
    runs: tuple[tuple[float, float], ...]
    failed: int


@dataclass(frozen=True)
class Target:
    """In-domain change at which the variants of one budget are matched.

    Attributes:
        budget: training tokens of a domain.
        in_domain: in %; None where no variant improves, so that there is nothing to match at.
        never: variants that improve at no rate; they say nothing about the target and are matched with nothing.
    """

    budget: int
    in_domain: float | None
    never: tuple[str, ...]


@dataclass(frozen=True)
class Pair:
    """Two variants at one rate each: first minus second, in points of %, over the runs that both have.

    Attributes:
        first: its name; the rate is `first_lr`.
        second: likewise.
        difference: of the figure; negative where the first is better. None where no replicate is finished at both.
        in_domain: of the in-domain change: what the match left.
        p: two-sided, of `sign_flip_test` over the replicates.
        better: the variant whose figure is better, named only where they are matched and the interval excludes zero.
        replicates: how many stand behind the interval.
        unmatched: why the two are not known to be matched in-domain, so that this is no comparison at equal
            adaptation; None where the interval of `in_domain` lies within the margin.
        margin: in points, how far apart in-domain two may be and still be matched.
        one_rate_each: whether both are run at one rate alone, so that none was chosen.
    """

    first: str
    second: str
    first_lr: float
    second_lr: float
    difference: Interval | None
    in_domain: Interval | None
    p: float | None
    better: str | None
    replicates: int
    unmatched: str | None
    margin: float
    one_rate_each: bool

    @property
    def matched(self) -> bool:
        """Whether the two are known to be compared at equal in-domain change, within the margin."""
        return self.unmatched is None


@dataclass(frozen=True)
class CurvePair:
    """Two variants' curves over their rates; `reason` says why there is no difference where there is none."""

    first: str
    second: str
    curve: CurveDifference | None
    reason: str | None

    @property
    def better(self) -> str | None:
        """The one that keeps more at equal in-domain change, named only where the interval excludes zero."""
        sign = 0 if self.curve is None else self.curve.difference.sign
        return self.first if sign < 0 else self.second if sign > 0 else None


@dataclass(frozen=True)
class Missing:
    """A variant's rate at which runs have no numbers, such as one that diverges; they are in nothing here."""

    variant: str
    lr: float
    runs: int
    error: str


@dataclass(frozen=True)
class SweepComparison:
    """All comparisons of a sweep.

    Attributes:
        figure: which summary figure is compared, such as `backward_transfer`.
        confidence: of the intervals.
        targets: of each budget the in-domain change at which methods are matched.
        over: what the replicates are, `seeds` or `orders`.
        points: every variant at every rate.
        matched: of each variant that improves the point whose in-domain change is nearest the target.
        pairs: variants of one budget, two by two, at these rates; each says whether they are matched.
        curves: their curves, two by two.
        unfinished: runs of the grid that have no numbers, and are in nothing here.
        missing: these by variant and rate.
        notes: what else a reader must know, such as runs that were computed on different devices.
    """

    figure: str
    confidence: float
    targets: tuple[Target, ...]
    over: str
    points: tuple[Point, ...]
    matched: tuple[Point, ...]
    pairs: tuple[Pair, ...]
    curves: tuple[CurvePair, ...]
    unfinished: int
    missing: tuple[Missing, ...] = ()
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `runs.write_json`."""
        return asdict(self)
