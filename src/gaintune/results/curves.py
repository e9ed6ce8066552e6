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

GRID = 101  # points of the shared range at which curves are compared


@dataclass(frozen=True)
class Curve:
    """A method's trade-off in one replicate: a point for each rate, all in %.

    Attributes:
        rates: learning rates, rising, `(rates,)`.
        in_domain: change on each domain right after its stage, `(rates,)` or `(rates, 1 + resamples)`.
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
        if any(rate >= following for rate, following in itertools.pairwise(self.rates)):
            raise DataError(f"a curve's rates must rise, got {', '.join(f'{rate:g}' for rate in self.rates)}")

    @property
    def sample(self) -> FloatArray:
        """In-domain changes without their resamples, `(rates,)`."""
        return self.in_domain if self.in_domain.ndim == 1 else self.in_domain[:, 0]

    def branch(self) -> int:
        """Count the rates up to the best in-domain change: beyond it a higher rate adapts less."""
        return int(np.argmin(self.sample)) + 1


@dataclass(frozen=True)
class CurveDifference:
    """Earlier domains of one method minus another's at equal in-domain change, averaged over the range both reach.

    Attributes:
        difference: in points of %; negative where the first keeps more.
        low: the range's strongest in-domain change, in %.
        high: its weakest.
        points: in-domain changes in the range, with the difference there.
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
    first: Sequence[Curve], second: Sequence[Curve], *, shown: int = 9, confidence: float = CONFIDENCE, seed: int = 0
) -> CurveDifference:
    """Compare two methods' trade-off curves over rates, replicate by replicate, by linear interpolation.

    No rate is chosen: the difference of the curves is averaged over the in-domain changes that both methods reach in
    every replicate. A curve is followed up to its best in-domain change.

    Args:
        first: the first method's curves, one for each replicate.
        second: the other's, the same replicates in the same order.
        shown: how many points of the range get an interval of their own.
        confidence: as in `replicated`, as is `seed`.

    Raises:
        DataError: replicates that do not pair, or curves with no in-domain change in common.
    """
    if not first or [curve.group for curve in first] != [curve.group for curve in second]:
        raise DataError(f"curves do not pair: {len(first)} and {len(second)} replicates, or other groups")
    reached = [curve.sample[: curve.branch()] for curve in (*first, *second)]
    ends = np.array([(changes.min(), changes.max()) for changes in reached])
    low, high = float(ends[:, 0].max()), float(ends[:, 1].min())
    if not low < high:
        ranges = [f"[{least:.1f}, {most:.1f}]" for least, most in ends]
        raise DataError(
            "the curves have no in-domain change in common: by replicate the first reaches "
            f"{', '.join(ranges[: len(first)])} % and the second {', '.join(ranges[len(first) :])} %; "
            "add rates so that they overlap"
        )
    grid = np.linspace(low, high, GRID)
    apart = np.array([_along(one, grid) - _along(other, grid) for one, other in zip(first, second, strict=True)])
    groups = [-1 - number if curve.group is None else curve.group for number, curve in enumerate(first)]
    settings: dict[str, Any] = {"groups": groups, "confidence": confidence, "seed": seed}

    def interval(values: FloatArray) -> Interval:
        return replicated(values[:, 0] if values.shape[1] == 1 else values, **settings)

    indices = np.linspace(0, GRID - 1, shown).round().astype(int)
    points = tuple((float(grid[index]), interval(apart[:, index])) for index in indices)
    beyond = [{rate for curve in curves for rate in curve.rates[curve.branch() :]} for curves in (first, second)]
    left_out = (tuple(sorted(beyond[0])), tuple(sorted(beyond[1])))
    return CurveDifference(interval(apart.mean(axis=1)), low, high, points, len(set(groups)), left_out)


def _along(curve: Curve, grid: FloatArray) -> FloatArray:
    """Return earlier domains at the grid's in-domain changes, `(points, 1 + resamples)`; flat beyond the curve."""
    kept = curve.branch()
    x, y = (np.atleast_2d(values.T).T[:kept] for values in (curve.in_domain, curve.earlier))
    order = np.argsort(x, axis=0, kind="stable")
    x, y = np.take_along_axis(x, order, axis=0), np.take_along_axis(y, order, axis=0)
    return np.stack([np.interp(grid, x[:, column], y[:, column]) for column in range(x.shape[1])], axis=1)
