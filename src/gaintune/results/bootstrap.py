"""Paired bootstrap over blocks, as plain arrays: resampled mean losses, and the figures computed from them.

Replicate 0 is always the sample itself, so one formula gives the value and its resamples. Everything is computed from
differences of the loss to the base in the same block. That pairs an adapted model with its base and, because the blocks
of a domain are drawn once for all rows, a method with another.

A domain has few blocks, so percentiles of plain resamples are too narrow, for two reasons. Resamples vary too little,
which `unbiased` corrects in each domain. And their spread is itself uncertain, which Student's t accounts for:
`widened` adds it to figures over one sample, `changes.reach` to means over several domains.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri, stdtrit

FloatArray = NDArray[np.float64]

LARGEST_EXPONENT = 690.0  # exp(709) overflows; a model with such a loss is useless, but must not stop a report
CHUNK = 256  # replicates drawn at once: bounds memory, and is part of what a seed means

IN_DOMAIN = "in_domain"
BACKWARD_TRANSFER = "backward_transfer"
BACKWARD_TRANSFER_SINCE_LEARNT = "backward_transfer_since_learnt"
BELOW_DIAGONAL = "below_diagonal"
FORWARD_INTERFERENCE = "forward_interference"
FIGURES = (IN_DOMAIN, BACKWARD_TRANSFER, BACKWARD_TRANSFER_SINCE_LEARNT, BELOW_DIAGONAL, FORWARD_INTERFERENCE)


def percent(nats: FloatArray) -> FloatArray:
    """Convert a change of the mean loss in nats to the change of perplexity in %; 0 nats is exactly 0 %."""
    return 100.0 * np.expm1(np.minimum(nats, LARGEST_EXPONENT))


def t_quantile(confidence: float, replicates: int) -> float:
    """Return how many standard errors a two-sided interval over so few replicates reaches (Student's t)."""
    return float(stdtrit(replicates - 1, 0.5 + confidence / 2))


def stretched(replicates: FloatArray, factor: float) -> FloatArray:
    """Move resamples, `(1 + samples, ...)`, away from the sample (replicate 0) by a factor."""
    return np.concatenate([replicates[:1], replicates[:1] + factor * (replicates[1:] - replicates[:1])])


def unbiased(replicates: FloatArray, items: int) -> FloatArray:
    """Give resamples over few items the spread of the mean's error: they vary too little by sqrt((n - 1) / n).

    The resamples of a single item are NaN and stay so.
    """
    return stretched(replicates, float(np.sqrt(items / (items - 1)))) if items > 1 else replicates


def widened(replicates: FloatArray, confidence: float, items: int) -> FloatArray:
    """Widen resamples of a figure over one sample of few items, so that their percentiles cover the confidence.

    They become `unbiased` and reach as far as Student's t instead of the normal distribution: Student's interval for
    normal items. The resamples of a single item stay as they are.

    `replicates` are `(1 + samples, ...)`, of which 0 is the sample itself and does not move.
    """
    if items < 2:
        return replicates
    return stretched(unbiased(replicates, items), t_quantile(confidence, items) / float(ndtri(0.5 + confidence / 2)))


def replicate_means(rows: FloatArray, tokens: NDArray[np.int64], *, samples: int, seed: int, domain: str) -> FloatArray:
    """Average each row over the blocks, weighted by tokens: as they are, and drawn with replacement.

    The draw depends on the seed, the domain's name and the number of blocks alone, so adding a method or a stage moves
    no other interval. One block cannot be resampled: its replicates are NaN.

    Args:
        rows: sums over each block, in nats, `(rows, blocks)`.
        tokens: scored tokens of each block, `(blocks,)`.
        samples, seed: resamples to draw, and the plan's seed.
        domain: name of the domain, mixed into the seed.

    Returns:
        Nats per token, `(1 + samples, rows)`; replicate 0 is the sample itself. The resamples are not widened yet.
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
    """Return the percentile interval of widened resamples over axis 0, without replicate 0 (the sample)."""
    tail = (1.0 - confidence) / 2.0
    # with this method a further resample lies beyond an end as often as the confidence says, also for few resamples
    low, high = np.quantile(replicates[1:], [tail, 1.0 - tail], axis=0, method="weibull")
    return low, high


def _parts(change: FloatArray, cells: Sequence[tuple[int, int]]) -> FloatArray | None:
    """Return what each column adds to the mean over some (stage, column) cells; None where there is no cell."""
    if not cells:
        return None
    parts = np.zeros((len(change), change.shape[2]))
    for stage, column in cells:
        parts[:, column] += change[:, stage, column]
    return parts / len(cells)


def _earlier_and_later(trained: Sequence[int], stage: int, columns: int) -> tuple[list[int], list[int]]:
    """Return the columns trained before a stage, and those not trained up to and with it."""
    return list(trained[:stage]), [column for column in range(columns) if column not in trained[: stage + 1]]


def summary_figures(nats: FloatArray, trained: Sequence[int]) -> dict[str, FloatArray | None]:
    """Return the figures that sum up a sequence, for every replicate, as parts of the domains.

    Args:
        nats: change of the mean loss against the base, `(replicates, stages, domains)`.
        trained: column of the domain trained at each stage, `(stages,)`.

    Returns:
        For each of `FIGURES` what each domain adds to the mean of its cells, in %, `(replicates, domains)`: the sum
        over domains is the figure. None where a figure has no cell.
    """
    _, stages, columns = nats.shape
    if not stages:
        return dict.fromkeys(FIGURES)
    change = percent(nats)
    since_trained = np.stack([percent(nats[:, -1] - nats[:, stage]) for stage in range(stages)], axis=1)
    below, above = [], []
    for stage in range(stages):
        earlier, later = _earlier_and_later(trained, stage, columns)
        below += [(stage, column) for column in earlier]
        above += [(stage, column) for column in later]
    diagonal = list(enumerate(trained))
    return {
        IN_DOMAIN: _parts(change, diagonal),
        BACKWARD_TRANSFER: _parts(change, [(stages - 1, column) for column in trained[:-1]]),
        BACKWARD_TRANSFER_SINCE_LEARNT: _parts(since_trained, diagonal[:-1]),
        BELOW_DIAGONAL: _parts(change, below),
        FORWARD_INTERFERENCE: _parts(change, above),
    }


def stage_figures(nats: FloatArray, trained: Sequence[int], stage: int) -> dict[str, FloatArray | None]:
    """Return the in-domain change and the means over earlier and later domains right after a stage.

    `nats` are those of the stage alone, `(replicates, domains)`; the parts are those of `summary_figures`.
    """
    change = percent(nats[:, None])
    earlier, later = _earlier_and_later(trained, stage, nats.shape[1])
    columns = {"in_domain": [trained[stage]], "earlier": earlier, "later": later}
    return {name: _parts(change, [(0, column) for column in chosen]) for name, chosen in columns.items()}
