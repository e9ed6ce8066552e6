"""Statistics of everything measured: paired intervals, replicates, curves over rates, and verdicts on claims."""

from __future__ import annotations

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
    "curve_difference",
    "judge",
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
