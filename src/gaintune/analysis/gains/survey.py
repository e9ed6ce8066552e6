"""What gains learnt: their range and how many stay near 1, by layer and stage, sign flips, and the regime they make.

GAIN paper, appendix C (table 5: range and share within [0.95, 1.05]) and appendix J (table 9: the same after domain
upon domain, at several rates; table 10: the regimes).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from gaintune.analysis.gains.factors import adapters_of_run, has_factors, read_factors
from gaintune.analysis.positions import ModulePosition, positions_of
from gaintune.analysis.provenance import Origin, origin_of, table_labels
from gaintune.errors import AdapterError, ConfigError

NEAR = (0.95, 1.05)
"""Factors in this interval, ends included, count as near 1 (the paper's "tight")."""
Regime = Literal["stable", "mildly unstable", "unstable"]
TOLERANCE = 1e-6  # the v of a gain of 1.05 is 0.0500000007 in fp32; the ends belong to the interval all the same


@dataclass(frozen=True)
class FactorFigures:
    """Figures of some factors: how many, their range, mean and standard deviation, how many are near 1, and flipped.

    `near` is a share; `flipped` counts the factors at or below 0, which turn a feature's sign or switch it off.
    """

    count: int
    smallest: float
    largest: float
    mean: float
    deviation: float
    near: float
    flipped: int


def describe(factors: np.ndarray) -> FactorFigures:
    """The figures of factors `(features,)`; ValueError for none at all."""
    if not factors.size:
        raise ValueError("no factor to describe")
    near = (factors >= NEAR[0] - TOLERANCE) & (factors <= NEAR[1] + TOLERANCE)
    return FactorFigures(
        count=factors.size,
        smallest=float(factors.min()),
        largest=float(factors.max()),
        mean=float(factors.mean()),
        deviation=float(factors.std()),
        near=float(near.mean()),
        flipped=int((factors <= 0).sum()),
    )


@dataclass(frozen=True)
class LayerFactors:
    """The factors of one module, float64 `(features,)`, and where it sits in the model."""

    position: ModulePosition
    values: np.ndarray

    @property
    def figures(self) -> FactorFigures:
        return describe(self.values)


@dataclass(frozen=True)
class StageFactors:
    """The factors after one stage; `index` counts stages from 0, `domain` is what was learnt last."""

    index: int
    domain: str
    origin: Origin
    layers: tuple[LayerFactors, ...]

    @cached_property
    def figures(self) -> FactorFigures:
        """All layers together, every factor of equal weight."""
        return self.of()

    def of(self, projection: str | None = None) -> FactorFigures:
        """All layers' modules of one projection, or of all of them, together."""
        chosen = [each.values for each in self.layers if projection in (None, each.position.projection)]
        return describe(np.concatenate(chosen))

    @cached_property
    def projections(self) -> tuple[str, ...]:
        """The projections that have factors, in the order of the model."""
        return tuple(dict.fromkeys(each.position.projection for each in self.layers))


@dataclass(frozen=True)
class FactorSequence:
    """One method's factors, stage after stage; of a single adapter the stage of its last domain is all there is."""

    label: str
    stages: tuple[StageFactors, ...]
    planned: int

    @property
    def regime(self) -> Regime | None:
        """See `regime_of`; None where a sign may have flipped in an earlier stage that was not looked at."""
        seen = [place for place, stage in enumerate(self.stages) if stage.figures.flipped] or [len(self.stages) - 1]
        if self.stages[seen[0]].index > seen[0]:
            return None
        return regime_of([stage.figures.flipped for stage in self.stages], self.planned)


@dataclass(frozen=True)
class FactorSurvey:
    """Everything read: sequences of factors, and the labels of a run's methods that have none."""

    sequences: tuple[FactorSequence, ...]
    left_out: tuple[str, ...]


def regime_of(flipped: Sequence[int], planned: int) -> Regime:
    """The regime of a sequence from its sign flips, after the words of appendix J.

    The paper names as stable where every factor stays positive, as mild instability where some go negative late (after
    domain 5 of 8), and as unstable where they do early (after domain 2). It gives no bound between the last two: here
    it is half of the planned stages without a flip.

    Args:
        flipped: how many factors are at or below 0 after each stage so far.
        planned: stages the sequence is to have.
    """
    clean = next((index for index, count in enumerate(flipped) if count), None)
    if clean is None:
        return "stable"
    return "mildly unstable" if 2 * clean >= planned else "unstable"


def survey_gains(paths: Sequence[Path]) -> FactorSurvey:
    """Read the factors of runs and adapters; no model is loaded.

    Args:
        paths: run directories (every method with factors is a sequence, its adapters the stages) and adapter folders
            of GAIN or (IA)3 (each the last stage of a sequence, after those of runs).

    Raises:
        AdapterError: a damaged adapter, one without factors, or a run without any.
        RunDirectoryError: neither a run directory nor an adapter folder.
        ConfigError: a path named twice, or none.
    """
    names = [str(path) for path in paths]
    if not names or len(set(names)) != len(names):
        raise ConfigError(f"name run directories or adapters, each once (given: {', '.join(names) or 'none'})")
    sequences: list[FactorSequence] = []
    left_out: list[str] = []
    alone: list[FactorSequence] = []
    for path in paths:
        if not path.is_dir():
            raise AdapterError(f"{path}: no such folder; name a run directory or an adapter folder")
        if (path / "plan.yaml").is_file():
            found, without = _of_run(path, prefix=f"{path.name}: " if len(paths) > 1 else "")
            sequences += found
            left_out += without
        else:
            origin = origin_of(path)
            domain = origin.domains[-1] if origin.domains else path.name
            planned = max(1, len(origin.domains))  # as far as it knows
            alone.append(FactorSequence(origin.label, (_stage(planned - 1, domain, path),), planned))
    if len(paths) > 1:
        named = table_labels([each.stages[0].origin for each in alone])
        alone = [replace(each, label=label) for each, label in zip(alone, named, strict=True)]
    sequences += alone
    labels = [each.label for each in sequences]
    if len(set(labels)) != len(labels):
        raise ConfigError(f"two of these have one name: {', '.join(sorted(labels))}; rename a folder")
    return FactorSurvey(tuple(sequences), tuple(left_out))


def _of_run(run: Path, prefix: str) -> tuple[list[FactorSequence], list[str]]:
    """The sequences of a run, and the labels of its methods without factors."""
    adapters = adapters_of_run(run)
    labels = dict.fromkeys(each.label for each in adapters.adapters)
    sequences, left_out = [], []
    for label in labels:
        own = [each for each in adapters.adapters if each.label == label]
        if all(has_factors(each.adapter) for each in own):
            stages = tuple(_stage(each.index, each.domain, each.adapter) for each in own)
            sequences.append(FactorSequence(f"{prefix}{label}", stages, adapters.planned))
        else:
            left_out.append(f"{prefix}{label}")
    if not sequences:
        raise AdapterError(f"{run}: none of its methods has gains ({', '.join(labels)}); gain, gain-ffn and ia3 have")
    return sequences, left_out


def _stage(index: int, domain: str, adapter: Path) -> StageFactors:
    factors = read_factors(adapter)
    positions = positions_of(None, factors.values)
    # attention first in each layer, as in the model; safetensors keeps names in alphabetical order
    order = sorted(
        factors.values,
        key=lambda name: (positions[name].layer is None, positions[name].layer or 0, positions[name].block, name),
    )
    layers = tuple(LayerFactors(positions[name], factors.values[name]) for name in order)
    return StageFactors(index, domain, origin_of(adapter), layers)
