"""Loss along the way from a pretrained model to an adapted one, and on the plane of two separate adaptations.

The GAIN paper's Figures 3 and 4 (arXiv 2604.04516, appendix E): "interpolates from pretrained (alpha = 0) to adapted
(alpha = 1) weights", and "a 2D grid combining both adaptation directions", with the cosine between them. What is scaled
for which method: `gaintune.analysis.directions.WAYS`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gaintune.adapters import check_adapters
from gaintune.analysis.directions import WAYS, Geometry, Way, directions, way_of
from gaintune.analysis.provenance import Provenance, named_origins, provenance, warn_of_other_texts
from gaintune.config import EvaluateConfig, Plan
from gaintune.data.blocks import DomainBlocks, load_domain
from gaintune.errors import ConfigError
from gaintune.evaluate.bootstrap import FloatArray, bounds, replicate_means, widened
from gaintune.evaluate.changes import paired_change
from gaintune.evaluate.losses import DomainLoss
from gaintune.evaluate.perplexity import measure_domain
from gaintune.evaluate.records import Interval
from gaintune.models import Base, load_base
from gaintune.progress import Progress, Silent

LINE = tuple(step / 8 for step in range(-2, 11))
GRID = tuple(step / 4 for step in range(-1, 6))


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
        between = [point for point in self.points if all(0.0 <= t <= 1.0 for t in point.place)]
        best = min(between, key=lambda point: point.losses[domain].nats_per_token)
        losses = self._losses(between, domain)
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

    def _losses(self, points: Sequence[Point], domain: str) -> FloatArray:
        """Nats a token above the pretrained model's at some places, with block resamples, `(1 + resamples, places)`."""
        origin = self.at(*[0.0] * len(self.labels)).losses[domain]
        nats = replicate_means(
            np.array([np.subtract(point.losses[domain].nll, origin.nll) for point in points]),
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


@dataclass(frozen=True)
class Landscape:
    """A line for each adapter, the plane of two of them if it was asked for, and what all of it was made from."""

    lines: tuple[Surface, ...]
    plane: Surface | None
    provenance: Provenance

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "lines": [line.to_dict() for line in self.lines],
            "plane": None if self.plane is None else self.plane.to_dict(),
            "provenance": self.provenance.to_dict(),
        }


def survey_landscape(
    plan: Plan,
    adapters: Sequence[Path],
    *,
    plane: bool = False,
    line: Sequence[float] = LINE,
    grid: Sequence[float] = GRID,
    allow_other_base: bool = False,
    progress: Progress | None = None,
) -> Landscape:
    """Measure the plan's domains (learnt and watched ones) along the way to every adapter, and on the plane of two.

    Args:
        plan: base, domains and how uncertainty is measured.
        adapters: adapter folders on one base, each trained from the pretrained model.
        plane: measure the plane of the first two adapters too, of which there must be two.
        line: places along a line; 0 and 1 are always measured.
        grid: places along each side of the plane; 0 and 1 are always measured.
        allow_other_base: take adapters that were trained on another base.
        progress: where to show progress; nowhere unless given.

    Raises:
        AdapterError, BaseMismatchError: damaged, of another base, or of a method that has no such directions.
        ConfigError: a plane of more or fewer than two adapters, or of adapters that span none.
        DataError: a domain's text is missing or broken.
    """
    adapters = [Path(folder) for folder in adapters]
    if not adapters or (plane and len(adapters) != 2):
        raise ConfigError(f"a plane is spanned by two adapters, and {len(adapters)} were given")
    origins = named_origins(adapters)
    labels = tuple(origins)
    wanted = [_Wanted((folder,), (one,), line) for folder, one in zip(adapters, labels, strict=True)]
    if plane:
        wanted.append(_Wanted(tuple(adapters), labels, grid))
    dtypes = [each.dtype() for each in wanted]  # refuses before anything is loaded
    check_adapters(adapters, plan.model, allow_other_base=allow_other_base)
    base = load_base(plan.model, dtype=dtypes[0])
    domains = [load_domain(domain, plan.data, base.tokenizer) for domain in plan.data.measured]
    warn_of_other_texts(adapters, domains)
    told = provenance(plan, base, domains, origins)
    surfaces = []
    known: _Known = {}
    for each, before, dtype in zip(wanted, (dtypes[0], *dtypes[:-1]), dtypes, strict=True):
        if dtype is not before:
            del base  # it goes before the next one comes
            base = load_base(plan.model, dtype=dtype)
        surfaces.append(_measured(plan, base, domains, each, known, allow_other_base, progress or Silent()))
    lines = surfaces[: len(adapters)]
    return Landscape(tuple(lines), surfaces[-1] if plane else None, told)


@dataclass(frozen=True)
class _Wanted:
    """A line to measure, or a plane: adapter folders, what they are called, and the places along each direction."""

    folders: tuple[Path, ...]
    labels: tuple[str, ...]
    places: Sequence[float]

    def dtype(self) -> torch.dtype | None:
        """What the base has to be loaded in; None for the plan's own. Raises as `way_of` does."""
        return torch.float32 if way_of(self.folders) == "weights" else None


_Known = dict[tuple[Way, str, frozenset[tuple[Path, float]]], dict[str, DomainLoss]]
"""Losses by way, numbers, and how far each adapter is gone where it is not left: what a plane and its lines share."""


def _measured(
    plan: Plan,
    base: Base,
    domains: Sequence[DomainBlocks],
    wanted: _Wanted,
    known: _Known,
    allow_other_base: bool,
    progress: Progress,
) -> Surface:
    """Move along one direction or two, and measure every domain at every place that is not `known` from another."""
    way, dtype = way_of(wanted.folders), str(base.model.dtype).removeprefix("torch.")
    steps = sorted({0.0, 1.0, *map(float, wanted.places)})
    points = []
    with directions(base, wanted.folders, allow_other_base=allow_other_base) as moving:
        for place in [(t,) for t in steps] if len(wanted.folders) == 1 else [(t, u) for t in steps for u in steps]:
            moved = frozenset((folder, t) for folder, t in zip(wanted.folders, place, strict=True) if t)
            key = (way, dtype, moved)
            if key not in known:
                moving.move(place)
                known[key] = {
                    domain.name: measure_domain(
                        moving.model,
                        domain,
                        batch_size=plan.evaluate.batch_size,
                        title=f"{' and '.join(wanted.labels)}: {domain.name} at {', '.join(f'{t:g}' for t in place)}",
                        base=None if moved else plan.model.name,
                        progress=progress,
                    )
                    for domain in domains
                }
            points.append(Point(place, known[key]))
        geometry = moving.geometry()
    return Surface(wanted.labels, way, dtype, geometry, tuple(points), plan.evaluate)
