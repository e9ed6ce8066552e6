"""Intervals of means over several domains, each of which has few blocks.

A figure such as a mean over domains is a sum of parts, one for each domain: what that domain's cells put in. Domains
are drawn independently of one another, so the variance of the figure is the sum of its parts', and how sure that
variance is decides how far an interval reaches: Student's t with Welch's degrees of freedom (Biometrika 34, 1947)

    (sum of v)^2 / sum of v^2 / (n + 1) - 2        for parts of variance v from n blocks.

That is n - 1 for one domain. Satterthwaite's formula, with n - 1 in place of n + 1 and nothing taken off, has too few
for domains of two blocks, since squares of uncertain variances are too large: 98 % intervals where 95 are asked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy.special import ndtri, stdtrit

from gaintune.results.bootstrap import FloatArray, bounds
from gaintune.results.records import Interval


def reach(parts: FloatArray, blocks: Sequence[int], confidence: float) -> float:
    """What a figure's resamples are stretched by, so that their percentiles reach as far as Student's t.

    Args:
        parts: what each domain adds to the figure, `(1 + samples, domains)`, of resamples as `unbiased` has them;
            several cells of one domain, which share its blocks, are one part.
        blocks: how many blocks each domain has, `(domains,)`.
        confidence: of the interval.

    Returns:
        Student's quantile over the normal's: 1 or more; NaN where a domain that counts has one block.
    """
    deviations = parts[1:] - parts[:1]
    if np.isnan(deviations).any():
        return float("nan")
    largest = np.abs(deviations).max(initial=0.0)
    if not largest:
        return 1.0
    shares = np.var(deviations / largest, axis=0)  # scaled: squares of a hopeless model's changes would overflow
    varying = shares > 0
    freedom = shares.sum() ** 2 / (shares[varying] ** 2 / (np.asarray(blocks)[varying] + 1)).sum() - 2.0
    level = 0.5 + confidence / 2
    return float(stdtrit(freedom, level) / ndtri(level))


def interval_of(replicates: FloatArray, confidence: float) -> Interval:
    """The value in column 0 and the interval of the resamples behind it; without ends where a resample is NaN."""
    if np.isnan(replicates[1:]).any():
        return Interval(float(replicates[0]), None, None)
    low, high = bounds(replicates, confidence)
    return Interval(float(replicates[0]), float(low), float(high))


def sum_interval(parts: Callable[[float], FloatArray], blocks: Sequence[int], confidence: float) -> Interval:
    """The interval of a figure.

    Args:
        parts: the parts of the figure, as in `reach`, from resamples `stretched` by a factor: in nats where its cells
            are changes of perplexity, so that no end is less than nothing.
        blocks: how many blocks each domain has, `(domains,)`.
        confidence: of the interval.
    """
    return interval_of(parts(reach(parts(1.0), blocks, confidence)).sum(axis=1), confidence)


def sum_intervals(
    figures: Callable[[float], Mapping[str, FloatArray | None]], blocks: Sequence[int], confidence: float
) -> dict[str, Interval | None]:
    """The same of several figures, named, that are computed together; None stays None."""
    found: dict[str, Interval | None] = {}
    for name, parts in figures(1.0).items():
        if parts is None:
            found[name] = None
            continue
        wide = figures(reach(parts, blocks, confidence))[name]
        assert wide is not None
        found[name] = interval_of(wide.sum(axis=1), confidence)
    return found
