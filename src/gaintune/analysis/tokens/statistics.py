"""Figures of the changes of single tokens' losses: distribution, mean, skew and coherence, as plain arrays.

GAIN paper, section 5.1 and figure 1: on a domain that was not learnt, GAIN's changes are said to be small and symmetric
around zero, so that they cancel in the mean, and LoRA's to be coherent. Coherence here is |mean| / mean |.| of the
changes: 0 where gains and losses cancel, 1 where every token moves the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gaintune.errors import ConfigError, DataError
from gaintune.results import FloatArray, Interval, bounds, replicate_means, widened

BINS = 101
"""Bins of a histogram: odd, so that one is centred on zero."""
WITHIN = 0.995  # share of the changes that the histogram's inner bins cover unless told otherwise
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


@dataclass(frozen=True)
class TokenChanges:
    """Changes of the loss, adapted minus base, of the scored tokens of one domain, in nats: negative is better.

    Attributes:
        tokens: scored tokens.
        blocks: rows they lie in.
        mean: mean over tokens, with a bootstrap interval over blocks.
        mean_absolute: mean size of a change.
        deviation: standard deviation over tokens.
        skew: third standardized moment (population); 0 for a symmetric distribution, None where nothing changes.
        coherence: |mean| / mean |.|, with an interval from the same resamples that reaches 0 where the sign of the mean
            is in doubt; None where nothing changes.
        better: share of tokens whose loss fell.
        worse: share of tokens whose loss rose.
        quantiles: of the changes, at `QUANTILES`.
        histogram: tokens in equal bins between `-limit` and `limit`; the outermost hold all beyond as well.
        limit: nats at which the histogram's range ends.
    """

    tokens: int
    blocks: int
    mean: Interval
    mean_absolute: float
    deviation: float
    skew: float | None
    coherence: Interval | None
    better: float
    worse: float
    quantiles: tuple[float, ...]
    histogram: tuple[int, ...]
    limit: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def summarise_changes(
    changes: FloatArray,
    scored: NDArray[np.bool_],
    *,
    limit: float,
    bins: int = BINS,
    samples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
    domain: str = "",
) -> TokenChanges:
    """Put changes of the loss into figures.

    Args:
        changes: adapted minus base, `(rows, tokens)` in nats.
        scored: which of them count, `(rows, tokens)`; one in each row at least.
        limit: nats at which the histogram's range ends.
        bins: bins of the histogram, an odd number.
        samples: bootstrap resamples of rows.
        confidence: coverage of the intervals.
        seed: seed of the resampling.
        domain: name that is mixed into the seed, so that adapters on one domain are resampled alike.

    Raises:
        ConfigError: an even number of bins, or a limit that is not above 0.
        DataError: a row without a scored token, or changes that are not finite.
    """
    check_histogram(bins, limit)
    values = np.asarray(changes, np.float64)
    if values.shape != scored.shape or values.ndim != 2 or not scored.any(axis=1).all():
        raise DataError("changes of tokens need a mask of their shape (rows, tokens), and a scored token in each row")
    kept = values[scored]
    if not np.isfinite(kept).all():
        raise DataError("a token's loss is not finite: the model is broken")
    size = np.abs(kept)
    sums = np.where(scored, values, 0.0).sum(axis=1)
    sizes = np.where(scored, np.abs(values), 0.0).sum(axis=1)
    counts = scored.sum(axis=1).astype(np.int64)
    means = replicate_means(np.stack([sums, sizes]), counts, samples=samples, seed=seed, domain=domain)
    changed = bool(size.any())
    deviation = float(kept.std())
    centred = kept - kept.mean()
    total, absolute = means[:, :1], means[:, 1:]
    ratios = np.divide(total, absolute, out=np.zeros_like(total), where=absolute > 0) if changed else None
    return TokenChanges(
        tokens=len(kept),
        blocks=len(counts),
        mean=_interval(means[:, :1], len(counts), confidence),
        mean_absolute=float(size.mean()),
        deviation=deviation,
        skew=float((centred**3).mean() / deviation**3) if deviation > 0 else None,
        coherence=None if ratios is None else _size(_interval(ratios, len(counts), confidence)),
        better=float((kept < 0).mean()),
        worse=float((kept > 0).mean()),
        quantiles=tuple(np.quantile(kept, QUANTILES).tolist()),
        histogram=tuple(_histogram(kept, bins, limit)),
        limit=limit,
    )


def check_histogram(bins: int, limit: float | None) -> None:
    """Refuse an even number of bins, of which none would be centred on zero, and a range that is none."""
    if bins < 3 or bins % 2 == 0:
        raise ConfigError(f"bins is {bins}: give an odd number from 3 up, so that one bin is centred on zero")
    if limit is not None and not 0 < limit < float("inf"):
        raise ConfigError(f"limit is {limit}: the histogram's range in nats must be above 0")


def _interval(replicates: FloatArray, blocks: int, confidence: float) -> Interval:
    """The sample's figure with its bootstrap interval; no ends where one block leaves nothing to resample."""
    value = float(replicates[0, 0])
    if blocks < 2:
        return Interval(value, None, None)
    low, high = bounds(widened(replicates, confidence, blocks), confidence)
    return Interval(value, float(low[0]), float(high[0]))


def _size(signed: Interval) -> Interval:
    """The interval of a figure's size: it reaches down to 0 where the sign is in doubt, as resampled sizes never do."""
    if signed.low is None or signed.high is None:
        return Interval(abs(signed.value), None, None)
    low = 0.0 if signed.sign == 0 else min(abs(signed.low), abs(signed.high))
    return Interval(abs(signed.value), low, min(max(abs(signed.low), abs(signed.high)), 1.0))


def _histogram(values: FloatArray, bins: int, limit: float) -> list[int]:
    places = np.floor((values + limit) * (bins / (2 * limit))).clip(0, bins - 1).astype(np.int64)
    return np.bincount(places, minlength=bins).tolist()


def range_of(changes: Sequence[FloatArray]) -> float:
    """Nats within which 99.5 % of every adapter's changes lie, `(tokens,)` each; 1 where nothing changes."""
    return max(float(np.quantile(np.abs(each), WITHIN)) for each in changes) or 1.0
