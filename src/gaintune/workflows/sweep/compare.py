"""Methods of a sweep compared: at matched in-domain change, and by their curves over all rates.

Replicates are the seeds of a sweep; where it has several orders of the domains, the orders are, with their seeds
averaged: what holds for one order may not for another. Intervals cover other replicates and other validation blocks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gaintune.errors import ConfigError, DataError
from gaintune.results import (
    BACKWARD_TRANSFER,
    FIGURES,
    IN_DOMAIN,
    Curve,
    FloatArray,
    Interval,
    curve_difference,
    reach,
    replicated,
    sign_flip_test,
    stretched,
    summary_parts,
)
from gaintune.workflows.sweep.records import CurvePair, Missing, Pair, Point, SweepComparison, Target, Variant
from gaintune.workflows.sweep.table import SweepRow, SweepTable

Replicate = tuple[int, int]
"""Order and seed."""


@dataclass(frozen=True)
class Resampled:
    """Block resamples of one run by what each domain adds, `(1 + samples, domains)` each; see `SummaryParts`."""

    in_domain: FloatArray
    figure: FloatArray


Rates = dict[float, dict[Replicate, Resampled]]
Averaged = Callable[[Mapping[Replicate, FloatArray]], Interval]

NEAR = 0.1  # of the weaker in-domain change: two that are surely less apart adapted alike
LEAST = 1.0  # points: nor is it asked of them to be nearer than this


def target_of(budget: int, points: Mapping[Variant, Sequence[Point]], given: float | None) -> Target:
    """The given change, else the strongest that all variants reach which improve at some rate."""
    best = {found[0].variant: min(point.in_domain.value for point in unbroken(found)) for found in points.values()}
    reached = [value for value in best.values() if value < 0]
    never = tuple(name for name, value in best.items() if value >= 0)
    return Target(budget, given if given is not None else max(reached, default=None), never)


def nearest(points: Sequence[Point], target: float | None) -> Point:
    """The point nearest the target, of equal ones that of a lower rate; without a target the best in-domain.

    Rates beyond the best in-domain change adapt less at a higher rate, and are left out as a curve leaves them out.
    """
    rising = sorted(unbroken(points), key=lambda point: point.lr)
    best = min(rising, key=lambda point: (point.in_domain.value, point.lr))
    if target is None:
        return best
    return min(rising[: rising.index(best) + 1], key=lambda point: abs(point.in_domain.value - target))


def unbroken(points: Sequence[Point]) -> Sequence[Point]:
    """The points of which every run is finished, since those that survive a rate flatter it; all where none is."""
    return [point for point in points if not point.failed] or points


def pair(
    points: tuple[Point, Point], rates: tuple[Rates, Rates], target: Target, interval: Averaged, over_orders: bool
) -> Pair:
    """Two variants at the rates of two points, run by run."""
    (one, other), (first, second) = points, (rates[0][points[0].lr], rates[1][points[1].lr])
    rest: Any = {
        "first": one.variant, "second": other.variant, "first_lr": one.lr, "second_lr": other.lr,
        "one_rate_each": len(rates[0]) == len(rates[1]) == 1,
        "margin": max(LEAST, NEAR * min(abs(one.in_domain.value), abs(other.in_domain.value))),
    }  # fmt: skip
    common = [key for key in first if key in second]
    if not common:
        reason = "no replicate is finished at both rates"
        return Pair(**rest, difference=None, in_domain=None, p=None, better=None, replicates=0, unmatched=reason)
    apart = {key: first[key].figure - second[key].figure for key in common}
    difference = interval(apart)
    left = interval({key: first[key].in_domain - second[key].in_domain for key in common})
    values = _group_values(apart, over_orders)
    unmatched = _unmatched(one, other, left, target, rest["margin"])
    better = None
    if unmatched is None and difference.sign:
        better = one.variant if difference.sign < 0 else other.variant
    return Pair(
        **rest,
        difference=difference,
        in_domain=left,
        p=sign_flip_test(values),
        better=better,
        replicates=len(values),
        unmatched=unmatched,
    )


def groups_of(keys: Iterable[Replicate], over_orders: bool) -> list[int]:
    """Which replicate each run belongs to."""
    return [order if over_orders else seed for order, seed in keys]


def _unmatched(one: Point, other: Point, left: Interval, target: Target, margin: float) -> str | None:
    """Why two points are not known to be at equal in-domain change, or None."""
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


def _group_values(apart: Mapping[Replicate, FloatArray], over_orders: bool) -> list[float]:
    """Mean difference of each replicate."""
    by_group: dict[int, list[float]] = {}
    for values, group in zip(apart.values(), groups_of(apart, over_orders), strict=True):
        by_group.setdefault(group, []).append(float(values[0].sum()))
    return [float(np.mean(values)) for values in by_group.values()]


Measured = dict[Variant, Rates]
Blocks = dict[int, tuple[int, ...]]
"""Validation blocks of each domain by budget, since what is trained on is no validation text."""
AUTOCAST = "float32-autocast-"


def check_comparison(figure: str, target: float | None) -> None:
    """Refuse what `compare_sweep` cannot compare; ask before the runs.

    Raises:
        ConfigError: no such figure, or a target that is no improvement.
    """
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
        table: what `run_sweep` returned.
        target: in-domain change in %, such as -21, at which methods are matched; unless given, of each budget the
            strongest that every variant reaches, but those that never improve.
        figure: one of in_domain, backward_transfer, backward_transfer_since_learnt, below_diagonal and
            forward_interference.
        confidence: of the intervals.

    Raises:
        ConfigError: no such figure, or a target that is no improvement.
        DataError: no finished run, none that has the figure, such as earlier domains where only one is learnt, or runs
            that were computed in different numbers.
    """
    check_comparison(figure, target)
    _check_numbers(table)
    measured, blocks = _measured(table, figure)
    over_orders = len({row.run.order for row in table.rows}) > 1
    variants = dict.fromkeys(_variant(row) for row in table.rows)
    names = {variant: variant.name(list(variants)) for variant in variants}
    missing = _missing(table, names)
    failed = {(one.variant, one.lr): one.runs for one in missing}

    def averaged(budget: int) -> Averaged:
        def interval(runs: Mapping[Replicate, FloatArray]) -> Interval:
            rows = _rows(runs, blocks[budget], confidence)
            return replicated(rows, groups=groups_of(runs, over_orders), confidence=confidence)

        return interval

    def point(variant: Variant, lr: float, runs: Mapping[Replicate, Resampled]) -> Point:
        interval = averaged(variant.budget)
        return Point(
            names[variant],
            lr,
            interval({key: numbers.in_domain for key, numbers in runs.items()}),
            interval({key: numbers.figure for key, numbers in runs.items()}),
            len(set(groups_of(runs, over_orders))),
            tuple((float(numbers.in_domain[0].sum()), float(numbers.figure[0].sum())) for numbers in runs.values()),
            failed.get((names[variant], lr), 0),
        )

    points = {
        variant: tuple(point(variant, lr, runs) for lr, runs in sorted(rates.items()))
        for variant, rates in measured.items()
    }
    targets = {
        budget: target_of(budget, {one: points[one] for one in points if one.budget == budget}, target)
        for budget in dict.fromkeys(variant.budget for variant in points)
    }
    chosen = {variant: nearest(found, targets[variant.budget].in_domain) for variant, found in points.items()}
    couples = [(one, other) for one, other in itertools.combinations(measured, 2) if one.budget == other.budget]
    return SweepComparison(
        figure,
        confidence,
        tuple(targets.values()),
        "orders" if over_orders else "seeds",
        tuple(itertools.chain.from_iterable(points.values())),
        tuple(found for variant, found in chosen.items() if names[variant] not in targets[variant.budget].never),
        tuple(
            pair(
                (chosen[one], chosen[other]),
                (measured[one], measured[other]),
                targets[one.budget],
                averaged(one.budget),
                over_orders,
            )
            for one, other in couples
        ),
        tuple(
            _curve_pair(
                (names[one], names[other]), measured[one], measured[other], blocks[one.budget], over_orders, confidence
            )
            for one, other in couples
        ),
        len(table.failed),
        missing,
        _notes(table),
    )


def _curve_pair(
    names: tuple[str, str], one: Rates, other: Rates, blocks: Sequence[int], over_orders: bool, confidence: float
) -> CurvePair:
    """Curves of the replicates that both have, each over the rates at which it is finished.

    A rate that failed in one replicate, such as one that diverged, is not on that replicate's curve and stays on the
    others'; a replicate with fewer than two rates has no curve, and is in none of the two.
    """
    if min(len(one), len(other)) < 2:
        return CurvePair(*names, None, "a curve needs two rates")
    shared = [key for key in _with_a_curve(one) if key in _with_a_curve(other)]
    if not shared:
        return CurvePair(*names, None, "no replicate is finished at two rates of both")
    groups = groups_of(shared, over_orders)
    # interpolated, a curve is no sum of parts: its resamples reach as far as those of the mean figures' difference
    first, second = (
        np.mean([found[key].figure for found in rates.values() for key in shared if key in found], axis=0)
        for rates in (one, other)
    )
    factor = reach(first - second, blocks, confidence)

    def curves(rates: Rates) -> list[Curve]:
        return [_curve(rates, key, group, factor) for key, group in zip(shared, groups, strict=True)]

    try:
        return CurvePair(*names, curve_difference(curves(one), curves(other), confidence=confidence), None)
    except DataError as error:
        return CurvePair(*names, None, str(error))


def _curve(rates: Rates, key: Replicate, group: int, factor: float) -> Curve:
    rising = [lr for lr in sorted(rates) if key in rates[lr]]
    in_domain, figure = (
        np.array([stretched(parts.sum(axis=1), factor) for parts in found])
        for found in ([rates[lr][key].in_domain for lr in rising], [rates[lr][key].figure for lr in rising])
    )
    return Curve(tuple(rising), in_domain, figure, group)


def _with_a_curve(rates: Rates) -> list[Replicate]:
    """The replicates finished at two rates or more."""
    seen = list(itertools.chain.from_iterable(rates.values()))
    return [key for key in dict.fromkeys(seen) if seen.count(key) > 1]


def _missing(table: SweepTable, names: Mapping[Variant, str]) -> tuple[Missing, ...]:
    """Rates with runs that have no numbers, each with the first of their errors."""
    found: dict[tuple[Variant, float], list[SweepRow]] = {}
    for row in table.failed:
        found.setdefault((_variant(row), row.run.lr), []).append(row)
    return tuple(Missing(names[one], lr, len(rows), str(rows[0].error)) for (one, lr), rows in found.items())


def _check_numbers(table: SweepTable) -> None:
    """Refuse runs in different numbers, such as those of two machines under model.dtype=auto.

    Full fine-tuning keeps fp32 weights, but under autocast computes in the numbers of the others.
    """
    found: dict[str, SweepRow] = {}
    for row in table.finished:
        found.setdefault(str(row.numbers).removeprefix(AUTOCAST), row)
    if len(found) > 1:
        told = "; ".join(f"{numbers}, such as {row.folder}" for numbers, row in found.items())
        raise DataError(
            f"runs were computed in different numbers ({told}): set plan.model.dtype, and name another folder"
        )


def _notes(table: SweepTable) -> tuple[str, ...]:
    """Runs of several kinds of device: they round differently, which seldom matters but cannot be told apart here."""
    devices = dict.fromkeys(str(row.device) for row in table.finished)
    return (f"runs were computed on different devices ({', '.join(devices)})",) if len(devices) > 1 else ()


def _variant(row: SweepRow) -> Variant:
    return Variant(row.run.label, row.run.rank, row.run.budget)


def _rows(runs: Mapping[Replicate, FloatArray], blocks: Sequence[int], confidence: float) -> FloatArray:
    """Figures by replicate, with their block resamples where there are any: as wide as their mean's have to be."""
    parts = np.array(list(runs.values()))
    rows = parts.sum(axis=2)
    if rows.shape[1] == 1:
        return rows[:, 0]
    return stretched(rows.T, reach(parts.mean(axis=0), blocks, confidence)).T


def _measured(table: SweepTable, figure: str) -> tuple[Measured, Blocks]:
    """The figures of every finished run with their resamples, by variant, rate and replicate; blocks of each domain."""
    found: Measured = {}
    blocks: Blocks = {}
    for row in table.finished:
        assert row.matrix is not None
        parts = summary_parts(row.losses(), row.run.plan.evaluate, row.matrix.planned)
        in_domain, wanted = parts.figures[IN_DOMAIN], parts.figures[figure]
        if in_domain is None or wanted is None:
            continue
        if not np.isfinite(in_domain + wanted).all():  # a domain of one block, which cannot be resampled
            in_domain, wanted = in_domain[:1], wanted[:1]
        run = row.run
        rates = found.setdefault(_variant(row), {})
        rates.setdefault(run.lr, {})[run.order, run.seed] = Resampled(in_domain, wanted)
        blocks[run.budget] = parts.blocks
    if not found:
        raise DataError(
            f"nothing to compare: no finished run has the figure {figure!r}"
            if table.finished
            else "nothing to compare: no run is finished"
        )
    return found, blocks
