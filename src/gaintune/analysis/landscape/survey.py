"""Loss along the way from a pretrained model to an adapted one, and on the plane of two separate adaptations.

The GAIN paper's Figures 3 and 4 (arXiv 2604.04516, appendix E): "interpolates from pretrained (alpha = 0) to adapted
(alpha = 1) weights", and "a 2D grid combining both adaptation directions", with the cosine between them. What is scaled
for which method: `gaintune.analysis.landscape.directions.WAYS`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gaintune.adapters import check_adapters
from gaintune.analysis.landscape import LandscapeOptions
from gaintune.analysis.landscape.directions import Way, directions, way_of
from gaintune.analysis.landscape.statistics import Point, Surface
from gaintune.analysis.provenance import Provenance, named_origins, provenance, warn_of_other_texts
from gaintune.config import Plan
from gaintune.data import DomainBlocks, load_domain
from gaintune.errors import ConfigError
from gaintune.evaluate import measure_domain
from gaintune.models import Base, load_base
from gaintune.progress import Progress, Silent
from gaintune.results import DomainLoss

logger = logging.getLogger(__name__)


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
        }


def survey_landscape(
    plan: Plan,
    adapters: Sequence[Path],
    options: LandscapeOptions | None = None,
    *,
    allow_other_base: bool = False,
    progress: Progress | None = None,
) -> Landscape:
    """Measure the plan's domains (learnt and watched ones) along the way to every adapter, and on the plane of two.

    Args:
        plan: base, domains and how uncertainty is measured.
        adapters: adapter folders on one base, each trained from the pretrained model.
        options: places along the lines and along each side of the plane, which takes two adapters.
        allow_other_base: take adapters that were trained on another base.
        progress: where to show progress; nowhere unless given.

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
    labels = tuple(origins)
    wanted = [_Wanted((folder,), (one,), chosen.line) for folder, one in zip(adapters, labels, strict=True)]
    if chosen.plane:
        wanted.append(_Wanted(tuple(adapters), labels, chosen.grid))
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
    for surface in lines:
        _warn_of_rounding(surface)
    return Landscape(tuple(lines), surfaces[-1] if chosen.plane else None, told)


def _warn_of_rounding(line: Surface) -> None:
    """Say where a line does not leave the pretrained model: 16 bits round away what is small beside the weights."""
    start = line.at(0.0).losses
    still = [point.place[0] for point in line.points if point.place[0] and point.losses == start]
    if still:
        logger.warning(
            "%s: at %s every loss is the pretrained model's to the last bit, as %s rounds so small a step away: what "
            "the line shows near 0, and a barrier, may be rounding. Compute in fp32 (--set model.dtype=fp32)",
            line.labels[0], ", ".join(f"{t:g}" for t in still), line.numbers,
        )  # fmt: skip


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
