"""Intervals over paired items, shares of rows, repeated runs and trade-off curves, and verdicts on claims about them.

A run is repeated with other seeds and other orders of the domains. Each repetition is a replicate. Replicates differ
by an uncertainty that the text a run was measured on says nothing of. Figures of a replicate may bring block resamples
with them: column 0 is the sample itself, and column b of every replicate was drawn with the same blocks, so that both
kinds of uncertainty are in an interval.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy.special import ndtri, stdtrit

from gaintune.errors import DataError
from gaintune.results.bootstrap import FloatArray, bounds, replicate_means, t_quantile, widened
from gaintune.results.records import Interval

SAMPLES = 2000
CONFIDENCE = 0.95
EXACT_FLIPS = 14  # all 2 ** 14 choices of signs are computed; of more pairs a sample
GRID = 101  # points of the shared range at which curves are compared

Verdict = Literal["reproduced", "refuted", "undecided"]
Claim = tuple[float | None, float | None]


def paired_bootstrap(
    differences: Sequence[float] | FloatArray, *, samples: int = SAMPLES, confidence: float = CONFIDENCE, seed: int = 0
) -> Interval:
    """Return the mean of paired differences, such as adapted minus base on each item, with its bootstrap interval.

    Percentiles, widened for few items. Studentized resamples would do better for skewed differences, but where most are
    0, as those of right and wrong answers, resamples of equal items have no spread to be divided by. The tests measure
    how often the intervals cover: as often as the confidence says for 8 and 40 normal items and for 100 right and wrong
    answers. Few and very skewed items are covered less often.

    Args:
        differences: one for each item, `(items,)`, in any unit; the interval is in the same.
        samples, seed: resamples to draw, and their seed.
        confidence: share of such intervals that cover the true mean.

    Returns:
        The interval; without ends where there is one item, which cannot be resampled.

    Raises:
        DataError: no item, or one that is not finite.
    """
    values = _finite(differences, 1)
    items = len(values)
    ones = np.ones(items, dtype=np.int64)
    means = replicate_means(values[None], ones, samples=samples, seed=seed, domain="")[:, 0]
    if items < 2:
        return Interval(float(means[0]), None, None)
    low, high = bounds(widened(means, confidence, items), confidence)
    return Interval(float(means[0]), float(low), float(high))


def paired_shares(
    before: Sequence[float] | FloatArray, after: Sequence[float] | FloatArray, confidence: float = CONFIDENCE
) -> Interval:
    """Return the share of right answers after less before, with an interval that has a width even if no row flips.

    The adjusted Wald interval of Bonett and Price (Journal of Educational and Behavioral Statistics 37, 2012) adds one
    row that flips each way. Resamples of rows that hardly flip would hardly vary; here 60 rows of which none flips
    leave 4.5 points either way. In simulations of 20 to 400 rows of which 2 to 40 % flip, 95 % intervals covered 95 to
    98 % of the time.

    Args:
        before: 0 or 1 for each row, `(rows,)`.
        after: the same rows of the other model; `before` itself gives exactly 0, without width.
        confidence: share of such intervals that cover the true difference.

    Returns:
        The difference as a share of rows, its ends within -1 and 1; without ends where there is one row.

    Raises:
        DataError: no row, or one that is not finite.
    """
    first, second = _finite(before, 1), _finite(after, 1)
    rows, value = len(first), float((second - first).mean())
    if rows < 2:
        return Interval(value, None, None)
    if after is before:
        return Interval(value, value, value)
    up, down = ((float((sign * (second - first) > 0).sum()) + 1) / (rows + 2) for sign in (1, -1))
    middle = up - down
    reach = float(ndtri(0.5 + confidence / 2)) * float(np.sqrt((up + down - middle**2) / (rows + 2)))
    return Interval(value, max(-1.0, middle - reach), min(1.0, middle + reach))


def mean_of_independent(intervals: Sequence[Interval]) -> Interval:
    """Return the unweighted mean of figures measured on different items, with the interval that theirs imply.

    The distances from the values to the ends combine as standard errors do: the root of their squares' sum (method of
    variance estimates recovery: Zou and Donner, Statistics in Medicine 27, 2008). Intervals that do not lie evenly
    around their values keep that. A single figure keeps its interval. There are no ends where a figure has none.

    Raises:
        DataError: no figure.
    """
    values = [interval.value for interval in intervals]
    mean = float(_finite(values, 1).mean())
    below = [interval.value - interval.low for interval in intervals if interval.low is not None]
    above = [interval.high - interval.value for interval in intervals if interval.high is not None]
    if len(below) < len(values) or len(above) < len(values):
        return Interval(mean, None, None)
    return Interval(mean, mean - math.hypot(*below) / len(values), mean + math.hypot(*above) / len(values))


def difference_of_independent(first: Interval, second: Interval) -> Interval:
    """Return one figure less another that was measured on different items, with the interval that theirs imply.

    It is that of `mean_of_independent`. Of two figures that rise and fall together it is too wide.
    """
    flipped = Interval(-second.value, *(None if end is None else -end for end in (second.high, second.low)))
    mean = mean_of_independent([first, flipped])
    return Interval(*(None if end is None else 2 * end for end in (mean.value, mean.low, mean.high)))  # type: ignore[arg-type]


def replicated(
    values: Sequence[float] | FloatArray,
    *,
    groups: Sequence[int] | None = None,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Interval:
    """Return the mean over replicates with an interval that covers other replicates, and other blocks.

    The mean over replicates spreads as Student's t says, which is right for as few as two.

    Args:
        values: a figure of each replicate, `(replicates,)`; or with block resamples, `(replicates, 1 + resamples)`,
            column 0 the figure itself and column b of every row drawn with the same blocks. The caller widens them for
            few blocks (`changes.reach`); here they are widened for few replicates.
        groups: what each row belongs to, such as the order that a seed was run in: rows of one group are averaged
            first, and the groups are the replicates. Every row by itself unless given.
        confidence: share of such intervals that cover the true mean.
        seed: what pairs block resamples with draws of Student's t.

    Returns:
        The interval; without ends where there is one replicate, which says nothing of others.

    Raises:
        DataError: no replicate, or a figure that is not finite.
    """
    rows = np.asarray(values, dtype=np.float64)
    plain = rows.ndim == 1
    rows = _group_means(_finite(rows[:, None] if plain else rows, 2), groups)
    count = len(rows)
    value = float(rows[:, 0].mean())
    if count < 2:
        return Interval(value, None, None)
    largest = float(np.abs(rows[:, 0]).max()) or 1.0  # scaled: the squares of a broken model's changes would overflow
    error = largest * float((rows[:, 0] / largest).std(ddof=1)) / np.sqrt(count)
    if plain:
        reach = t_quantile(confidence, count) * error
        return Interval(value, value - float(reach), value + float(reach))
    # every quantile once, in random order: with few replicates the tails are long, and chance would move the ends
    levels = (np.random.default_rng(seed).permutation(rows.shape[1]) + 0.5) / rows.shape[1]
    low, high = bounds(rows.mean(axis=0) + error * stdtrit(count - 1, levels), confidence)
    return Interval(value, float(low), float(high))


def sign_flip_test(differences: Sequence[float] | FloatArray, *, samples: int = 20000, seed: int = 0) -> float:
    """Return the two-sided p-value that paired differences have mean 0, if they are symmetric around it.

    Compares the mean with the means under every choice of signs: exact up to 14 pairs, beyond that over a seeded
    sample of choices. With n pairs p cannot be below 2 / 2 ** n, so five pairs never reach 0.05.

    Raises:
        DataError: no difference, or one that is not finite.
    """
    values = _finite(differences, 1)
    every_choice = len(values) <= EXACT_FLIPS
    if every_choice:
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=len(values))))
    else:
        signs = np.random.default_rng(seed).choice((1.0, -1.0), size=(samples, len(values)))
    flipped = np.abs(np.einsum("fn,n->f", signs, values))
    observed = abs(float(values.sum()))
    as_large = int((flipped >= observed - 1e-12 * max(float(np.abs(values).sum()), 1e-300)).sum())
    itself = 0 if every_choice else 1  # the observed choice, which a sample need not contain
    return (as_large + itself) / (len(signs) + itself)


def _group_means(rows: FloatArray, groups: Sequence[int] | None) -> FloatArray:
    """Average the rows of each group, in the order in which the groups appear."""
    if groups is None:
        return rows
    if len(groups) != len(rows):
        raise DataError(f"{len(rows)} replicates, but a group for {len(groups)}")
    return np.array([rows[np.asarray(groups) == group].mean(axis=0) for group in dict.fromkeys(groups)])


def _finite(values: Sequence[float] | FloatArray, dimensions: int) -> FloatArray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != dimensions or not array.size:
        raise DataError(f"an interval needs at least one figure, got an array of shape {array.shape}")
    if not np.isfinite(array).all():
        raise DataError("an interval cannot be made of figures that are not finite")
    return array


def judge(interval: Interval | None, claim: Claim) -> Verdict:
    """Judge whether an interval bears out a claim about its value.

    Args:
        interval: what was measured; None or without ends decides nothing.
        claim: the values the claim allows: between `(low, high)`, both excluded, and None where there is no bound,
            such as `(None, 0.0)` for "below zero".

    Returns:
        `reproduced` where every value of the interval agrees, `refuted` where none does, `undecided` otherwise.
    """
    if interval is None or interval.low is None or interval.high is None:
        return "undecided"
    least, most = (-np.inf if claim[0] is None else claim[0]), (np.inf if claim[1] is None else claim[1])
    if least < interval.low and interval.high < most:
        return "reproduced"
    return "refuted" if interval.high <= least or most <= interval.low else "undecided"


def bare(value: float) -> Interval:
    """Return a number without an interval, which decides no claim."""
    return Interval(float(value), None, None)


def exact(value: float) -> Interval:
    """Return a number that was counted and not sampled, such as the smallest of an adapter's factors."""
    return Interval(float(value), float(value), float(value))


def in_percent(share: Interval) -> Interval:
    """Convert a share, or a difference of shares, to % (points of %)."""
    low, high = (None if end is None else 100.0 * end for end in (share.low, share.high))
    return Interval(100.0 * share.value, low, high)


def highest(intervals: Sequence[Interval]) -> Interval:
    """Return the largest number, with the largest ends, so that a claim about it is about all."""
    return _extreme(intervals, max)


def lowest(intervals: Sequence[Interval]) -> Interval:
    """Return the smallest number, with the smallest ends."""
    return _extreme(intervals, min)


def _extreme(intervals: Sequence[Interval], pick: Callable[[list[float]], float]) -> Interval:
    ends = [(one.low, one.high) for one in intervals if one.low is not None and one.high is not None]
    value = pick([one.value for one in intervals])
    if len(ends) < len(intervals):
        return bare(value)
    return Interval(value, pick([low for low, _ in ends]), pick([high for _, high in ends]))


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
