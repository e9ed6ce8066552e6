"""Losses at places along one direction from the pretrained model, or on the plane of two, and what they say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from gaintune.analysis.landscape.directions import WAYS, Geometry, Way
from gaintune.config import EvaluateConfig
from gaintune.results import (
    DomainLoss,
    FloatArray,
    Interval,
    bounds,
    interval_of,
    paired_change,
    replicate_means,
    widened,
)


@dataclass(frozen=True)
class Point:
    """Losses on every domain at one place; 0 in all coordinates is the pretrained model, 1 an adapted one."""

    place: tuple[float, ...]
    losses: Mapping[str, DomainLoss]


@dataclass(frozen=True)
class DomainFigures:
    """What a line or a plane says of one domain.

    Attributes:
        at_adapted: change of perplexity at the adapted model in %; on a plane, at each of the two, then at their sum.
        best: where between pretrained and adapted (0 to 1 in every coordinate) the loss is lowest.
        best_change: the change of perplexity there.
        range: highest less lowest loss in nats a token (log perplexity) between pretrained and adapted.
        barrier: how far, on a line, the loss rises above the straight line between its ends; None on a plane.
    Their intervals are a bootstrap over blocks, widened for few blocks; see `largest`.
    """

    at_adapted: tuple[Interval, ...]
    best: tuple[float, ...]
    best_change: Interval
    range: Interval
    barrier: Interval | None


@dataclass(frozen=True)
class Surface:
    """Losses along one direction (a line) or two (a plane).

    Attributes:
        labels: what its adapters are called.
        way: how the model was moved; see `WAYS`.
        numbers: what the model computed in, such as bfloat16.
        geometry: lengths of the directions and the angle between them.
        points: what was measured, in the order of their coordinates.
        settings: what the intervals are made with.
    """

    labels: tuple[str, ...]
    way: Way
    numbers: str
    geometry: Geometry
    points: tuple[Point, ...]
    settings: EvaluateConfig

    @property
    def domains(self) -> tuple[str, ...]:
        """The domains measured."""
        return tuple(self.points[0].losses)

    def at(self, *place: float) -> Point:
        """What was measured at a place; KeyError where nothing was."""
        return {point.place: point for point in self.points}[tuple(map(float, place))]

    def change(self, point: Point, domain: str) -> Interval:
        """Change of perplexity against the pretrained model in %, paired block by block."""
        origin = self.at(*[0.0] * len(self.labels))
        return paired_change(origin.losses[domain], point.losses[domain], domain, self.settings)

    def figures(self, domain: str) -> DomainFigures:
        """The figures of one domain."""
        ends = [(1.0,)] if len(self.labels) == 1 else [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)]
        between = self._between()
        best = min(between, key=lambda point: point.losses[domain].nats_per_token)
        losses = self.losses_between(domain)
        barrier = None
        if len(self.labels) == 1:
            along = np.array([point.place[0] for point in between])
            # from 0 to 1 in order, so that the first and the last are the ends
            chord = losses[:, :1] + along * (losses[:, -1:] - losses[:, :1])
            barrier = largest(losses - chord, self.settings)
        return DomainFigures(
            at_adapted=tuple(self.change(self.at(*end), domain) for end in ends),
            best=best.place,
            best_change=self.change(best, domain),
            range=largest((losses[:, :, None] - losses[:, None]).reshape(len(losses), -1), self.settings),
            barrier=barrier,
        )

    def _between(self) -> list[Point]:
        return [point for point in self.points if all(0.0 <= t <= 1.0 for t in point.place)]

    def losses_between(self, domain: str) -> FloatArray:
        """Nats a token above the pretrained model's between it and the adapted ones, `(1 + resamples, places)`.

        The first row is what was measured; the others are resamples of blocks, the same on all surfaces.
        """
        origin = self.at(*[0.0] * len(self.labels)).losses[domain]
        nats = replicate_means(
            np.array([np.subtract(point.losses[domain].nll, origin.nll) for point in self._between()]),
            np.array(origin.tokens),
            samples=self.settings.bootstrap_samples,
            seed=self.settings.seed,
            domain=domain,
        )
        return widened(nats, self.settings.confidence, len(origin.tokens))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        points = [
            {
                "place": list(point.place),
                "domains": {
                    domain: {
                        "nats_per_token": loss.nats_per_token,
                        "perplexity": loss.perplexity,
                        "change": asdict(self.change(point, domain)),
                    }
                    for domain, loss in point.losses.items()
                },
            }
            for point in self.points
        ]
        return {
            "adapters": list(self.labels),
            "interpolated": WAYS[self.way],
            "numbers": self.numbers,
            "geometry": asdict(self.geometry),
            "figures": {domain: asdict(self.figures(domain)) for domain in self.domains},
            "points": points,
        }


def range_apart(one: Surface, other: Surface, domain: str) -> Interval:
    """How much wider one surface's range of a domain's loss is than another's, in nats a token, paired by blocks.

    A range takes up noise, so the value leans to the surface that varies more from block to block. Its interval holds
    two: that of the ranges between the places where each surface is highest and lowest as measured, and the basic
    bootstrap's of ranges between places that are sought anew in every resample.
    """
    assert one.settings == other.settings, "surfaces of one call have one plan"
    between, anew = [], []
    for surface in (one, other):
        losses = surface.losses_between(domain)
        between.append(losses[:, losses[0].argmax()] - losses[:, losses[0].argmin()])
        anew.append(np.ptp(losses, axis=1))
    fixed = interval_of(between[0] - between[1], one.settings.confidence)
    sought = interval_of(anew[0] - anew[1], one.settings.confidence)
    if fixed.low is None or fixed.high is None or sought.low is None or sought.high is None:
        return fixed
    return Interval(
        fixed.value, min(fixed.low, 2 * fixed.value - sought.high), max(fixed.high, 2 * fixed.value - sought.low)
    )


def largest(figures: FloatArray, settings: EvaluateConfig) -> Interval:
    """The largest of several figures that may be 0, with its interval: the largest of each end of theirs, 0 at least.

    The largest of resampled figures would be too large, since it takes up what noise there is among them.

    Args:
        figures: with block resamples, widened for few blocks, `(1 + resamples, figures)`.
        settings: the confidence.
    """
    value = max(0.0, float(figures[0].max()))
    if np.isnan(figures[1:]).any():  # one block
        return Interval(value, None, None)
    low, high = (max(0.0, float(ends.max())) for ends in bounds(figures, settings.confidence))
    return Interval(value, low, high)
