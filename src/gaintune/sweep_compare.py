"""Methods of a sweep compared: at matched in-domain change, and by their curves over all rates.

Replicates are the seeds of a sweep; where it has several orders of the domains, the orders are, with their seeds
averaged: what holds for one order may not for another. Intervals cover other replicates and other validation blocks.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from gaintune.errors import DataError
from gaintune.evaluate.bootstrap import BACKWARD_TRANSFER, FIGURES, IN_DOMAIN, FloatArray
from gaintune.evaluate.matrix import summary_replicates
from gaintune.evaluate.records import Interval
from gaintune.evaluate.statistics import Curve, CurveDifference, curve_difference, replicated, sign_flip_test
from gaintune.sweep_table import SweepTable

Replicate = tuple[int, int]
"""Order and seed."""


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
    """A variant at one rate: means over its replicates, in %, with intervals over them."""

    variant: str
    lr: float
    in_domain: Interval
    figure: Interval
    replicates: int
    runs: int


@dataclass(frozen=True)
class Pair:
    """Two variants at their matched rates: first minus second, in points of %, over the runs that both have.

    Attributes:
        difference: of the figure; negative where the first is better.
        in_domain: of the in-domain change: what the match left.
        p: two-sided, of `sign_flip_test` over the replicates.
        better: the variant whose figure is better, named only where the interval excludes zero.
        replicates: how many stand behind the interval.
    """

    first: str
    second: str
    difference: Interval
    in_domain: Interval
    p: float
    better: str | None
    replicates: int


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
class SweepComparison:
    """All comparisons of a sweep.

    Attributes:
        figure: which summary figure is compared, such as `backward_transfer`.
        target: in-domain change in % at which methods are matched.
        over: what the replicates are, `seeds` or `orders`.
        points: every variant at every rate.
        matched: of each variant the point whose in-domain change is nearest the target.
        pairs: matched variants of one budget, two by two.
        curves: their curves, two by two.
        unfinished: runs of the grid that have no numbers, and are in nothing here.
    """

    figure: str
    target: float
    over: str
    points: tuple[Point, ...]
    matched: tuple[Point, ...]
    pairs: tuple[Pair, ...]
    curves: tuple[CurvePair, ...]
    unfinished: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `runs.write_json`."""
        return asdict(self)


@dataclass(frozen=True)
class _Numbers:
    """Block resamples of one run, `(1 + samples,)` each."""

    in_domain: FloatArray
    figure: FloatArray


Measured = dict[Variant, dict[float, dict[Replicate, _Numbers]]]


def compare_sweep(
    table: SweepTable, *, target: float | None = None, figure: str = BACKWARD_TRANSFER, confidence: float = 0.95
) -> SweepComparison:
    """Compare the methods of a sweep on a figure of the whole sequence, such as the change on earlier domains.

    Args:
        table: what `run_sweep` returned.
        target: in-domain change in %, such as -21, at which methods are matched; the strongest that every variant
            reaches unless given.
        figure: one of in_domain, backward_transfer, backward_transfer_since_learnt, below_diagonal and
            forward_interference.
        confidence: of the intervals.

    Raises:
        DataError: no finished run, or none that has the figure, such as earlier domains where only one is learnt.
    """
    if figure not in FIGURES:
        raise DataError(f"no figure is called {figure!r}; the figures are {', '.join(FIGURES)}")
    measured = _measured(table, figure, confidence)
    over_orders = len({row.run.order for row in table.rows}) > 1
    names = {variant: variant.name(list(measured)) for variant in measured}

    def interval(runs: Mapping[Replicate, FloatArray]) -> Interval:
        return replicated(_rows(runs), groups=_groups(runs, over_orders), confidence=confidence)

    points = {
        variant: [
            Point(
                names[variant],
                lr,
                interval({key: numbers.in_domain for key, numbers in runs.items()}),
                interval({key: numbers.figure for key, numbers in runs.items()}),
                len(set(_groups(runs, over_orders))),
                len(runs),
            )
            for lr, runs in sorted(rates.items())
        ]
        for variant, rates in measured.items()
    }
    strongest = max(min(point.in_domain.value for point in found) for found in points.values())
    wanted = strongest if target is None else target
    matched = {
        variant: min(found, key=lambda point: (abs(point.in_domain.value - wanted), point.lr))
        for variant, found in points.items()
    }
    couples = [(one, other) for one, other in itertools.combinations(measured, 2) if one.budget == other.budget]
    pairs = []
    for one, other in couples:
        first, second = measured[one][matched[one].lr], measured[other][matched[other].lr]
        common = [key for key in first if key in second]
        if common:
            apart = {key: first[key].figure - second[key].figure for key in common}
            left = {key: first[key].in_domain - second[key].in_domain for key in common}
            pairs.append(_pair(names[one], names[other], apart, left, interval, over_orders))
    return SweepComparison(
        figure,
        wanted,
        "orders" if over_orders else "seeds",
        tuple(itertools.chain.from_iterable(points.values())),
        tuple(matched.values()),
        tuple(pairs),
        tuple(
            _curve_pair(names[one], names[other], measured[one], measured[other], over_orders, confidence)
            for one, other in couples
        ),
        len(table.failed),
    )


def _pair(
    first: str,
    second: str,
    apart: Mapping[Replicate, FloatArray],
    left: Mapping[Replicate, FloatArray],
    interval: Any,
    over_orders: bool,
) -> Pair:
    difference = interval(apart)
    groups = _groups(apart, over_orders)
    values = [float(np.mean([apart[key][0] for key, own in zip(apart, groups, strict=True) if own == group]))
              for group in dict.fromkeys(groups)]  # fmt: skip
    better = first if difference.sign < 0 else second if difference.sign > 0 else None
    return Pair(first, second, difference, interval(left), sign_flip_test(values), better, len(values))


def _curve_pair(
    first: str,
    second: str,
    one: Mapping[float, Mapping[Replicate, _Numbers]],
    other: Mapping[float, Mapping[Replicate, _Numbers]],
    over_orders: bool,
    confidence: float,
) -> CurvePair:
    """Curves of the replicates that both have, each over the rates at which every one of these is finished."""
    shared = [key for key in _everywhere(one) if key in _everywhere(other)]
    if min(len(one), len(other)) < 2 or not shared:
        reason = "a curve needs two rates" if min(len(one), len(other)) < 2 else "no replicate is finished at all rates"
        return CurvePair(first, second, None, reason)
    groups = _groups(shared, over_orders)

    def curves(rates: Mapping[float, Mapping[Replicate, _Numbers]]) -> list[Curve]:
        rising = sorted(rates)
        return [
            Curve(
                tuple(rising),
                np.array([rates[lr][key].in_domain for lr in rising]),
                np.array([rates[lr][key].figure for lr in rising]),
                group,
            )
            for key, group in zip(shared, groups, strict=True)
        ]

    try:
        return CurvePair(first, second, curve_difference(curves(one), curves(other), confidence=confidence), None)
    except DataError as error:
        return CurvePair(first, second, None, str(error))


def _everywhere(rates: Mapping[float, Mapping[Replicate, _Numbers]]) -> list[Replicate]:
    """The replicates finished at every rate."""
    first, *others = rates.values()
    return [key for key in first if all(key in other for other in others)]


def _groups(keys: Any, over_orders: bool) -> list[int]:
    return [order if over_orders else seed for order, seed in keys]


def _rows(runs: Mapping[Replicate, FloatArray]) -> FloatArray:
    """Figures by replicate, with their block resamples where there are any."""
    rows = np.array(list(runs.values()))
    return rows[:, 0] if rows.shape[1] == 1 else rows


def _measured(table: SweepTable, figure: str, confidence: float) -> Measured:
    """The figures of every finished run with their block resamples, by variant, rate and replicate."""
    found: Measured = {}
    for row in table.finished:
        assert row.matrix is not None
        evaluate = row.run.plan.evaluate.model_copy(update={"confidence": confidence})
        figures = summary_replicates(row.losses(), evaluate, row.matrix.planned)
        in_domain, wanted = figures[IN_DOMAIN], figures[figure]
        if in_domain is None or wanted is None:
            continue
        if not np.isfinite(in_domain + wanted).all():  # a domain of one block, which cannot be resampled
            in_domain, wanted = in_domain[:1], wanted[:1]
        run = row.run
        rates = found.setdefault(Variant(run.label, run.rank, run.budget), {})
        rates.setdefault(run.lr, {})[run.order, run.seed] = _Numbers(in_domain, wanted)
    if not found:
        raise DataError(
            f"nothing to compare: no finished run has the figure {figure!r}"
            if table.finished
            else "nothing to compare: no run is finished"
        )
    return found
