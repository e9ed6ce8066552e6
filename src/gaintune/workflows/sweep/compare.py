"""Methods of a sweep compared: at matched in-domain change, and by their curves over all rates.

Replicates are the seeds of a sweep; where it has several orders of the domains, the orders are, with their seeds
averaged: what holds for one order may not for another. Intervals cover other replicates and other validation blocks.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gaintune import results
from gaintune.errors import ConfigError, DataError
from gaintune.results import BACKWARD_TRANSFER, FIGURES, IN_DOMAIN, Curve, CurveDifference, FloatArray, Interval
from gaintune.workflows.sweep.run import SweepRow, SweepTable

NEAR = 0.1  # two in-domain changes count as equal if they surely differ by under 10 % of the weaker one
LEAST = 1.0  # and in any case if they surely differ by under one point
AUTOCAST = "float32-autocast-"  # start of the name of a mixed precision


@dataclass(frozen=True)
class Variant:
    """A method at one rank with one training budget, over its rates: what is compared."""

    label: str
    rank: int | None
    budget: int

    def name(self, others: Sequence[Variant]) -> str:
        """Return the shortest name that tells it from the others."""
        ranks = {other.rank for other in others if other.label == self.label}
        budgets = {other.budget for other in others}
        parts = [self.label, *([f"r={self.rank}"] if len(ranks) > 1 else [])]
        return " ".join([*parts, *([f"{self.budget:,} tokens"] if len(budgets) > 1 else [])])


@dataclass(frozen=True)
class Point:
    """A variant, by its name, at one rate: means over its replicates, in %, with intervals over them.

    `figure` is the figure that is compared; `runs` has both numbers of every run; `replicates` counts seeds or orders.
    `failed` counts the runs of that rate without numbers; they are not in the means, which flatters these.
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
    """In-domain change, in %, at which the variants of one budget are matched; None where no variant improves.

    Variants that improve at no rate are in `never`: they do not count for the target and are matched with nothing.
    """

    budget: int
    in_domain: float | None
    never: tuple[str, ...]


@dataclass(frozen=True)
class Pair:
    """Two variants at one rate each: first minus second, in points of %, over the replicates that both have.

    Attributes:
        difference: of the figure; negative where the first is better. None where no replicate is finished at both.
        in_domain: difference of the in-domain changes that the match left.
        p: two-sided, of `sign_flip_test` over the replicates.
        better: the variant whose figure is better, named only where they are matched and the interval excludes zero.
        unmatched: why the two are not known to be matched in-domain, so that this is no comparison at equal
            adaptation; None where the interval of `in_domain` lies within the margin.
        margin: in points, how far apart in-domain two variants may be and still be matched.
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


@dataclass(frozen=True)
class CurvePair:
    """Two variants' curves over their rates; `reason` says why there is no difference where there is none."""

    first: str
    second: str
    curve: CurveDifference | None
    reason: str | None

    @property
    def better(self) -> str | None:
        """The variant that keeps more at equal in-domain change, named only where the interval excludes zero."""
        sign = 0 if self.curve is None else self.curve.difference.sign
        return self.first if sign < 0 else self.second if sign > 0 else None


@dataclass(frozen=True)
class Missing:
    """A variant's rate at which runs have no numbers, such as runs that diverged; nothing here counts them."""

    variant: str
    lr: float
    runs: int
    error: str


@dataclass(frozen=True)
class SweepComparison:
    """All comparisons of a sweep.

    Attributes:
        figure: which summary figure is compared, such as `backward_transfer`.
        over: what the replicates are, `seeds` or `orders`.
        points: every variant at every rate.
        matched: of each variant that improves the point whose in-domain change is nearest the target.
        pairs: variants of one budget, two by two, at these rates; `unmatched` says whether they are matched.
        curves: their curves, two by two.
        unfinished: number of runs of the grid that have no numbers; nothing here counts them.
        missing: these by variant and rate.
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


@dataclass(frozen=True)
class Resampled:
    """Block resamples of one run by what each domain adds, `(1 + samples, domains)` each; see `SummaryParts`."""

    in_domain: FloatArray
    figure: FloatArray


Replicate = tuple[int, int]  # order and seed
Runs = dict[Replicate, Resampled]


def check_comparison(figure: str, target: float | None) -> None:
    """Refuse a figure that does not exist and a target that is no improvement, before anything is run; ConfigError."""
    if figure not in FIGURES:
        raise ConfigError(f"no figure is called {figure!r}; the figures are {', '.join(FIGURES)}")
    if target is not None and not -100 < target < 0:
        raise ConfigError(
            f"target {target:g}: methods are matched at an in-domain change that improves, between -100 and 0 %"
        )


def compare_sweep(
    table: SweepTable, *, target: float | None = None, figure: str = BACKWARD_TRANSFER, confidence: float = 0.95
) -> SweepComparison:
    """Compare the methods of a sweep on a figure of the whole sequence, such as the change on earlier domains.

    Args:
        table: the table that `run_sweep` returned.
        target: in-domain change in %, such as -21, at which methods are matched; default: of each budget the strongest
            that every variant reaches, except variants that never improve.
        figure: one of in_domain, backward_transfer, backward_transfer_since_learnt, below_diagonal and
            forward_interference.
        confidence: of the intervals.

    Raises:
        ConfigError: no such figure, or a target that is no improvement.
        DataError: no finished run, none that has the figure, such as earlier domains in a sequence of one, or runs that
            were computed in different precisions.
    """
    check_comparison(figure, target)
    _check_precision(table)
    return _Comparer(table, figure, confidence).compare(target)


def unbroken(points: Sequence[Point]) -> Sequence[Point]:
    """Return the points without failed runs, since the runs that survive a rate flatter it; all if each has some."""
    return [point for point in points if not point.failed] or points


class _Comparer:
    """The finished runs of a sweep by variant, rate and replicate, compared on one figure."""

    def __init__(self, table: SweepTable, figure: str, confidence: float) -> None:
        self.table = table
        self.figure = figure
        self.confidence = confidence
        self.measured, self.blocks = _measured(table, figure)
        self.over_orders = len({row.run.order for row in table.rows}) > 1
        variants = dict.fromkeys(_variant(row) for row in table.rows)
        self.names = {variant: variant.name(list(variants)) for variant in variants}
        self.failed: dict[tuple[Variant, float], list[SweepRow]] = {}
        for row in table.failed:
            self.failed.setdefault((_variant(row), row.run.lr), []).append(row)

    def compare(self, target: float | None) -> SweepComparison:
        """Compare all variants of one budget at the target, and by their curves."""
        points = {
            variant: tuple(self.point(variant, lr, runs) for lr, runs in sorted(rates.items()))
            for variant, rates in self.measured.items()
        }
        targets = {
            budget: _target(budget, [found for variant, found in points.items() if variant.budget == budget], target)
            for budget in dict.fromkeys(variant.budget for variant in points)
        }
        chosen = {variant: _nearest(found, targets[variant.budget].in_domain) for variant, found in points.items()}
        couples = [(one, other) for one, other in itertools.combinations(points, 2) if one.budget == other.budget]
        devices = dict.fromkeys(str(row.device) for row in self.table.finished)  # they round differently
        note = f"runs were computed on different devices ({', '.join(devices)})"
        return SweepComparison(
            figure=self.figure,
            confidence=self.confidence,
            targets=tuple(targets.values()),
            over="orders" if self.over_orders else "seeds",
            points=tuple(itertools.chain.from_iterable(points.values())),
            matched=tuple(
                point for variant, point in chosen.items() if point.variant not in targets[variant.budget].never
            ),
            pairs=tuple(self.pair(one, other, chosen, targets[one.budget]) for one, other in couples),
            curves=tuple(self.curve_pair(one, other) for one, other in couples),
            unfinished=len(self.table.failed),
            missing=tuple(
                Missing(self.names[variant], lr, len(rows), str(rows[0].error))
                for (variant, lr), rows in self.failed.items()
            ),
            notes=(note,) if len(devices) > 1 else (),
        )

    def groups(self, keys: Iterable[Replicate]) -> list[int]:
        """Return the replicate that each run belongs to: its order, or its seed where there is one order."""
        return [order if self.over_orders else seed for order, seed in keys]

    def interval(self, budget: int, runs: Mapping[Replicate, FloatArray]) -> Interval:
        """Average runs over replicates, with their block resamples if there are any."""
        parts = np.array(list(runs.values()))
        rows = parts.sum(axis=2)
        if rows.shape[1] == 1:
            rows = rows[:, 0]
        else:  # as wide as the interval of their mean has to be
            rows = results.stretched(rows.T, results.reach(parts.mean(axis=0), self.blocks[budget], self.confidence)).T
        return results.replicated(rows, groups=self.groups(runs), confidence=self.confidence)

    def point(self, variant: Variant, lr: float, runs: Runs) -> Point:
        """Average a variant's runs at one rate."""
        return Point(
            self.names[variant],
            lr,
            self.interval(variant.budget, {key: run.in_domain for key, run in runs.items()}),
            self.interval(variant.budget, {key: run.figure for key, run in runs.items()}),
            len(set(self.groups(runs))),
            tuple((float(run.in_domain[0].sum()), float(run.figure[0].sum())) for run in runs.values()),
            len(self.failed.get((variant, lr), ())),
        )

    def pair(self, one: Variant, other: Variant, chosen: Mapping[Variant, Point], target: Target) -> Pair:
        """Compare two variants at the rates of their chosen points, run by run."""
        left, right, rates = chosen[one], chosen[other], (self.measured[one], self.measured[other])
        first, second = rates[0][left.lr], rates[1][right.lr]
        margin = max(LEAST, NEAR * min(abs(left.in_domain.value), abs(right.in_domain.value)))
        difference = in_domain = p = better = None
        values, unmatched = [], "no replicate is finished at both rates"
        if common := [key for key in first if key in second]:
            apart = {key: first[key].figure - second[key].figure for key in common}
            difference = self.interval(one.budget, apart)
            in_domain = self.interval(one.budget, {key: first[key].in_domain - second[key].in_domain for key in common})
            by_group: dict[int, list[float]] = {}
            for parts, group in zip(apart.values(), self.groups(apart), strict=True):
                by_group.setdefault(group, []).append(float(parts[0].sum()))
            values = [float(np.mean(totals)) for totals in by_group.values()]
            p = results.sign_flip_test(values)
            unmatched = _unmatched(left, right, in_domain, target, margin)
            if unmatched is None and difference.sign:
                better = (left if difference.sign < 0 else right).variant
        return Pair(
            left.variant, right.variant, left.lr, right.lr, difference, in_domain, p, better, len(values), unmatched,
            margin, one_rate_each=len(rates[0]) == len(rates[1]) == 1,
        )  # fmt: skip

    def curve_pair(self, one: Variant, other: Variant) -> CurvePair:
        """Compare the curves of the replicates that both have, each over the rates at which it is finished.

        A rate that failed in one replicate, such as one that diverged, is not on that replicate's curve and stays on
        the others'; a replicate with fewer than two rates has no curve, and counts for neither variant.
        """
        names, both = (self.names[one], self.names[other]), (self.measured[one], self.measured[other])
        if min(map(len, both)) < 2:
            return CurvePair(*names, None, "a curve needs two rates")
        with_curve = [_with_a_curve(rates) for rates in both]
        shared = [key for key in with_curve[0] if key in with_curve[1]]
        if not shared:
            return CurvePair(*names, None, "no replicate is finished at two rates of both")
        # interpolated, a curve is no sum of parts: its resamples reach as far as those of the mean figures' difference
        first, second = (
            np.mean([runs[key].figure for runs in rates.values() for key in shared if key in runs], axis=0)
            for rates in both
        )
        factor, groups = results.reach(first - second, self.blocks[one.budget], self.confidence), self.groups(shared)
        try:
            left, right = (
                [_curve(rates, key, group, factor) for key, group in zip(shared, groups, strict=True)] for rates in both
            )
            return CurvePair(*names, results.curve_difference(left, right, confidence=self.confidence), None)
        except DataError as error:
            return CurvePair(*names, None, str(error))


def _target(budget: int, variants: Sequence[Sequence[Point]], given: float | None) -> Target:
    """Return the given change, else the strongest that all variants reach which improve at some rate."""
    best = {points[0].variant: min(point.in_domain.value for point in unbroken(points)) for points in variants}
    reached = [value for value in best.values() if value < 0]
    never = tuple(name for name, value in best.items() if value >= 0)
    return Target(budget, given if given is not None else max(reached, default=None), never)


def _nearest(points: Sequence[Point], target: float | None) -> Point:
    """Return the point nearest the target, of equal ones that of a lower rate; without a target the best in-domain.

    Rates above that of the best in-domain change adapt less; they are left out, as a curve leaves them out.
    """
    rising = sorted(unbroken(points), key=lambda point: point.lr)
    best = min(rising, key=lambda point: (point.in_domain.value, point.lr))
    if target is None:
        return best
    return min(rising[: rising.index(best) + 1], key=lambda point: abs(point.in_domain.value - target))


def _unmatched(one: Point, other: Point, left: Interval, target: Target, margin: float) -> str | None:
    """Explain why two points are not known to be at equal in-domain change; None if they are."""
    never = [point.variant for point in (one, other) if point.variant in target.never]
    if never:
        return f"{' and '.join(never)} {'improves' if len(never) == 1 else 'improve'} in-domain at no rate"
    apart = f"{abs(left.value):.1f} points apart in-domain"
    if left.low is None or left.high is None:
        return f"{apart} in one replicate, which cannot tell whether they are matched"
    if left.low > margin or left.high < -margin:
        return f"not matched, {apart}: more rates may bring them nearer"
    if max(-left.low, left.high) > margin:
        return f"{apart}, and not known to be matched within {margin:.1f}: more replicates would tell"
    return None


def _curve(rates: Mapping[float, Runs], key: Replicate, group: int, factor: float) -> Curve:
    """Make the curve of one replicate over its rates."""
    rising = [lr for lr in sorted(rates) if key in rates[lr]]
    in_domain, figure = (
        np.array([results.stretched(getattr(rates[lr][key], name).sum(axis=1), factor) for lr in rising])
        for name in ("in_domain", "figure")
    )
    return Curve(tuple(rising), in_domain, figure, group)


def _with_a_curve(rates: Mapping[float, Runs]) -> list[Replicate]:
    """Return the replicates finished at two rates or more."""
    counts = Counter(itertools.chain.from_iterable(rates.values()))
    return [key for key, count in counts.items() if count > 1]


def _check_precision(table: SweepTable) -> None:
    """Refuse runs in different precisions, such as those of two machines under model.dtype=auto.

    Full fine-tuning keeps fp32 weights, but under autocast computes in the precision of the others.
    """
    examples: dict[str, SweepRow] = {}
    for row in table.finished:
        examples.setdefault(str(row.numbers).removeprefix(AUTOCAST), row)
    if len(examples) > 1:
        listed = "; ".join(f"{numbers}, such as {row.folder}" for numbers, row in examples.items())
        raise DataError(
            f"runs were computed in different precisions ({listed}): set plan.model.dtype, and name another folder"
        )


def _variant(row: SweepRow) -> Variant:
    return Variant(row.run.label, row.run.rank, row.run.budget)


def _measured(table: SweepTable, figure: str) -> tuple[dict[Variant, dict[float, Runs]], dict[int, tuple[int, ...]]]:
    """Read the figures of every finished run, by variant, rate and replicate, and each budget's blocks by domain.

    Validation blocks depend on the budget, since what is trained on is no validation text.
    """
    measured: dict[Variant, dict[float, Runs]] = {}
    blocks: dict[int, tuple[int, ...]] = {}
    for row in table.finished:
        assert row.matrix is not None
        parts = results.summary_parts(row.losses(), row.run.plan.evaluate, row.matrix.planned)
        in_domain, wanted = parts.figures[IN_DOMAIN], parts.figures[figure]
        if in_domain is None or wanted is None:
            continue
        if not np.isfinite(in_domain + wanted).all():  # a domain of one block, which cannot be resampled
            in_domain, wanted = in_domain[:1], wanted[:1]
        runs = measured.setdefault(_variant(row), {}).setdefault(row.run.lr, {})
        runs[row.run.order, row.run.seed] = Resampled(in_domain, wanted)
        blocks[row.run.budget] = parts.blocks
    if not measured:
        reason = f"no finished run has the figure {figure!r}" if table.finished else "no run is finished"
        raise DataError(f"nothing to compare: {reason}")
    return measured, blocks
