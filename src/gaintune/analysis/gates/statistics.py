"""What gates did: histograms and moments put together over layers, and how far means lie apart.

Modules of one adapter are no sample of anything, so nothing is resampled over them: they are a fixed set, and what
another text would have given is asked of the rows. Rows of two domains are two samples, resampled each by itself; two
parts of the model are paired, since they saw the same rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd

from gaintune.analysis.positions import DEPTHS, ModulePosition
from gaintune.config import EvaluateConfig
from gaintune.errors import ConfigError
from gaintune.results import FloatArray, Interval, replicate_means, stretched, sum_interval, unbiased

BINS = 100
CLOSED, OPEN = 0.05, 0.5
"""A gate below `CLOSED` lets hardly anything of its part through; one above `OPEN` most of it. Both are bin edges."""
EDGES_EVERY = 20  # numbers of bins that have both edges are its multiples
EVERY = "all"
BLOCKS = ("attention", "mlp")


def check_bins(bins: int) -> None:
    """Refuse a number of bins of which 0.05 or 0.5 would not be an edge."""
    if bins < EDGES_EVERY or bins % EDGES_EVERY:
        raise ConfigError(f"bins is {bins}: give a multiple of {EDGES_EVERY}, so that {CLOSED} and {OPEN} are edges")


@dataclass(frozen=True)
class LayerGates:
    """What one layer's gates did on one domain.

    Attributes:
        position: where the layer sits.
        tokens: counted tokens.
        histogram: gate values of each rank part in equal bins of [0, 1], the last one closed, int64 `(rank, bins)`.
        total: sum of the values of each part, float64 `(rank,)`.
        squares: sum of their squares, float64 `(rank,)`.
        row_values: how many gate values each text row counted, int64 `(rows,)`.
        row_totals: sum of those values, float64 `(rows,)`.
    """

    position: ModulePosition
    tokens: int
    histogram: np.ndarray
    total: np.ndarray
    squares: np.ndarray
    row_values: np.ndarray
    row_totals: np.ndarray


def select(layers: tuple[LayerGates, ...], depth: str = EVERY, part: str = EVERY) -> list[LayerGates]:
    """The layers of one depth third, and of one block or projection; "all" stands for every one."""
    return [
        each
        for each in layers
        if depth in (EVERY, each.position.depth) and part in (EVERY, each.position.block, each.position.projection)
    ]


@dataclass(frozen=True)
class GateSummary:
    """Figures of some gate values: how many, mean, standard deviation, and the shares below 0.05 and from 0.5 up."""

    values: int
    mean: float
    deviation: float
    closed: float
    open: float
    histogram: np.ndarray


def summarise(layers: Iterable[LayerGates], part: int | None = None) -> GateSummary:
    """Put together the gate values of several layers, all rank parts or one of them; every value has equal weight.

    Raises:
        ValueError: nothing was counted.
    """
    chosen = slice(None) if part is None else slice(part, part + 1)
    histogram, total, squares = np.zeros(1, np.int64), 0.0, 0.0
    for each in layers:
        histogram = histogram + each.histogram[chosen].sum(axis=0)
        total += float(each.total[chosen].sum())
        squares += float(each.squares[chosen].sum())
    values = int(histogram.sum())
    if not values:
        raise ValueError("no gate value was counted")
    mean = total / values
    bins = len(histogram)
    closed, opened = histogram[: round(CLOSED * bins)].sum(), histogram[round(OPEN * bins) :].sum()
    deviation = float(np.sqrt(max(squares / values - mean**2, 0.0)))
    return GateSummary(values, mean, deviation, float(closed / values), float(opened / values), histogram)


@dataclass(frozen=True)
class GateRecord:
    """Everything recorded of one adapter: for each domain its layers, in the order of the model."""

    adapter: str
    domains: Mapping[str, tuple[LayerGates, ...]]


class Group(NamedTuple):
    """Gates of a domain: of one depth third or all, and of one block, one projection or all."""

    domain: str
    depth: str = EVERY
    part: str = EVERY


def apart(record: GateRecord, one: Group, other: Group, settings: EvaluateConfig) -> Interval:
    """Mean gate of one group less that of another; every gate value of a group has equal weight.

    Percentile bootstrap over rows of text: over each domain's own, or, within a domain, over the same rows for both.
    Widened for few rows, with the degrees of freedom of both domains' rows together (`averages`).

    Args:
        record: what was recorded.
        one: the group whose mean comes first.
        other: the group whose mean is taken away.
        settings: resamples, confidence and seed.

    Returns:
        The difference, between -1 and 1; without ends where a domain has one row, which cannot be resampled.

    Raises:
        ConfigError: a group without a gate in the record.
    """
    return Resampled(record, [one, other], settings).apart(one, other)


class Resampled:
    """Mean gates of groups over rows and over resampled rows: each domain's rows are drawn once for all its groups."""

    def __init__(self, record: GateRecord, groups: Sequence[Group], settings: EvaluateConfig) -> None:
        self._confidence = settings.confidence
        self._means: dict[Group, FloatArray] = {}
        self._rows: dict[str, int] = {}
        for domain in dict.fromkeys(group.domain for group in groups):
            own = [group for group in dict.fromkeys(groups) if group.domain == domain]
            totals, values = _rows(record, own)
            counted = values.any(axis=0)  # a row without a response has no token that counts
            sums = np.concatenate([totals[:, counted], values[:, counted]])
            rows = int(counted.sum())
            ones = np.ones(rows, np.int64)
            samples, seed = settings.bootstrap_samples, settings.seed
            drawn = replicate_means(sums, ones, samples=samples, seed=seed, domain=domain)
            total, weight = drawn[:, : len(own)], drawn[:, len(own) :]
            means = np.divide(total, weight, out=np.full_like(total, np.nan), where=weight > 0)
            self._means |= dict(zip(own, unbiased(means, rows).T, strict=True))
            self._rows[domain] = rows

    def apart(self, one: Group, other: Group) -> Interval:
        """The mean gate of one group less that of another."""
        first, second = self._means[one], -self._means[other]
        parts = np.stack([first, second], axis=1) if one.domain != other.domain else (first + second)[:, None]
        rows = [self._rows[name] for name in dict.fromkeys((one.domain, other.domain))]
        return sum_interval(lambda factor: stretched(parts, factor), rows, self._confidence)


def _rows(record: GateRecord, groups: Sequence[Group]) -> tuple[FloatArray, FloatArray]:
    """Sums of the gate values of each row, and how many there are, `(groups, rows)` each."""
    totals, values = [], []
    for group in groups:
        chosen = select(record.domains.get(group.domain, ()), group.depth, group.part)
        if not sum(int(each.row_values.sum()) for each in chosen):
            raise ConfigError(f"no gate was counted of {', '.join(group)}; domains: {', '.join(record.domains)}")
        totals.append(np.sum([each.row_totals for each in chosen], axis=0))
        values.append(np.sum([each.row_values for each in chosen], axis=0))
    return np.array(totals, np.float64), np.array(values, np.float64)


def comparisons(record: GateRecord) -> Iterator[tuple[Group, Group]]:
    """What is compared: every two domains, by depth and by part; and within a domain MLP and attention, and any two
    projections. In both directions."""
    for one, other in itertools.permutations(record.domains, 2):
        for depth, part in _cells(record.domains[one]):
            if select(record.domains[other], depth, part):
                yield Group(one, depth, part), Group(other, depth, part)
    for domain, layers in record.domains.items():
        blocks = [block for block in BLOCKS if select(layers, part=block)]
        for kinds in (blocks, _projections(layers)):
            for one, other in itertools.permutations(kinds, 2):
                yield Group(domain, part=one), Group(domain, part=other)


def _projections(layers: Sequence[LayerGates]) -> list[str]:
    return list(dict.fromkeys(each.position.projection for each in layers))


def _cells(layers: tuple[LayerGates, ...]) -> list[tuple[str, str]]:
    """Depth thirds and parts that are there, "all" included; projections over all depths alone."""
    cells = [(depth, block) for depth in (EVERY, *DEPTHS) for block in (EVERY, *BLOCKS)]
    cells += [(EVERY, projection) for projection in _projections(layers)]
    return [(depth, part) for depth, part in cells if select(layers, depth, part)]


def compared(record: GateRecord, settings: EvaluateConfig) -> dict[tuple[Group, Group], Interval]:
    """Every one of `comparisons`, as `apart` has it."""
    pairs = list(comparisons(record))
    resampled = Resampled(record, [group for pair in pairs for group in pair], settings)
    return {pair: resampled.apart(*pair) for pair in pairs}


def apart_table(differences: Mapping[tuple[Group, Group], Interval]) -> pd.DataFrame:
    """One row for each of `compared`: the two groups, and the mean gate of the first less that of the second."""
    columns = [f"{side}{name}" for side in ("", "less_") for name in Group._fields]
    rows = [[*one, *other, each.value, each.low, each.high] for (one, other), each in differences.items()]
    return pd.DataFrame(rows, columns=[*columns, "difference", "low", "high"])


def row_table(record: GateRecord) -> pd.DataFrame:
    """Mean gate of each row of text, by domain, depth third and projection; rows without a counted token left out."""
    rows = []
    for domain, layers in record.domains.items():
        for depth, projection in dict.fromkeys((each.position.depth, each.position.projection) for each in layers):
            totals, values = _rows(record, [Group(domain, depth, projection)])
            for row in np.flatnonzero(values[0]):
                rows.append([domain, int(row), depth, projection, int(values[0, row]), totals[0, row] / values[0, row]])
    return pd.DataFrame(rows, columns=["domain", "row", "depth", "projection", "values", "mean"])
