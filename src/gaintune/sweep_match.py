"""Methods of a sweep at matched in-domain change: what they are matched at, at which rate each, and how well."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gaintune.results.bootstrap import FloatArray
from gaintune.results.records import Interval
from gaintune.results.verdicts import sign_flip_test
from gaintune.workflows.sweep.records import Pair, Point, Target, Variant

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
