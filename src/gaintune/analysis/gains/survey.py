"""What the factors of GAIN and (IA)3 adapters are after every stage: range, share near 1, sign flips and regime.

GAIN paper, appendix C (table 5: range and share within [0.95, 1.05]) and appendix J (table 9: the same after domain
upon domain, at several rates; table 10: the regimes). Factors are read from the adapters' files; no model is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from gaintune.adapters import WEIGHTS, adapter_method, check_undamaged
from gaintune.analysis.positions import PREFIX, ModulePosition, positions_of
from gaintune.analysis.provenance import Origin, method_with, origin_of, table_labels
from gaintune.config import build_plan, read_values
from gaintune.errors import AdapterError, ConfigError, RunDirectoryError
from gaintune.methods import Method
from gaintune.storage import Run

NEAR = (0.95, 1.05)
"""Factors in this interval, ends included, count as near 1 (the paper's "tight")."""
Regime = Literal["stable", "mildly unstable", "unstable"]
TOLERANCE = 1e-6  # the v of a gain of 1.05 is 0.0500000007 in fp32; the ends belong to the interval all the same


@dataclass(frozen=True)
class Factors:
    """Factors by which an adapter multiplies features, float64 `(features,)`, by module name in the base.

    The features are a module's input for GAIN, and its input or output for (IA)3 and for both together.
    """

    method: Method
    values: Mapping[str, np.ndarray]


def read_factors(folder: Path) -> Factors:
    """Read the factors of a GAIN or (IA)3 adapter, `1 + v` for GAIN.

    Raises:
        AdapterError: not an adapter, damaged, of a method without factors, or a factor that is not finite.
    """
    method = method_with("factors", folder, "gains; give one of method gain, gain-ffn, gain-ia3 or ia3")
    check_undamaged(folder)
    assert method.factors is not None
    parameter, start = method.factors
    path, values = folder / WEIGHTS, {}
    try:
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (a safetensors file, not a mapping)
                module, _, last = name.rpartition(".")
                if last == parameter:
                    values[module.removeprefix(PREFIX)] = start + tensors.get_tensor(name).to(torch.float64).flatten()
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path}: not a safetensors file, or cut short ({error})") from None
    broken = [name for name, factors in values.items() if not bool(torch.isfinite(factors).all())]
    if broken or not values:
        raise AdapterError(f"{path}: {f'gains of {broken[0]} are not finite' if broken else 'no gains in it'}")
    return Factors(method, {name: factors.numpy() for name, factors in values.items()})


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
    """Compute the figures of factors `(features,)`; ValueError if there are none."""
    if not factors.size:
        raise ValueError("no factor to describe")
    near = (factors >= NEAR[0] - TOLERANCE) & (factors <= NEAR[1] + TOLERANCE)
    smallest, largest, mean, deviation = map(float, (factors.min(), factors.max(), factors.mean(), factors.std()))
    share, flipped = float(near.mean()), int((factors <= 0).sum())
    return FactorFigures(factors.size, smallest, largest, mean, deviation, share, flipped)


@dataclass(frozen=True)
class LayerFactors:
    """Factors of one module, float64 `(features,)`, and where it sits in the model."""

    position: ModulePosition
    values: np.ndarray

    @property
    def figures(self) -> FactorFigures:
        return describe(self.values)


@dataclass(frozen=True)
class StageFactors:
    """Factors after one stage; `index` counts stages from 0, `domain` is the one trained last."""

    index: int
    domain: str
    origin: Origin
    layers: tuple[LayerFactors, ...]

    @property
    def name(self) -> str:
        """Number, counted from 1, and domain."""
        return f"{self.index + 1} {self.domain}"

    @cached_property
    def figures(self) -> FactorFigures:
        """Figures of all layers together, every factor of equal weight."""
        return self.of()

    def of(self, projection: str | None = None) -> FactorFigures:
        """Compute the figures of all layers' modules of one projection, or of all projections."""
        chosen = [each.values for each in self.layers if projection in (None, each.position.projection)]
        return describe(np.concatenate(chosen))

    @cached_property
    def projections(self) -> tuple[str, ...]:
        """Projections that have factors, in the order of the model."""
        return tuple(dict.fromkeys(each.position.projection for each in self.layers))


@dataclass(frozen=True)
class FactorSequence:
    """Factors of one method, stage after stage; of a single adapter only the stage of its last domain is known."""

    label: str
    stages: tuple[StageFactors, ...]
    planned: int

    @property
    def regime(self) -> Regime | None:
        """Regime by `regime_of`; None where a sign may have flipped in an earlier stage whose adapter was not given."""
        seen = [at for at, stage in enumerate(self.stages) if stage.figures.flipped] or [len(self.stages) - 1]
        if self.stages[seen[0]].index > seen[0]:
            return None
        return regime_of([stage.figures.flipped for stage in self.stages], self.planned)


@dataclass(frozen=True)
class FactorSurvey:
    """Sequences of factors, and the labels of a run's methods that have none."""

    sequences: tuple[FactorSequence, ...]
    left_out: tuple[str, ...]


def regime_of(flipped: Sequence[int], planned: int) -> Regime:
    """Name the regime of a sequence from its sign flips, after the words of appendix J.

    The paper names as stable where every factor stays positive, as mild instability where some go negative late (after
    domain 5 of 8), and as unstable where they do early (after domain 2). It gives no bound between the last two: here
    it is half of the planned stages without a flip.

    `flipped` counts the factors at or below 0 after each stage so far; the sequence will have `planned` stages.
    """
    clean = next((index for index, count in enumerate(flipped) if count), None)
    if clean is None:
        return "stable"
    return "mildly unstable" if 2 * clean >= planned else "unstable"


def survey_gains(paths: Sequence[Path]) -> FactorSurvey:
    """Read the factors of runs and adapters; no model is loaded.

    Every method of a run with factors is a sequence, and its adapters are the stages. An adapter folder of GAIN or
    (IA)3 is the last stage of a sequence; these come after those of runs.

    Raises:
        AdapterError: a damaged adapter, one without factors, or a run without any.
        RunDirectoryError: a run without an adapter.
        ConfigError: a path named twice, or none.
    """
    names = [str(path) for path in paths]
    if not names or len(set(names)) != len(names):
        raise ConfigError(f"name run directories or adapters, each once (given: {', '.join(names) or 'none'})")
    sequences, left_out, alone = [], [], []
    for path in paths:
        if not path.is_dir():
            raise AdapterError(f"{path}: no such folder; name a run directory or an adapter folder")
        if (path / "plan.yaml").is_file():
            of_run, without = _of_run(path, prefix=f"{path.name}: " if len(paths) > 1 else "")
            sequences += of_run
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
    """Read the sequences of a run, and the labels of its methods without factors."""
    plan = build_plan(read_values(run / "plan.yaml"), origin=str(run / "plan.yaml"))
    sequences, left_out, domains = [], [], plan.data.domains
    for label in (method.label for method in plan.methods):
        folders = [Run(run).stage(label, index, domain.name) / "adapter" for index, domain in enumerate(domains)]
        trained = [index for index, folder in enumerate(folders) if folder.is_dir()]
        methods = [adapter_method(folders[index]) for index in trained]
        if not all(method is not None and method.factors is not None for method in methods):
            left_out.append(label)
        elif trained:
            stages = tuple(_stage(index, domains[index].name, folders[index]) for index in trained)
            sequences.append(FactorSequence(f"{prefix}{label}", stages, len(domains)))
    if not sequences and not left_out:
        raise RunDirectoryError(f"{run} has no adapter yet: run `gaintune sequence` on it until a stage is trained")
    if not sequences:
        have = "gain, gain-ffn, gain-ia3 and ia3 have"
        raise AdapterError(f"{run}: none of its methods has gains ({', '.join(left_out)}); {have}")
    return sequences, [f"{prefix}{label}" for label in left_out]


def _stage(index: int, domain: str, adapter: Path) -> StageFactors:
    """Read a stage's factors, attention before MLP in each layer; a safetensors file orders names alphabetically."""
    values = read_factors(adapter).values

    def order(position: ModulePosition) -> tuple[bool, int, str, str]:
        return position.layer is None, position.layer or 0, position.block, position.name

    positions = sorted(positions_of(None, values).values(), key=order)
    return StageFactors(index, domain, origin_of(adapter), tuple(LayerFactors(at, values[at.name]) for at in positions))
