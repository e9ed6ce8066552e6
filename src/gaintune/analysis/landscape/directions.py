"""Move a model from its pretrained weights toward adapted ones, beyond them, and back bit for bit.

`W(t) = W + sum_i t_i D_i`, where `D_i` is what adapter i changes of the pretrained weights W: the coordinates of the
GAIN paper's loss landscapes (arXiv 2604.04516, appendix E).
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import nn
from transformers.pytorch_utils import Conv1D

from gaintune.adapters import absorb, adapter_method, add_adapter, attached, check_mergeable, read_config
from gaintune.errors import AdapterError, ConfigError
from gaintune.models import Base
from gaintune.tuners.gain import GainLayer

Way = Literal["gains", "scale", "gated", "weights"]

WAYS: dict[Way, str] = {
    "gains": "v, the gain minus 1, is scaled: exactly the weights W diag(1 + t v), of outputs diag(1 + t v) W",
    "scale": "B A is scaled: exactly the weights W + t (alpha / r) B A",
    "gated": "B is scaled and the gates are those of its input, y = W x + t (alpha / r) B diag(g(x)) A x: a line of "
    "updates that depend on the input, not of weights",
    "weights": "the weights are interpolated in fp32, W + t (W' - W)",
}
"""What is scaled by t, for each way."""


@dataclass(frozen=True)
class Geometry:
    """Lengths and angles of the directions in the space of the pretrained weights.

    Attributes:
        lengths: Frobenius norm of each direction over all weights it changes.
        base_length: Frobenius norm of the pretrained weights that any of them changes.
        cosine: of the angle between two directions; None for one. For gated updates, of B A with every gate open.
        parameter_cosine: of the angle between the vectors v of two GAIN adapters, whatever the weights they multiply.
    """

    lengths: tuple[float, ...]
    base_length: float
    cosine: float | None = None
    parameter_cosine: float | None = None


def way_of(adapters: Sequence[Path]) -> Way:
    """Return how a model moves toward adapters: through their parameters where all are of one kind that allows it.

    Raises:
        AdapterError: a folder that is no adapter.
        ConfigError: a DISeL adapter beside one of another method: they share no space to move in.
    """
    ways: list[Way] = [_own_way(folder) for folder in adapters]
    if len(set(ways)) == 1:
        return ways[0]
    if "gated" in ways:
        raise ConfigError(
            f"{adapters[ways.index('gated')]} has gates, so its update is no change of weights, and spans no plane "
            "with an adapter of another method: give two adapters of one method"
        )
    return "weights"


def _own_way(folder: Path) -> Way:
    method = adapter_method(folder)
    if method is None or method.trains_base:
        return "weights"
    beside = read_config(folder).get("modules_to_save")
    if method.gates and beside:
        raise AdapterError(f"{folder}: weights saved beside gates ({beside[0]}) cannot be moved along with them")
    odd = method.line == "scale" and not _is_plain(LoraConfig.from_pretrained(str(folder)))
    way = "weights" if beside or odd else method.line
    if way == "weights":
        check_mergeable(folder)
    return way


def _is_plain(config: Any) -> bool:
    """Tell whether a LoRA configuration adds `(alpha / r) B A` to the pretrained weights and does nothing else."""
    variants = [entry.name for entry in fields(LoraConfig) if entry.metadata.get("is_lora_variant")]
    others = ("use_qalora", "megatron_config", "lora_bias", "target_parameters", "layer_replication")
    odd = any(getattr(config, name, None) for name in (*variants, *others, "trainable_token_indices"))
    return not odd and config.bias == "none" and config.init_lora_weights in (True, False, "gaussian")


@contextlib.contextmanager
def directions(base: Base, adapters: Sequence[str | Path], *, allow_other_base: bool = False) -> Iterator[Directions]:
    """Open one or two adapters' directions on a base; afterwards `base.model` is what it was, bit for bit.

    Yields a `model` with `move(position)`, which puts it at `W + sum_i position_i D_i` (zeros are the pretrained model,
    a single 1 an adapted one), and with `geometry()`, in fp64. The base has to be in fp32 where `way_of` says weights.

    Raises:
        AdapterError, BaseMismatchError: damaged, of another base, or of a method whose effect is no change of weights.
        ConfigError: adapters that share no space to move in, or a base in too few bits.
    """
    folders = [Path(folder) for folder in adapters]
    way = way_of(folders)
    flags = {name: parameter.requires_grad for name, parameter in base.model.named_parameters()}
    try:
        if way == "weights":  # merged into copies of the base, so nothing is attached to it
            weights = _Weights(base, folders, allow_other_base)
            try:
                yield weights
            finally:
                weights.move([0.0] * len(folders))
        else:
            with attached(base, folders[0], allow_other_base=allow_other_base) as (model, _):
                assert isinstance(model, PeftModel), "a full model is moved by its weights"
                for number, folder in enumerate(folders[1:], start=2):
                    add_adapter(model, base, folder, f"number{number}", allow_other_base=allow_other_base)
                yield _Gains(model) if way == "gains" else _Scales(model)
    finally:
        for name, parameter in base.model.named_parameters():
            parameter.requires_grad_(flags[name])


class _Gains:
    """`W diag(1 + sum_i t_i v_i)`: one adapter of a layer carries the sum, the others rest at a gain of 1."""

    def __init__(self, model: PeftModel) -> None:
        self.model: nn.Module = model
        self._names = _activate_all(model)
        self._vectors = {
            layer: {name: layer.gain_v[name].detach().clone() for name in self._names if name in layer.gain_v}
            for layer in model.modules()
            if isinstance(layer, GainLayer)
        }

    def move(self, position: Sequence[float]) -> None:
        at = dict(zip(self._names, position, strict=True))
        with torch.no_grad():
            for layer, vectors in self._vectors.items():
                total = sum(at[name] * v for name, v in vectors.items())
                for number, name in enumerate(vectors):
                    layer.gain_v[name].copy_(torch.as_tensor(total) if number == 0 else torch.zeros_like(vectors[name]))

    def geometry(self) -> Geometry:
        count = len(self._names)
        weights, vectors, base = _Gram(count), _Gram(count), 0.0
        for layer, own in self._vectors.items():
            module: Any = layer.get_base_layer()
            # GPT-2's layers keep their weight as (in, out)
            columns = layer.get_base_weight().double().square()
            columns = columns.sum(dim=1 if isinstance(module, Conv1D) != bool(layer.outputs) else 0)
            if layer.outputs and module.bias is not None:  # rows of the weight, and the bias
                columns = columns + module.bias.detach().double().square()
            base += float(columns.sum())
            columns = columns[-layer.outputs :]
            v = {self._names.index(name): tensor.double() for name, tensor in own.items()}
            vectors.add(v)
            weights.add({number: tensor * columns.sqrt() for number, tensor in v.items()})
        return Geometry(weights.lengths(), math.sqrt(base), weights.cosine(), vectors.cosine())


class _Scales:
    """`(alpha / r) B A`, or with gates `(alpha / r) B diag(g(x)) A`, times t: a factor on each layer's scale."""

    def __init__(self, model: PeftModel) -> None:
        self.model: nn.Module = model
        self._names = _activate_all(model)
        self._scales = {layer: dict(layer.scaling) for layer in model.modules() if isinstance(layer, LoraLayer)}

    def move(self, position: Sequence[float]) -> None:
        at = dict(zip(self._names, position, strict=True))
        for layer, scales in self._scales.items():
            layer.scaling.update({name: at[name] * scale for name, scale in scales.items()})

    def geometry(self) -> Geometry:
        gram, base = _Gram(len(self._names)), 0.0
        for layer, scales in self._scales.items():
            kind: Any = type(layer)  # gives the update with all gates open, which a gated layer itself refuses
            now = dict(layer.scaling)
            layer.scaling.update(scales)
            gram.add({self._names.index(name): kind.get_delta_weight(layer, name).double() for name in scales})
            layer.scaling.update(now)
            base += float(dequantize_module_weight(layer.get_base_layer()).double().square().sum())
        return Geometry(gram.lengths(), math.sqrt(base), gram.cosine())


def _activate_all(model: PeftModel) -> list[str]:
    """Put all adapters of a model to work, frozen, and return their names."""
    names = list(model.peft_config)
    tuner: Any = model.base_model
    tuner.set_adapter(names)
    model.requires_grad_(False)
    return names


class _Weights:
    """`W + sum_i t_i (W_i - W)` in fp32, for every weight that differs in any of the merged models."""

    def __init__(self, base: Base, adapters: Sequence[Path], allow_other_base: bool) -> None:
        self.model: nn.Module = base.model
        own = dict(base.model.named_parameters())
        if any(parameter.dtype != torch.float32 for parameter in own.values()):
            raise ConfigError(
                "weights are interpolated in fp32: a small step is lost in fewer bits. Load the base so, unquantized"
            )
        self._deltas: list[dict[str, torch.Tensor]] = []
        for folder in adapters:
            apart = replace(base, model=copy.deepcopy(base.model))
            merged, _ = absorb(apart, folder, torch.float32, allow_other_base=allow_other_base)
            theirs = dict(merged.named_parameters())
            if theirs.keys() != own.keys():
                raise AdapterError(f"{folder}: merging it changes which weights the base has: nothing to interpolate")
            pairs = ((name, theirs[name].detach(), weight.detach()) for name, weight in own.items())
            self._deltas.append({name: one - zero for name, one, zero in pairs if not torch.equal(one, zero)})
            if not self._deltas[-1]:
                raise AdapterError(f"{folder}: merging it changes no weight, so there is no direction to go in")
        touched = {name for delta in self._deltas for name in delta}
        self._weights = {name: (weight, weight.data) for name, weight in own.items() if name in touched}

    def move(self, position: Sequence[float]) -> None:
        for name, (weight, zero) in self._weights.items():
            steps = [(t, delta[name]) for t, delta in zip(position, self._deltas, strict=True) if name in delta and t]
            moved = zero.clone() if steps else zero
            for t, delta in steps:
                moved.add_(delta, alpha=t)
            weight.data = moved

    def geometry(self) -> Geometry:
        gram = _Gram(len(self._deltas))
        for name in self._weights:
            gram.add({i: delta[name].double() for i, delta in enumerate(self._deltas) if name in delta})
        base = sum(float(zero.double().square().sum()) for _, zero in self._weights.values())
        return Geometry(gram.lengths(), math.sqrt(base), gram.cosine())


Directions = _Gains | _Scales | _Weights


class _Gram:
    """Inner products of directions, summed over layers; a direction that lacks a layer is zero there."""

    def __init__(self, count: int) -> None:
        self._sums = torch.zeros(count, count, dtype=torch.float64)

    def add(self, parts: dict[int, torch.Tensor]) -> None:
        for i, one in parts.items():
            for j, other in parts.items():
                self._sums[i, j] += (one * other).sum().cpu()

    def lengths(self) -> tuple[float, ...]:
        return tuple(self._sums.diagonal().sqrt().tolist())

    def cosine(self) -> float | None:
        """Return the cosine of two directions; None for one, or where one has no length."""
        lengths = self.lengths()
        if len(lengths) != 2 or 0.0 in lengths:
            return None
        return float(self._sums[0, 1]) / (lengths[0] * lengths[1])
