"""What gates did: where their layers sit in the model, and histograms and moments put together over layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from gaintune.analysis.places import Place
from gaintune.errors import ConfigError

BINS = 100
CLOSED, OPEN = 0.05, 0.5
"""A gate below `CLOSED` lets hardly anything of its part through; one above `OPEN` most of it. Both are bin edges."""
EDGES_EVERY = 20  # numbers of bins that have both edges are its multiples
EVERY = "all"


def check_bins(bins: int) -> None:
    """Refuse a number of bins of which 0.05 or 0.5 would not be an edge."""
    if bins < EDGES_EVERY or bins % EDGES_EVERY:
        raise ConfigError(f"bins is {bins}: give a multiple of {EDGES_EVERY}, so that {CLOSED} and {OPEN} are edges")


@dataclass(frozen=True)
class LayerGates:
    """What one layer's gates did on one domain.

    Attributes:
        place: where the layer sits.
        tokens: counted tokens.
        histogram: gate values of each rank part in equal bins of [0, 1], the last one closed, int64 `(rank, bins)`.
        total: sum of the values of each part, float64 `(rank,)`.
        squares: sum of their squares, float64 `(rank,)`.
        row_values: how many gate values each text row counted, int64 `(rows,)`.
        row_totals: sum of those values, float64 `(rows,)`.
    """

    place: Place
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
        if depth in (EVERY, each.place.depth) and part in (EVERY, each.place.block, each.place.projection)
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
