"""Trade-off curves of two methods over learning rates, compared as curves: no rate is picked."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gaintune.errors import DataError
from gaintune.results.bootstrap import FloatArray
from gaintune.results.intervals import CONFIDENCE, replicated
from gaintune.results.records import Interval

PLACES = 101  # of the shared range, at which curves are compared


@dataclass(frozen=True)
class Curve:
    """A method's trade-off in one replicate: a point for each rate, all in %.

    Attributes:
        rates: learning rates, rising, `(rates,)`.
        in_domain: change on the domains as they were learnt, `(rates,)` or `(rates, 1 + resamples)`.
        earlier: change on earlier domains at the end, of the same shape.
        group: what the replicate belongs to, as in `replicated`; None where it stands for itself.
    """

    rates: tuple[float, ...]
    in_domain: FloatArray
    earlier: FloatArray
    group: int | None = None

    def __post_init__(self) -> None:
        if self.in_domain.shape != self.earlier.shape or len(self.rates) != len(self.in_domain):
            raise DataError("a curve needs in-domain and earlier figures for each of its rates")
        if any(one >= other for one, other in itertools.pairwise(self.rates)):
            raise DataError(f"a curve's rates must rise, got {', '.join(f'{rate:g}' for rate in self.rates)}")

    def branch(self) -> int:
        """How many rates lead up to the best in-domain change: what is beyond adapts less at a higher rate."""
        figures = self.in_domain if self.in_domain.ndim == 1 else self.in_domain[:, 0]
        return int(np.argmin(figures)) + 1


@dataclass(frozen=True)
class CurveDifference:
    """Earlier domains of one method minus another's at equal in-domain change, averaged over the range both reach.

    Attributes:
        difference: in points of %; negative where the first keeps more.
        low: the range's strongest in-domain change, in %.
        high: its weakest.
        points: places in the range with the difference there.
        replicates: how many replicates stand behind the interval.
        left_out: rates of each method beyond its best in-domain change in some replicate, which are not on its curve
            there.
    """

    difference: Interval
    low: float
    high: float
    points: tuple[tuple[float, Interval], ...]
    replicates: int
    left_out: tuple[tuple[float, ...], tuple[float, ...]]


def curve_difference(
    first: Sequence[Curve],
    second: Sequence[Curve],
    *,
    shown: int = 9,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> CurveDifference:
    """Compare two methods' trade-off curves over rates, replicate by replicate, by linear interpolation.

    No rate is chosen: the difference of the curves is averaged over the in-domain changes that both methods reach in
    every replicate. A curve is followed up to its best in-domain change.

    Args:
        first: its curves, one for each replicate.
        second: the other's, the same replicates in the same order.
        shown: how many places of the range get an interval of their own.
        confidence: as in `replicated`, as is `seed`.

    Raises:
        DataError: replicates that do not pair, or curves with no in-domain change in common.
    """
    if not first or [one.group for one in first] != [other.group for other in second]:
        raise DataError(f"curves do not pair: {len(first)} and {len(second)} replicates, or other groups")
    both = [*first, *second]
    ends = np.array([(x.min(), x.max()) for x in (_sample(one.in_domain)[: one.branch()] for one in both)])
    low, high = float(ends[:, 0].max()), float(ends[:, 1].min())
    if not low < high:
        raise DataError(
            "the curves have no in-domain change in common: by replicate the first reaches "
            f"{_ranges(ends[: len(first)])} % and the second {_ranges(ends[len(first) :])} %; "
            "add rates so that they overlap"
        )
    grid = np.linspace(low, high, PLACES)
    apart = np.array([_along(one, grid) - _along(other, grid) for one, other in zip(first, second, strict=True)])
    groups = [-1 - place if one.group is None else one.group for place, one in enumerate(first)]
    settings: dict[str, Any] = {"groups": groups, "confidence": confidence, "seed": seed}

    def interval(values: FloatArray) -> Interval:
        return replicated(values[:, 0] if values.shape[1] == 1 else values, **settings)

    places = np.linspace(0, PLACES - 1, shown).round().astype(int)
    points = tuple((float(grid[place]), interval(apart[:, place])) for place in places)
    left_out = tuple(
        tuple(sorted({rate for one in curves for rate in one.rates[one.branch() :]})) for curves in (first, second)
    )
    return CurveDifference(
        interval(apart.mean(axis=1)), low, high, points, len(set(groups)), (left_out[0], left_out[1])
    )


def _sample(figures: FloatArray) -> FloatArray:
    """The figures themselves, without their resamples."""
    return figures if figures.ndim == 1 else figures[:, 0]


def _ranges(ends: FloatArray) -> str:
    return ", ".join(f"[{low:.1f}, {high:.1f}]" for low, high in ends)


def _along(curve: Curve, grid: FloatArray) -> FloatArray:
    """Earlier domains at the in-domain changes of the grid, `(places, 1 + resamples)`; flat beyond the curve's ends."""
    kept = curve.branch()
    x, y = (np.atleast_2d(values.T).T[:kept] for values in (curve.in_domain, curve.earlier))
    order = np.argsort(x, axis=0, kind="stable")
    x, y = np.take_along_axis(x, order, axis=0), np.take_along_axis(y, order, axis=0)
    return np.stack([np.interp(grid, x[:, column], y[:, column]) for column in range(x.shape[1])], axis=1)
