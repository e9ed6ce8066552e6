"""Change of perplexity between models on the same blocks, with paired bootstrap intervals, alone and averaged.

Intervals are widened for few blocks, once for each figure: those of means by the degrees of freedom of all domains
together (`averages`). In simulations of normal blocks 95 % intervals covered 93 % (2 blocks) to 95 % (8) for one
domain, 94 to 95 % for means over eight domains of 2, 4 or 8 blocks that vary alike, and 91 % (2 blocks) to 95 % (8)
where each varies half as much as the one before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from gaintune.config import EvaluateConfig
from gaintune.results.averages import interval_of, reach, sum_interval
from gaintune.results.bootstrap import FloatArray, percent, replicate_means, stretched, unbiased
from gaintune.results.records import Interval


class BlockLosses(Protocol):
    """Sums of nats and scored tokens of the blocks of one domain, such as a `DomainLoss`."""

    @property
    def nll(self) -> Sequence[float]: ...

    @property
    def tokens(self) -> Sequence[int]: ...


@dataclass(frozen=True, eq=False)
class Change:
    """How the mean loss of one domain changed, over its blocks as they are and over blocks drawn with replacement.

    Attributes:
        domain: whose blocks were drawn; changes of one domain were drawn with the same blocks.
        blocks: how many it has.
        nats: nats per token, `(1 + resamples,)`, 0 the change itself; resamples of a single block are NaN.
    """

    domain: str
    blocks: int
    nats: FloatArray


def changes_of(base: BlockLosses, others: Sequence[BlockLosses], domain: str, settings: EvaluateConfig) -> list[Change]:
    """The changes from one model to others on the same blocks.

    Args:
        base: losses of one model, block by block.
        others: losses of other models on the same blocks.
        domain: name of the domain, which decides the blocks drawn together with the seed.
        settings: resamples and seed.
    """
    assert all(tuple(each.tokens) == tuple(base.tokens) for each in others), "the same blocks"
    nats = replicate_means(
        np.array([np.subtract(each.nll, base.nll) for each in others]),
        np.array(base.tokens),
        samples=settings.bootstrap_samples,
        seed=settings.seed,
        domain=domain,
    )
    return [Change(domain, len(base.tokens), row) for row in unbiased(nats, len(base.tokens)).T]


def mean_change(changes: Sequence[Change], settings: EvaluateConfig, *, less: Sequence[Change] = ()) -> Interval:
    """Mean of changes of perplexity, 100 * (after / before - 1) in %, less the mean of others where they are given."""
    every, blocks = _domains([*changes, *less])

    def parts(factor: float) -> FloatArray:
        found = _parts(changes, every, factor)
        return found - _parts(less, every, factor) if less else found

    return sum_interval(parts, blocks, settings.confidence)


def share_of_change(changes: Sequence[Change], whole: Sequence[Change], settings: EvaluateConfig) -> Interval:
    """Mean of changes of perplexity in % of the mean of others, which must not be 0."""
    every, blocks = _domains([*changes, *whole])
    one, other = _parts(changes, every, 1.0), _parts(whole, every, 1.0)
    # a ratio is no sum of parts; near the sample it moves as this sum does
    moved = one - one[0].sum() / other[0].sum() * other
    factor = reach(moved, blocks, settings.confidence)
    one, other = (_parts(each, every, factor).sum(axis=1) for each in (changes, whole))
    return interval_of(100.0 * (one / other), settings.confidence)


def _domains(changes: Sequence[Change]) -> tuple[list[str], list[int]]:
    blocks = {change.domain: change.blocks for change in changes}
    return list(blocks), list(blocks.values())


def _parts(changes: Sequence[Change], domains: Sequence[str], factor: float) -> FloatArray:
    """What each domain adds to the mean, in %, `(1 + resamples, domains)`."""
    parts = np.zeros((len(changes[0].nats), len(domains)))
    for change in changes:
        parts[:, domains.index(change.domain)] += percent(stretched(change.nats, factor))
    return parts / len(changes)


def paired_change(before: BlockLosses, after: BlockLosses, domain: str, settings: EvaluateConfig) -> Interval:
    """The change in % of one domain from one model to another, with its interval."""
    return mean_change(changes_of(before, [after], domain, settings), settings)
