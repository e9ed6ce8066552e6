"""Loss on the line from a pretrained model to an adapted one, and on the plane of two separate adaptations.

The GAIN paper's Figures 3 and 4 (arXiv 2604.04516, appendix E): "interpolates from pretrained (alpha = 0) to adapted
(alpha = 1) weights", and "a 2D grid combining both adaptation directions", with the cosine between them. What is scaled
for which method: `gaintune.analysis.landscape.directions.WAYS`.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gaintune.adapters import check_adapters
from gaintune.analysis.landscape import LandscapeOptions
from gaintune.analysis.landscape.directions import WAYS, Geometry, Way, directions, way_of
from gaintune.analysis.provenance import Provenance, named_origins, provenance, warn_of_other_texts
from gaintune.config import EvaluateConfig, Plan
from gaintune.data import DomainBlocks, load_domain
from gaintune.errors import ConfigError
from gaintune.evaluate import measure_domain
from gaintune.models import Base, load_base
from gaintune.progress import Progress
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

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DomainFigures:
    """Figures of one domain on a line or a plane; intervals are a bootstrap over blocks, widened for few blocks.

    Attributes:
        at_adapted: change of perplexity at the adapted model in %; on a plane, at each of the two, then at their sum.
        best: where between pretrained and adapted (0 to 1 in every coordinate) the loss is lowest.
        best_change: the change of perplexity there.
        range: highest less lowest loss in nats a token (log perplexity) between pretrained and adapted; see `largest`.
        barrier: how far, on a line, the loss rises above the straight line between its ends; None on a plane.
    """

    at_adapted: tuple[Interval, ...]
    best: tuple[float, ...]
    best_change: Interval
    range: Interval
    barrier: Interval | None


@dataclass(frozen=True)
class Surface:
    """Losses along one direction (a line) or two (a plane), by position and domain.

    Zeros are the pretrained model, a single 1 an adapted one. `labels` name the adapters, `way` says how the model was
    moved (see `WAYS`), and `precision`, such as bfloat16, what it computed in.
    """

    labels: tuple[str, ...]
    way: Way
    precision: str
    geometry: Geometry
    points: Mapping[tuple[float, ...], Mapping[str, DomainLoss]]
    settings: EvaluateConfig

    @property
    def domains(self) -> tuple[str, ...]:
        """The domains measured."""
        return tuple(self.origin)

    @property
    def origin(self) -> Mapping[str, DomainLoss]:
        """The pretrained model's losses."""
        return self.points[(0.0,) * len(self.labels)]

    @property
    def _between(self) -> list[tuple[float, ...]]:
        return [position for position in self.points if all(0.0 <= t <= 1.0 for t in position)]

    def change(self, position: tuple[float, ...], domain: str) -> Interval:
        """Return the change of perplexity against the pretrained model in %, paired block by block."""
        return paired_change(self.origin[domain], self.points[position][domain], domain, self.settings)

    def figures(self, domain: str) -> DomainFigures:
        """Summarize one domain."""
        ends = [(1.0,)] if len(self.labels) == 1 else [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)]
        best = min(self._between, key=lambda position: self.points[position][domain].nats_per_token)
        losses = self.losses_between(domain)
        barrier = None
        if len(self.labels) == 1:
            along = np.array([t for (t,) in self._between])
            # from 0 to 1 in order, so that the first and the last are the ends
            chord = losses[:, :1] + along * (losses[:, -1:] - losses[:, :1])
            barrier = largest(losses - chord, self.settings)
        return DomainFigures(
            at_adapted=tuple(self.change(end, domain) for end in ends),
            best=best,
            best_change=self.change(best, domain),
            range=largest((losses[:, :, None] - losses[:, None]).reshape(len(losses), -1), self.settings),
            barrier=barrier,
        )

    def losses_between(self, domain: str) -> FloatArray:
        """Return nats a token above the pretrained model's at all positions from 0 to 1, `(1 + resamples, positions)`.

        The first row is what was measured; the others are resamples of blocks, the same on all surfaces.
        """
        origin, settings = self.origin[domain], self.settings
        nats = replicate_means(
            np.array([np.subtract(self.points[position][domain].nll, origin.nll) for position in self._between]),
            np.array(origin.tokens),
            samples=settings.bootstrap_samples,
            seed=settings.seed,
            domain=domain,
        )
        return widened(nats, settings.confidence, len(origin.tokens))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""

        def measured(position: tuple[float, ...], domain: str) -> dict[str, Any]:
            loss, change = self.points[position][domain], asdict(self.change(position, domain))
            return {"nats_per_token": loss.nats_per_token, "perplexity": loss.perplexity, "change": change}

        return {
            "adapters": list(self.labels),
            "interpolated": WAYS[self.way],
            "numbers": self.precision,
            "geometry": asdict(self.geometry),
            "figures": {domain: asdict(self.figures(domain)) for domain in self.domains},
            "points": [
                {"place": list(position), "domains": {domain: measured(position, domain) for domain in self.domains}}
                for position in self.points
            ],
        }


def range_apart(one: Surface, other: Surface, domain: str) -> Interval:
    """Return how much wider a domain's range of losses is on one surface than on another, in nats a token, paired.

    A range takes up noise, so the value leans to the surface that varies more from block to block. Its interval holds
    two: that of the ranges between the positions where each surface is highest and lowest as measured, and the basic
    bootstrap's of ranges between positions that are found again in every resample.
    """
    assert one.settings == other.settings, "surfaces of one call have one plan"
    first, second = one.losses_between(domain), other.losses_between(domain)
    measured = [losses[:, losses[0].argmax()] - losses[:, losses[0].argmin()] for losses in (first, second)]
    fixed = interval_of(measured[0] - measured[1], one.settings.confidence)
    sought = interval_of(np.ptp(first, axis=1) - np.ptp(second, axis=1), one.settings.confidence)
    if fixed.low is None or fixed.high is None or sought.low is None or sought.high is None:
        return fixed
    double = 2 * fixed.value
    return Interval(fixed.value, min(fixed.low, double - sought.high), max(fixed.high, double - sought.low))


def largest(figures: FloatArray, settings: EvaluateConfig) -> Interval:
    """Return the largest of several figures `(1 + resamples, figures)`, with the largest of each end, 0 at least.

    The largest of resampled figures would be too large, since it takes up what noise there is among them.
    """
    value = max(0.0, float(figures[0].max()))
    if np.isnan(figures[1:]).any():  # one block
        return Interval(value, None, None)
    low, high = (max(0.0, float(ends.max())) for ends in bounds(figures, settings.confidence))
    return Interval(value, low, high)


@dataclass(frozen=True)
class Landscape:
    """A line for each adapter, the plane of two of them if there is one, and what all of it was made from."""

    lines: tuple[Surface, ...]
    plane: Surface | None
    provenance: Provenance

    @property
    def surfaces(self) -> tuple[Surface, ...]:
        """Every line, then the plane."""
        return self.lines if self.plane is None else (*self.lines, self.plane)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {"lines": [line.to_dict() for line in self.lines], "plane": self.plane and self.plane.to_dict()}


def survey_landscape(
    plan: Plan,
    adapters: Sequence[Path],
    options: LandscapeOptions | None = None,
    *,
    allow_other_base: bool = False,
    progress: Progress | None = None,
) -> Landscape:
    """Measure the plan's domains (trained and watched ones) on the line to every adapter, and on the plane of two.

    Args:
        plan: base, domains and how uncertainty is measured.
        adapters: adapter folders on one base, each trained from the pretrained model.
        options: positions on the lines and along each side of the plane, which takes two adapters.

    Raises:
        AdapterError, BaseMismatchError: damaged, of another base, or of a method that has no such directions.
        ConfigError: a plane of more or fewer than two adapters, or of adapters that span none.
        DataError: a domain's text is missing or broken.
    """
    adapters = [Path(folder) for folder in adapters]
    chosen = options or LandscapeOptions()
    if not adapters or (chosen.plane and len(adapters) != 2):
        raise ConfigError(f"a plane is spanned by two adapters, not by {len(adapters)}")
    origins = named_origins(adapters)
    folders = dict(zip(origins, adapters, strict=True))
    wanted = [*({label: folder} for label, folder in folders.items()), *([folders] if chosen.plane else [])]
    # fp32 for interpolated weights, else the plan's own; refuses before anything is loaded
    dtypes = [torch.float32 if way_of([*named.values()]) == "weights" else None for named in wanted]
    check_adapters(adapters, plan.model, allow_other_base=allow_other_base)
    base = load_base(plan.model, dtype=dtypes[0])
    domains = [load_domain(domain, plan.data, base.tokenizer) for domain in plan.data.measured]
    warn_of_other_texts(adapters, domains)
    made_from = provenance(plan, base, domains, origins)
    measure = _Measure(plan, domains, progress)
    surfaces = []
    for named, before, dtype in zip(wanted, (dtypes[0], *dtypes[:-1]), dtypes, strict=True):
        if dtype is not before:
            del base  # free it before the next one is loaded
            base = load_base(plan.model, dtype=dtype)
        surfaces.append(measure(base, named, chosen.line if len(named) == 1 else chosen.grid, allow_other_base))
    lines = surfaces[: len(adapters)]
    for line in lines:
        _warn_of_rounding(line)
    return Landscape(tuple(lines), surfaces[-1] if chosen.plane else None, made_from)


class _Measure:
    """Measure of lines and planes; losses that a plane shares with its lines are measured once."""

    def __init__(self, plan: Plan, domains: Sequence[DomainBlocks], progress: Progress | None) -> None:
        self._plan, self._domains = plan, domains
        self._measure = partial(measure_domain, batch_size=plan.evaluate.batch_size, progress=progress)
        # by way, precision, and how far the model is moved toward each adapter
        self._known: dict[tuple[Way, str, frozenset[tuple[Path, float]]], dict[str, DomainLoss]] = {}

    def __call__(
        self, base: Base, adapters: Mapping[str, Path], steps: Sequence[float], allow_other_base: bool
    ) -> Surface:
        """Move toward one labeled adapter or two, and measure every domain at every position that is not known yet."""
        folders, names = [*adapters.values()], " and ".join(adapters)
        way, precision = way_of(folders), str(base.model.dtype).removeprefix("torch.")
        along = sorted({0.0, 1.0, *map(float, steps)})
        points = {}
        with directions(base, folders, allow_other_base=allow_other_base) as moving:
            for position in itertools.product(along, repeat=len(folders)):
                moved = frozenset((folder, t) for folder, t in zip(folders, position, strict=True) if t)
                key = (way, precision, moved)
                if key not in self._known:
                    moving.move(position)
                    measure = partial(self._measure, moving.model, base=None if moved else self._plan.model.name)
                    at = ", ".join(f"{t:g}" for t in position)
                    self._known[key] = {
                        each.name: measure(each, title=f"{names}: {each.name} at {at}") for each in self._domains
                    }
                points[position] = self._known[key]
            geometry = moving.geometry()
        return Surface(tuple(adapters), way, precision, geometry, points, self._plan.evaluate)


def _warn_of_rounding(line: Surface) -> None:
    """Warn where a line does not leave the pretrained model: 16 bits round away what is small beside the weights."""
    same = [f"{t:g}" for (t,), losses in line.points.items() if t and losses == line.origin]
    if same:
        logger.warning(
            "%s: at %s every loss is the pretrained model's to the last bit, as %s rounds so small a step away: what "
            "the line shows near 0, and a barrier, may be rounding. Compute in fp32 (--set model.dtype=fp32)",
            line.labels[0], ", ".join(same), line.precision,
        )  # fmt: skip
