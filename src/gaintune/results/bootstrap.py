"""Paired bootstrap over blocks, as plain arrays: resampled mean losses, and the figures computed from them.

Replicate 0 is always the sample itself, so one formula gives the value and its resamples. Everything is computed from
differences of the loss to the base in the same block: that is what pairs adapted with base, and, because the blocks of
a domain are drawn once for all rows, method with method.

A domain has few blocks, and percentiles of plain resamples would be too narrow, for two reasons. Resamples vary too
little, which is mended domain by domain (`unbiased`). And how much they vary is itself uncertain, which is Student's
t: of one sample's figures `widened` adds it, of means over several domains `averages` does, once for each figure.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri, stdtrit

FloatArray = NDArray[np.float64]

LARGEST_EXPONENT = (
    690.0  # exp(709) overflows; a model that far gone is hopeless at any number, but must not stop a report
)
CHUNK = 256  # replicates drawn at once: bounds memory, and is part of what a seed means

IN_DOMAIN = "in_domain"
BACKWARD_TRANSFER = "backward_transfer"
BACKWARD_TRANSFER_SINCE_LEARNT = "backward_transfer_since_learnt"
BELOW_DIAGONAL = "below_diagonal"
FORWARD_INTERFERENCE = "forward_interference"
FIGURES = (IN_DOMAIN, BACKWARD_TRANSFER, BACKWARD_TRANSFER_SINCE_LEARNT, BELOW_DIAGONAL, FORWARD_INTERFERENCE)


def percent(nats: FloatArray) -> FloatArray:
    """Change of perplexity in %, from the change of the mean loss in nats; 0 nats is exactly 0 %."""
    return 100.0 * np.expm1(np.minimum(nats, LARGEST_EXPONENT))


def t_quantile(confidence: float, replicates: int) -> float:
    """How many standard errors a two-sided interval over so few replicates reaches (Student's t)."""
    return float(stdtrit(replicates - 1, 0.5 + confidence / 2))


def stretched(replicates: FloatArray, factor: float) -> FloatArray:
    """Resamples, `(1 + samples, ...)`, moved away by a factor from the sample, replicate 0, which stays what it is."""
    return np.concatenate([replicates[:1], replicates[:1] + factor * (replicates[1:] - replicates[:1])])


def unbiased(replicates: FloatArray, items: int) -> FloatArray:
    """Resamples over few items with the spread of the mean's error: they vary too little by sqrt((n - 1) / n).

    One item has no resamples but NaN, and stays what it is.
    """
    return stretched(replicates, float(np.sqrt(items / (items - 1)))) if items > 1 else replicates


def widened(replicates: FloatArray, confidence: float, items: int) -> FloatArray:
    """Resamples of a figure over one sample of few items, so that their percentiles cover what is asked.

    They are made `unbiased`, and reach as far as Student's t where percentiles would reach as far as the normal's: for
    normal items, Student's interval. One item stays what it is.

    Args:
        replicates: `(1 + samples, ...)`, of which 0 is the sample itself and stays what it is.
        confidence: of the interval that will be made of them.
        items: what was resampled.
    """
    if items < 2:
        return replicates
    return stretched(unbiased(replicates, items), t_quantile(confidence, items) / float(ndtri(0.5 + confidence / 2)))


def replicate_means(
    rows: FloatArray,
    tokens: NDArray[np.int64],
    *,
    samples: int,
    seed: int,
    domain: str,
) -> FloatArray:
    """Token-weighted means of each row, over the blocks as they are and over blocks drawn with replacement.

    The draw depends on the seed, the domain's name and the number of blocks alone, so adding a method or a stage moves
    no other interval. One block cannot be resampled: its replicates are NaN.

    Args:
        rows: sums over each block, in nats, `(rows, blocks)`.
        tokens: scored tokens of each block, `(blocks,)`.
        samples: resamples to draw.
        seed: seed of the plan.
        domain: name of the domain, mixed into the seed.

    Returns:
        Nats per token, `(1 + samples, rows)`; replicate 0 is the sample itself. Plain resamples: whoever makes an
        interval of them widens them.
    """
    blocks = len(tokens)
    result = np.full((1 + samples, len(rows)), np.nan)
    result[0] = rows.sum(axis=1) / tokens.sum()
    if blocks < 2:
        return result
    generator = np.random.default_rng([seed, zlib.crc32(domain.encode())])
    for start in range(1, 1 + samples, CHUNK):
        drawn = generator.multinomial(blocks, np.full(blocks, 1.0 / blocks), size=min(CHUNK, 1 + samples - start))
        weights = drawn.astype(np.float64)
        # einsum without BLAS: the sums do not depend on the number of threads
        sums = np.einsum("rb,nb->rn", weights, rows)
        result[start : start + len(drawn)] = sums / np.einsum("rb,b->r", weights, tokens.astype(np.float64))[:, None]
    return result


def bounds(replicates: FloatArray, confidence: float) -> tuple[FloatArray, FloatArray]:
    """Percentile interval over axis 0, leaving replicate 0 (the sample) out; of resamples widened before."""
    tail = (1.0 - confidence) / 2.0
    # the method under which a further resample lies beyond an end as often as asked: with few resamples it matters
    low, high = np.quantile(replicates[1:], [tail, 1.0 - tail], axis=0, method="weibull")
    return low, high


def _parts(change: FloatArray, places: Sequence[tuple[int, int]]) -> FloatArray | None:
    """What each column adds to the mean over some (stage, column) cells; None where there is no cell."""
    if not places:
        return None
    parts = np.zeros((len(change), change.shape[2]))
    for stage, column in places:
        parts[:, column] += change[:, stage, column]
    return parts / len(places)


def earlier_and_later(learnt: Sequence[int], stage: int, columns: int) -> tuple[list[int], list[int]]:
    """Columns learnt before a stage, and columns not learnt up to and with it."""
    earlier = list(learnt[:stage])
    return earlier, [column for column in range(columns) if column not in learnt[: stage + 1]]


def summary_figures(nats: FloatArray, learnt: Sequence[int]) -> dict[str, FloatArray | None]:
    """The figures that sum up a sequence, for every replicate, as parts of the domains.

    Args:
        nats: change of the mean loss against the base, `(replicates, stages, domains)`.
        learnt: column of the domain learnt at each stage, `(stages,)`.

    Returns:
        For each of `FIGURES` what each domain adds to the mean of its cells, in %, `(replicates, domains)`: the sum
        over domains is the figure. None where a figure has no cell.
    """
    _, stages, columns = nats.shape
    if not stages:
        return dict.fromkeys(FIGURES)
    change = percent(nats)
    since_learnt = np.stack([percent(nats[:, -1] - nats[:, stage]) for stage in range(stages)], axis=1)
    below, above = [], []
    for stage in range(stages):
        earlier, later = earlier_and_later(learnt, stage, columns)
        below += [(stage, column) for column in earlier]
        above += [(stage, column) for column in later]
    steps = list(enumerate(learnt))
    return {
        IN_DOMAIN: _parts(change, steps),
        BACKWARD_TRANSFER: _parts(change, [(stages - 1, column) for column in learnt[:-1]]),
        BACKWARD_TRANSFER_SINCE_LEARNT: _parts(since_learnt, steps[:-1]),
        BELOW_DIAGONAL: _parts(change, below),
        FORWARD_INTERFERENCE: _parts(change, above),
    }


def stage_figures(nats: FloatArray, learnt: Sequence[int], stage: int) -> dict[str, FloatArray | None]:
    """In-domain change, and means over earlier and later domains, right after one stage, as `summary_figures`.

    `nats` are those of the stage alone, `(replicates, domains)`.
    """
    change = percent(nats[:, None])
    earlier, later = earlier_and_later(learnt, stage, nats.shape[1])
    return {
        "in_domain": _parts(change, [(0, learnt[stage])]),
        "earlier": _parts(change, [(0, column) for column in earlier]),
        "later": _parts(change, [(0, column) for column in later]),
    }
