"""Compare adapters' updates with the pretrained weights: energy outside the column space, and intruder dimensions.

GAIN paper, proposition 1: the range of `W diag(s)` lies in the range of `W`. LoRA's update `BA` may leave it, but only
where there is an outside: a weight whose rank equals its number of outputs (every trained square or wide projection)
reaches all of the output, so that no update of any kind can leave its column space. Intruder dimensions are counted as
by Shuttleworth et al., "LoRA vs Full Fine-tuning: An Illusion of Equivalence" (arXiv 2410.21228, definition 1 and
algorithm 1). A larger update makes more of them, so that they may be counted at equal |dW|/|W| as well. All weights
here are `(out_features, in_features)`, float64, and `y = W x`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

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
    read_config,
    read_record,
)
from gaintune.analysis.positions import PREFIX, ModulePosition, positions_of
from gaintune.analysis.provenance import Provenance, named_origins, provenance
from gaintune.analysis.subspace import SubspaceOptions
from gaintune.config import Plan
from gaintune.errors import AdapterError, ConfigError, one_line
from gaintune.models import Base, load_base
from gaintune.progress import Progress, Silent
from gaintune.tuners.gain import GainLayer

logger = logging.getLogger(__name__)

NAMED = 8  # modules that a warning names; of more it says how many


@dataclass(frozen=True)
class SubspaceFigures:
    """Comparison of one weight before and after adaptation.

    Energy is the squared Frobenius norm. Shares are of the update's energy, and None where the update is zero. They are
    measured as what is left of the update after its projection is subtracted; without an outside they are rounding.
    """

    outputs: int  # rows of the weight
    inputs: int  # its columns
    rank: int  # numerical rank of the pretrained weight
    tolerance: float  # singular values up to this share of the largest count as zero
    weight_energy: float  # of the pretrained weight
    update_energy: float  # of adapted minus pretrained
    outside: float | None  # share outside the pretrained column space; no outside where `outputs == rank`
    outside_rows: float | None  # share outside the row space, which GAIN may leave; no outside where `inputs == rank`
    leading_rank: int  # how many leading directions hold the options' share of the weight's energy
    outside_leading: float | None  # share outside the span of those left singular vectors
    singular_values: tuple[float, ...]  # of the adapted weight, its largest first, `(top,)`
    similarities: tuple[float, ...]  # of each of their left vectors, largest |cosine| to a pretrained one, `(top,)`
    epsilon: float  # similarity below which a vector is an intruder
    scaled: SubspaceFigures | None = None  # of the same update scaled to the options' |dW|/|W|; None without

    @property
    def has_outside(self) -> bool:
        """Whether there is anything outside the pretrained column space."""
        return self.rank < self.outputs

    @property
    def has_outside_rows(self) -> bool:
        """Whether there is anything outside the pretrained row space."""
        return self.rank < self.inputs

    @property
    def intruders(self) -> int:
        """Number of leading singular vectors that are intruder dimensions."""
        return sum(similarity < self.epsilon for similarity in self.similarities)


def compare_weights(
    pretrained: torch.Tensor, adapted: torch.Tensor, options: SubspaceOptions | None = None
) -> SubspaceFigures:
    """Compare an adapted weight with the pretrained one, in float64 on the device they are on.

    ConfigError unless both are finite matrices of one shape, and the pretrained one is not zero.
    """
    chosen = options or SubspaceOptions()
    before, after = pretrained.detach().double(), adapted.detach().double()
    if before.dim() != 2 or before.shape != after.shape:
        shapes = f"{tuple(before.shape)} and {tuple(after.shape)}"
        raise ConfigError(f"weights of shape {shapes}: two matrices of one shape are needed")
    if not (before.isfinite().all() and after.isfinite().all()) or not before.any():
        raise ConfigError("a weight is not finite, or the pretrained one is zero everywhere")
    left, values, right = torch.linalg.svd(before, full_matrices=False)
    smallest = max(before.shape) * torch.finfo(torch.float32).eps
    tolerance = smallest if chosen.tolerance is None else chosen.tolerance
    rank = int((values > tolerance * values[0]).sum())
    held = values.square().cumsum(0) / values.square().sum()
    leading = min(int((held < chosen.leading - 1e-12).sum()) + 1, rank)
    update = after - before
    singular_values, similarities = _leading_vectors(after, left, chosen.top)
    figures = SubspaceFigures(
        outputs=before.shape[0],
        inputs=before.shape[1],
        rank=rank,
        tolerance=tolerance,
        weight_energy=float(before.square().sum()),
        update_energy=float(update.square().sum()),
        outside=share_outside(update, left[:, :rank]),
        outside_rows=share_outside(update.T, right[:rank].T),
        leading_rank=leading,
        outside_leading=share_outside(update, left[:, :leading]),
        singular_values=singular_values,
        similarities=similarities,
        epsilon=chosen.epsilon,
    )
    if chosen.relative_update is None:
        return figures
    if not figures.update_energy:
        return replace(figures, scaled=figures)  # nothing to scale
    size = chosen.relative_update * figures.weight_energy**0.5
    values_at_size, similarities = _leading_vectors(before + size / update.norm() * update, left, chosen.top)
    at_size = {"singular_values": values_at_size, "similarities": similarities}
    return replace(figures, scaled=replace(figures, update_energy=size**2, **at_size))


def _leading_vectors(weight: torch.Tensor, left: torch.Tensor, top: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return a weight's largest singular values, and their left vectors' largest |cosine| to others, both `(top,)`."""
    own, values, _ = torch.linalg.svd(weight, full_matrices=False)
    similarities = (own[:, :top].T @ left).abs().amax(dim=1)
    return tuple(values[:top].tolist()), tuple(similarities.tolist())


def share_outside(update: torch.Tensor, basis: torch.Tensor) -> float | None:
    """Return the share of an update's energy outside the span of orthonormal columns; None for an update of zeros.

    The update is `(features, n)`, the basis `(features, rank)`. The part outside is computed as a rest, because 1 minus
    the part inside could not be smaller than the rounding of 1.
    """
    energy = float(update.square().sum())
    if energy == 0:
        return None
    rest = update - basis @ (basis.T @ update)
    return float(rest.square().sum()) / energy


@dataclass(frozen=True)
class ModuleSubspace:
    """One adapted module: where it sits, and its figures."""

    position: ModulePosition
    figures: SubspaceFigures


@dataclass(frozen=True)
class AdapterSubspace:
    """One adapter on its base; `gate` is the value at which every gate was held, None for methods without gates.

    `scales_inputs` says whether it multiplies the weight's columns, as GAIN does, so that the column space is kept by
    construction; other methods may keep it too.
    """

    label: str
    scales_inputs: bool
    gate: float | None
    modules: tuple[ModuleSubspace, ...]

    @property
    def with_outside(self) -> int:
        """Number of modules with anything outside the pretrained column space."""
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
        """Number of singular vectors compared in all modules."""
        return sum(len(each.figures.similarities) for each in self.modules)

    @property
    def intruder_modules(self) -> int:
        """Number of modules with at least one intruder dimension."""
        return sum(each.figures.intruders > 0 for each in self.modules)

    @property
    def intruders_per_module(self) -> float:
        """Mean number of intruder dimensions of a module."""
        return self.intruders() / len(self.modules)

    @property
    def scaled(self) -> AdapterSubspace | None:
        """The adapter with every module's update at the options' |dW|/|W|; None where they give none."""
        modules = [
            replace(each, figures=each.figures.scaled) for each in self.modules if each.figures.scaled is not None
        ]
        return replace(self, modules=tuple(modules)) if modules else None

    def intruders(self, epsilon: float | None = None) -> int:
        """Count the intruder dimensions in all modules, at the survey's similarity unless another is given."""
        if epsilon is None:
            return sum(each.figures.intruders for each in self.modules)
        return sum(similarity < epsilon for each in self.modules for similarity in each.figures.similarities)


def share_of(parts: Sequence[tuple[SubspaceFigures, float | None]]) -> float | None:
    """Average shares, weighted by the energy of their updates; None without any energy."""
    known = [(figures.update_energy, share) for figures, share in parts if share is not None]
    energy = sum(weight for weight, _ in known)
    return sum(share * weight for weight, share in known) / energy if energy else None


@dataclass(frozen=True)
class SubspaceSurvey:
    """Adapters on one base, with the options of the comparison."""

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

    The plan's base is loaded in fp32, unquantized, on its device, where the singular values are computed too. It takes
    adapters whose adapted weight can be formed, and fully fine-tuned weights; DISeL and Gated LoRA adapters only if the
    options give the constant value of every gate, which other adapters ignore.

    Raises:
        AdapterError, BaseMismatchError: a damaged adapter, one of another base, or one without an adapted weight.
        ConfigError: no adapter, one named twice, or a gate's value for adapters without gates.
    """
    origins = named_origins(adapters)
    chosen, shown = options or SubspaceOptions(), progress or Silent()
    gate = chosen.gate
    gates = [gate if check_weights(adapter, gate) else None for adapter in adapters]
    if gate is not None and not any(gates):
        raise ConfigError(f"none of these adapters has gates ({', '.join(origins)}): leave the gate's value out")
    check_adapters(adapters, plan.model, allow_other_base=allow_other_base)
    surveyed = []
    base = load_base(plan.model.model_copy(update={"quantization": None}), dtype=torch.float32)
    for label, adapter, held in zip(origins, adapters, gates, strict=True):
        modules = []
        with (
            adapted_weights(base, adapter, gate=held, allow_other_base=allow_other_base) as weights,
            shown.task(f"{label}: singular vectors", len(weights.modules), "modules") as advance,
        ):
            positions = positions_of(base.model, weights.modules)
            for name, pretrained, adapted in weights:
                modules.append(ModuleSubspace(positions[name], compare_weights(pretrained, adapted, chosen)))
                advance(1)
        method = adapter_method(adapter)
        scales = method is not None and method.line == "gains" and not read_config(adapter).get("output_modules")
        surveyed.append(AdapterSubspace(label, scales, held, tuple(modules)))
    settings = {"subspace": chosen.counted(), "gate": gate, "model": plan.model.model_dump(mode="json")}
    return SubspaceSurvey(chosen, tuple(surveyed), provenance(plan, base, (), origins, settings))


def check_weights(adapter: Path, gate: float | None = None) -> bool:
    """Say whether an adapter has gates; refuse one without a single adapted weight, before any model is loaded.

    AdapterError if its effect is no change of weights, it has gates and `gate` is None, or it is a classifier.
    """
    record = read_record(adapter)
    if record is not None and record.labels:
        raise AdapterError(f"{adapter} is a classifier: give an adapter of a language model")
    method = adapter_method(adapter)
    gated = method is not None and method.gates
    if gated and gate is None:
        raise AdapterError(
            f"{adapter}: its gates open and shut token by token, so there is no one adapted weight. Give the value at "
            "which to hold every gate (--gate 1, or the mean that `gaintune gates` finds)"
        )
    if not gated:
        check_mergeable(adapter)
    return gated


class WeightPair(NamedTuple):
    """A linear module's name, and its weight in the base and with the adapter, float64 `(out, in)`."""

    name: str
    pretrained: torch.Tensor
    adapted: torch.Tensor


@dataclass(frozen=True)
class AdaptedWeights:
    """Every linear weight that an adapter changes, before and after: iterate over it once.

    The adapter is merged into one weight at a time, in float64, as its method prescribes (products of low-rank factors
    are fp32, as in a merged model). `modules` has a module's weight in the base, and the module with the adapter or the
    fully fine-tuned weight, by name and in the order of the model.
    """

    adapter: Path
    modules: Mapping[str, tuple[torch.Tensor, Any]]
    gate: float | None
    full: bool

    @torch.no_grad()
    def __iter__(self) -> Iterator[WeightPair]:
        """Yield a pair for each module, in the order of the model."""
        for name, (weight, module) in self.modules.items():
            adapted = module.weight.detach().double() if self.full else self._merged(module, name)
            yield WeightPair(name, _oriented(module, weight.double()), _oriented(module, adapted))

    def _merged(self, layer: Any, name: str) -> torch.Tensor:
        """Return a layer's weight with its adapter in it, float64, in the layout of the base's own weight."""
        base = layer.get_base_layer()
        original = base.weight
        base.weight = nn.Parameter(original.detach().double(), requires_grad=False)
        try:
            if self.gate is not None:
                return _with_gates_held(layer, base.weight.detach(), self.gate)
            layer.merge(safe_merge=True)
            return base.weight.detach()
        except (ValueError, NotImplementedError) as error:  # no other RuntimeError: no memory is not about the adapter
            reason = one_line(error)[:300]
            raise AdapterError(f"{self.adapter}: {name} cannot be merged ({reason})") from error
        finally:
            if isinstance(layer, GainLayer):
                layer._restore_weight()  # gains on outputs are merged into the bias too
            base.weight = original
            layer.merged_adapters = []


@contextlib.contextmanager
def adapted_weights(
    base: Base, adapter: Path, *, gate: float | None = None, allow_other_base: bool = False
) -> Iterator[AdaptedWeights]:
    """Attach an adapter to its base for the block, and yield every linear weight before and after.

    The base is in fp32, and afterwards untouched again. `gate` is the constant value of every gate of DISeL and Gated
    LoRA, in (0, 1]; None for all others. Embeddings, norms, biases and modules trained whole beside an adapter are left
    out with a warning.

    Raises:
        AdapterError, BaseMismatchError, ConfigError: as `check_weights` and `load_adapter`; or nothing to compare.
    """
    if not check_weights(adapter, gate) and gate is not None:
        raise ConfigError(f"{adapter} has no gates: leave the gate's value out")
    record = read_record(adapter)
    full = record is not None and record.whole
    tensors: set[str] = set()
    if (adapter / WEIGHTS).is_file():  # without it loading gives the better message
        with safe_open(adapter / WEIGHTS, framework="pt") as file:
            tensors = set(file.keys())
    linear = {name: each.weight for name, each in base.model.named_modules() if isinstance(each, nn.Linear | Conv1D)}
    # copies, because PiSSA and OSF subtract their start from the base's own weight as they are loaded
    before = {
        name: weight.detach().clone()
        for name, weight in linear.items()
        if full or any(tensor.startswith(f"{PREFIX}{name}.") for tensor in tensors)
    }
    own = {id(weight) for weight in linear.values()}  # a tied embedding is its linear head's weight
    rest = {name: each.detach().clone() for name, each in base.model.named_parameters() if full and id(each) not in own}
    with attached(base, adapter, allow_other_base=allow_other_base) as (model, _):
        modules = {name.removeprefix(PREFIX): module for name, module in model.named_modules()}
        pairs = {
            name: (weight, modules[name])
            for name, weight in before.items()
            if full or isinstance(modules[name], BaseTunerLayer)
        }
        if not pairs:
            raise AdapterError(f"{adapter} changes no linear weight of {base.name!r}")
        if full:
            left_out = [name for name, old in rest.items() if not torch.equal(old, model.get_parameter(name))]
        else:
            kinds = BaseTunerLayer | AuxiliaryTrainingWrapper
            left_out = [name for name, module in modules.items() if isinstance(module, kinds) and name not in pairs]
        if left_out:
            more = f" and {len(left_out) - NAMED} more" if len(left_out) > NAMED else ""
            named = f"{', '.join(left_out[:NAMED])}{more}"
            logger.warning("%s also changes what is no linear module's weight, which is left out: %s", adapter, named)
        yield AdaptedWeights(adapter, pairs, gate, full)


def _with_gates_held(layer: LoraLayer, weight: torch.Tensor, gate: float) -> torch.Tensor:
    """Return `W + gate * alpha / r * B A`: a gated layer with every gate at one value."""
    (name,) = layer.active_adapters
    down: Any = layer.lora_A[name]
    up: Any = layer.lora_B[name]
    update = gate * layer.scaling[name] * (up.weight.detach().double() @ down.weight.detach().double())
    return weight + (update.T if isinstance(layer.get_base_layer(), Conv1D) else update)


def _oriented(module: Any, weight: torch.Tensor) -> torch.Tensor:
    """Return a weight as `(out, in)`: Conv1D stores `(in, out)`."""
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return weight.T if isinstance(base, Conv1D) else weight
