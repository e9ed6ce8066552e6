"""Adapters on one base, each of their weights compared with the pretrained one, module by module.

Weights are float64 and `(out, in)`; what is computed of each pair stands in `statistics`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import safe_open
from torch import nn
from transformers.pytorch_utils import Conv1D

from gaintune.adapters import (
    WEIGHTS,
    adapter_method,
    attached,
    check_adapters,
    check_mergeable,
    read_record,
)
from gaintune.analysis.gains.factors import PREFIX
from gaintune.analysis.positions import ModulePosition, positions_of
from gaintune.analysis.provenance import Origin, Provenance, named_origins, provenance
from gaintune.analysis.subspace import SubspaceOptions
from gaintune.analysis.subspace.statistics import SubspaceFigures, compare_weights
from gaintune.config import Plan
from gaintune.errors import AdapterError, ConfigError, one_line
from gaintune.models import Base, load_base
from gaintune.progress import Progress, Silent
from gaintune.tuners.gain import GainLayer

logger = logging.getLogger(__name__)

NAMED = 8  # modules that a warning names; of more it says how many


@dataclass(frozen=True)
class ModuleSubspace:
    """One adapted module: where it sits, and its figures."""

    position: ModulePosition
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

    options: SubspaceOptions
    adapters: tuple[AdapterSubspace, ...]
    provenance: Provenance


def survey_subspace(
    plan: Plan,
    adapters: Sequence[Path],
    options: SubspaceOptions | None = None,
    *,
    allow_other_base: bool = False,
    progress: Progress | None = None,
) -> SubspaceSurvey:
    """Compare every weight that adapters change with the pretrained one.

    Args:
        plan: names the base; loaded in fp32, unquantized, on its device, where the singular values are computed too.
        adapters: folders of adapters whose adapted weight can be formed, or of fully fine-tuned weights.
        options: what is counted, and the constant value of every gate of DISeL and Gated LoRA adapters, which are
            refused without it; others have none, and go without.
        allow_other_base: take adapters that were trained on another base.
        progress: where to show progress.

    Raises:
        AdapterError, BaseMismatchError: a damaged adapter, one of another base, or one without an adapted weight.
        ConfigError: no adapter, or one named twice.
    """
    if not adapters:
        raise ConfigError("name at least one adapter")
    origins = named_origins(adapters)
    chosen, shown = options or SubspaceOptions(), progress or Silent()
    gate = chosen.gate
    gates = [gate if check_weights(adapter, gate) else None for adapter in adapters]
    if gate is not None and not any(gates):
        raise ConfigError(f"none of these adapters has gates ({', '.join(origins)}): leave the gate's value out")
    check_adapters(adapters, plan.model, allow_other_base=allow_other_base)
    found = []
    base = load_base(plan.model.model_copy(update={"quantization": None}), dtype=torch.float32)
    for (label, origin), adapter, held in zip(origins.items(), adapters, gates, strict=True):
        modules = []
        with (
            adapted_weights(base, adapter, gate=held, allow_other_base=allow_other_base) as weights,
            shown.task(f"{label}: singular vectors", len(weights), "modules") as advance,
        ):
            positions = positions_of(base.model, weights.names)
            for pair in weights:
                modules.append(
                    ModuleSubspace(positions[pair.name], compare_weights(pair.pretrained, pair.adapted, chosen))
                )
                advance(1)
        method = adapter_method(adapter)
        scales = method is not None and method.line == "gains"
        found.append(AdapterSubspace(label, origin, scales, held, tuple(modules)))
    settings = {"subspace": chosen.counted(), "gate": gate, "model": plan.model.model_dump(mode="json")}
    return SubspaceSurvey(chosen, tuple(found), provenance(plan, base, (), origins, settings))


@dataclass(frozen=True)
class WeightPair:
    """One linear module: its weight in the base and with the adapter, float64 `(out_features, in_features)`."""

    name: str
    pretrained: torch.Tensor
    adapted: torch.Tensor


def check_weights(adapter: Path, gate: float | None = None) -> bool:
    """Refuse, before any model is loaded, an adapter that has no one adapted weight.

    Returns:
        Whether it has gates, so that `gate` is for it.

    Raises:
        AdapterError: its effect is no change of weights, it has gates and `gate` is None, or it is a classifier.
        ConfigError: `gate` is not in (0, 1].
    """
    record = read_record(adapter)
    if record is not None and record.labels:
        raise AdapterError(f"{adapter} is a classifier: give an adapter of a language model")
    method = adapter_method(adapter)
    gated = method is not None and method.gates
    if gate is not None and not 0 < gate <= 1:
        raise ConfigError(f"gate is {gate}: a gate is above 0 and at most 1")
    if gated and gate is None:
        raise AdapterError(
            f"{adapter}: its gates open and shut token by token, so there is no one adapted weight. Give the value at "
            "which to hold every gate (--gate 1, or the mean that `gaintune gates` finds)"
        )
    if not gated:
        check_mergeable(adapter)
    return gated


class AdaptedWeights:
    """Every linear weight that an adapter changes, before and after: iterate over it once.

    The adapter is put into one weight at a time, in float64, as its method's own merging prescribes (products of
    low-rank factors are fp32, as in a merged model). See `adapted_weights`.
    """

    def __init__(
        self, adapter: Path, modules: Mapping[str, tuple[torch.Tensor, Any]], gate: float | None, full: bool
    ) -> None:
        """By each module's name: its weight in the base, and the module with the adapter, or with the full weights."""
        self._adapter, self._modules, self._gate, self._full = adapter, modules, gate, full

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the modules in the base, in its order."""
        return tuple(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    @torch.no_grad()
    def __iter__(self) -> Iterator[WeightPair]:
        """A pair for each module, in the order of the model."""
        for name, (weight, module) in self._modules.items():
            adapted = module.weight.detach().double() if self._full else self._merged(module, name)
            yield WeightPair(name, _oriented(module, weight.double()), _oriented(module, adapted))

    def _merged(self, layer: Any, name: str) -> torch.Tensor:
        """A layer's weight with its adapter in it, float64, in the layout of the base's own weight."""
        base = layer.get_base_layer()
        original = base.weight
        base.weight = nn.Parameter(original.detach().double(), requires_grad=False)
        try:
            if self._gate is not None:
                return _held_open(layer, base.weight.detach(), self._gate)
            layer.merge(safe_merge=True)
            return base.weight.detach()
        except (ValueError, NotImplementedError) as error:  # no other RuntimeError: no memory is not about the adapter
            reason = one_line(error)[:300]
            raise AdapterError(f"{self._adapter}: {name} cannot be put together ({reason})") from error
        finally:
            base.weight = original
            layer.merged_adapters = []
            if isinstance(layer, GainLayer):
                layer._original = None  # a merged layer of gains keeps what it replaced


@contextlib.contextmanager
def adapted_weights(
    base: Base, adapter: Path, *, gate: float | None = None, allow_other_base: bool = False
) -> Iterator[AdaptedWeights]:
    """Put an adapter onto its base for a while, and give every linear weight before and after.

    Embeddings, norms, biases and modules trained whole beside an adapter are left out with a warning.

    Args:
        base: the untouched base, loaded in fp32; afterwards it is again what it was.
        adapter: folder of an adapter, or of fully fine-tuned weights.
        gate: for DISeL and Gated LoRA, the constant value of every gate, in (0, 1]; None for all others.
        allow_other_base: as in `load_adapter`.

    Raises:
        AdapterError, BaseMismatchError, ConfigError: as `check_weights` and `load_adapter`; or nothing to compare.
    """
    if not check_weights(adapter, gate) and gate is not None:
        raise ConfigError(f"{adapter} has no gates: leave the gate's value out")
    record = read_record(adapter)
    full = record is not None and record.whole
    before = _linear_weights(base.model, None if full else _tensor_names(adapter))
    rest = _other_parameters(base.model) if full else {}
    with attached(base, adapter, allow_other_base=allow_other_base) as (model, _):
        modules = dict(model.named_modules())
        pairs = {
            name: (weight, modules[name if full else PREFIX + name])
            for name, weight in before.items()
            if full or isinstance(modules[PREFIX + name], BaseTunerLayer)
        }
        if not pairs:
            raise AdapterError(f"{adapter} changes no linear weight of {base.name!r}")
        if full:
            _warn(adapter, [name for name, was in rest.items() if not torch.equal(was, model.get_parameter(name))])
        else:
            _warn(adapter, _adapted_elsewhere(modules, set(pairs)))
        yield AdaptedWeights(adapter, pairs, gate, full)


def _linear_weights(model: nn.Module, tensors: set[str] | None) -> dict[str, torch.Tensor]:
    """Copies of the weights of the linear modules that saved tensors belong to, or of all where `tensors` is None.

    Copies, because PiSSA and OSF take their start out of the base's own weight as they are loaded.
    """
    return {
        name: module.weight.detach().clone()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and (tensors is None or any(tensor.startswith(f"{PREFIX}{name}.") for tensor in tensors))
    }


def _tensor_names(adapter: Path) -> set[str]:
    if not (adapter / WEIGHTS).is_file():
        return set()  # loading says it better
    with safe_open(adapter / WEIGHTS, framework="pt") as tensors:
        return set(tensors.keys())


def _other_parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all parameters that are no linear module's weight; a tied embedding is its linear head's weight."""
    linear = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear | Conv1D)}
    return {name: each.detach().clone() for name, each in model.named_parameters() if id(each) not in linear}


def _adapted_elsewhere(modules: Mapping[str, nn.Module], compared: set[str]) -> list[str]:
    return [
        name.removeprefix(PREFIX)
        for name, module in modules.items()
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) and name.removeprefix(PREFIX) not in compared
    ]


def _warn(adapter: Path, left_out: Sequence[str]) -> None:
    if left_out:
        more = f" and {len(left_out) - NAMED} more" if len(left_out) > NAMED else ""
        logger.warning(
            "%s also changes what is no linear module's weight, and that is left out: %s%s",
            adapter, ", ".join(left_out[:NAMED]), more,
        )  # fmt: skip


def _held_open(layer: LoraLayer, weight: torch.Tensor, gate: float) -> torch.Tensor:
    """`W + gate * alpha / r * B A`: a gated layer with every gate at one value."""
    (name,) = layer.active_adapters
    down: Any = layer.lora_A[name]
    up: Any = layer.lora_B[name]
    update = gate * layer.scaling[name] * (up.weight.detach().double() @ down.weight.detach().double())
    return weight + (update.T if isinstance(layer.get_base_layer(), Conv1D) else update)


def _oriented(module: Any, weight: torch.Tensor) -> torch.Tensor:
    """As `(out, in)`: Conv1D stores `(in, out)`."""
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return weight.T if isinstance(base, Conv1D) else weight
