"""Statistics of everything measured: paired intervals, replicates, curves over rates, and verdicts on claims."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from gaintune.results.curves import Curve, CurveDifference, curve_difference
from gaintune.results.intervals import mean_of_independent, paired_bootstrap, paired_shares, replicated, sign_flip_test
from gaintune.results.records import Interval

__all__ = [
    "Claim",
    "Curve",
    "CurveDifference",
    "Interval",
    "Verdict",
    "bare",
    "curve_difference",
    "exact",
    "highest",
    "judge",
    "lowest",
    "mean_of_independent",
    "paired_bootstrap",
    "paired_shares",
    "replicated",
    "sign_flip_test",
]

Verdict = Literal["reproduced", "refuted", "undecided"]
Claim = tuple[float | None, float | None]


def judge(interval: Interval | None, claim: Claim) -> Verdict:
    """Whether an interval bears out a claim about its value.

    Args:
        interval: what was measured; None or without ends decides nothing.
        claim: the values the claim allows: between `(low, high)`, both left out, and None where there is no bound,
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


def highest(intervals: Sequence[Interval]) -> Interval:
    """Return the largest number, with the largest ends, so that a claim about it is about all."""
    return _extreme(intervals, max)


def lowest(intervals: Sequence[Interval]) -> Interval:
    """Return the smallest number, with the smallest ends."""
    return _extreme(intervals, min)


def _extreme(intervals: Sequence[Interval], pick: Callable[[list[float]], float]) -> Interval:
    value = pick([each.value for each in intervals])
    ends = [(each.low, each.high) for each in intervals if each.low is not None and each.high is not None]
    if len(ends) < len(intervals):
        return Interval(value, None, None)
    return Interval(value, pick([low for low, _ in ends]), pick([high for _, high in ends]))
