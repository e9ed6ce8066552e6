"""Adapters on one base, each of their weights set against the pretrained one: `subspace` over whole models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from gaintune.adapters import adapter_method, check_adapters
from gaintune.analysis.places import Place, places_of
from gaintune.analysis.provenance import Origin, Provenance, named_origins
from gaintune.analysis.subspace.compare import SubspaceFigures, SubspaceSettings, compare_weights
from gaintune.analysis.subspace.weights import adapted_weights, check_weights
from gaintune.config import ModelConfig
from gaintune.errors import ConfigError
from gaintune.models import load_base, resolve_device
from gaintune.progress import Progress, Silent
from gaintune.storage import describe_environment


@dataclass(frozen=True)
class ModuleSubspace:
    """One adapted module: where it sits, and its figures."""

    place: Place
    figures: SubspaceFigures


@dataclass(frozen=True)
class AdapterSubspace:
    """One adapter on its base.

    Attributes:
        label: what tables call it: see `table_labels`.
        origin: what the folder says of itself.
        scales_inputs: whether it multiplies the weight's columns, as GAIN does, so that the column space is kept by
            construction; other methods may keep it too.
        gate: the value at which every gate was held, None for methods without gates.
        modules: in the order of the model.
    """

    label: str
    origin: Origin
    scales_inputs: bool
    gate: float | None
    modules: tuple[ModuleSubspace, ...]

    @property
    def with_outside(self) -> int:
        """In how many modules there is anything outside the pretrained column space."""
        return sum(each.figures.has_outside for each in self.modules)

    @property
    def outside(self) -> float | None:
        """Share of the update outside the column space, over the modules that have an outside; None without any."""
        return share_of([(each.figures, each.figures.outside) for each in self.modules if each.figures.has_outside])

    @property
    def outside_leading(self) -> float | None:
        """Share of the update outside the leading directions, over all modules; None for an update of zeros."""
        return share_of([(each.figures, each.figures.outside_leading) for each in self.modules])

    @property
    def relative_update(self) -> float:
        """Norm of the update over the norm of the weights, over all modules."""
        update = sum(each.figures.update_energy for each in self.modules)
        return (update / sum(each.figures.weight_energy for each in self.modules)) ** 0.5

    @property
    def looked_at(self) -> int:
        """Singular vectors looked at in all modules."""
        return sum(len(each.figures.similarities) for each in self.modules)

    def intruders(self, epsilon: float | None = None) -> int:
        """Intruder dimensions in all modules, at another similarity than the survey's where one is given."""
        if epsilon is None:
            return sum(each.figures.intruders for each in self.modules)
        return sum(similarity < epsilon for each in self.modules for similarity in each.figures.similarities)


def share_of(parts: Sequence[tuple[SubspaceFigures, float | None]]) -> float | None:
    """Shares put together by the energy of their updates."""
    energy = sum(figures.update_energy for figures, share in parts if share is not None)
    outside = sum(share * figures.update_energy for figures, share in parts if share is not None)
    return outside / energy if energy else None


@dataclass(frozen=True)
class SubspaceSurvey:
    """Adapters on one base, and what was counted."""

    settings: SubspaceSettings
    adapters: tuple[AdapterSubspace, ...]
    provenance: Provenance


def survey_subspace(
    adapters: Sequence[Path],
    model: ModelConfig,
    *,
    settings: SubspaceSettings | None = None,
    gate: float | None = None,
    allow_other_base: bool = False,
    progress: Progress | None = None,
) -> SubspaceSurvey:
    """Compare every weight that adapters change with the pretrained one.

    Args:
        adapters: folders of adapters whose adapted weight can be formed, or of fully fine-tuned weights.
        model: their base; loaded in fp32, unquantized, on its device, where the singular values are computed too.
        settings: what is counted.
        gate: the constant value of every gate of DISeL and Gated LoRA adapters, which are refused without it; others
            have none, and go without.
        allow_other_base: take adapters that were trained on another base.
        progress: where to show progress.

    Raises:
        AdapterError, BaseMismatchError: a damaged adapter, one of another base, or one without an adapted weight.
        ConfigError: no adapter, or one named twice.
    """
    if not adapters:
        raise ConfigError("name at least one adapter")
    origins = named_origins(adapters)
    gates = [gate if check_weights(adapter, gate) else None for adapter in adapters]
    if gate is not None and not any(gates):
        raise ConfigError(f"none of these adapters has gates ({', '.join(origins)}): leave the gate's value out")
    check_adapters(adapters, model, allow_other_base=allow_other_base)
    chosen, shown = settings or SubspaceSettings(), progress or Silent()
    found = []
    base = load_base(model.model_copy(update={"quantization": None}), dtype=torch.float32)
    for (label, origin), adapter, held in zip(origins.items(), adapters, gates, strict=True):
        modules = []
        with (
            adapted_weights(base, adapter, gate=held, allow_other_base=allow_other_base) as weights,
            shown.task(f"{label}: singular vectors", len(weights), "modules") as advance,
        ):
            places = places_of(base.model, weights.names)
            for pair in weights:
                modules.append(
                    ModuleSubspace(places[pair.name], compare_weights(pair.pretrained, pair.adapted, chosen))
                )
                advance(1)
        method = adapter_method(adapter)
        scales = method is not None and method.line == "gains"
        found.append(AdapterSubspace(label, origin, scales, held, tuple(modules)))
    provenance = Provenance(
        base=base.name,
        base_revision=base.revision,
        base_fingerprint=base.fingerprint,
        adapters=origins,
        texts={},
        settings={"subspace": asdict(chosen), "gate": gate, "model": model.model_dump(mode="json")},
        environment=describe_environment(resolve_device(model.device)),
    )
    return SubspaceSurvey(chosen, tuple(found), provenance)
