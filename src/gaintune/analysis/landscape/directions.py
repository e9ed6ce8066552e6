"""Moving a model from its pretrained weights toward adapted ones, beyond them, and back bit for bit.

`W(t) = W + sum_i t_i D_i`, where `D_i` is what adapter i changes of the pretrained weights W: the coordinates of the
GAIN paper's loss landscapes (arXiv 2604.04516, appendix E).
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import nn
from transformers.pytorch_utils import Conv1D

from gaintune.adapters import absorb, adapter_method, add_adapter, load_adapter, read_config, strip_adapters
from gaintune.errors import AdapterError, ConfigError
from gaintune.models import Base
from gaintune.tuners.gain.layer import GainLayer

Way = Literal["gains", "scale", "gated", "weights"]

WAYS: dict[Way, str] = {
    "gains": "v, the gain minus 1, is scaled: exactly the weights W diag(1 + t v)",
    "scale": "B A is scaled: exactly the weights W + t (alpha / r) B A",
    "gated": "B is scaled and the gates are those of its input, y = W x + t (alpha / r) B diag(g(x)) A x: a line of "
    "updates that depend on the input, not of weights",
    "weights": "the weights are interpolated in fp32, W + t (W' - W)",
}
"""What is scaled by t, for each way."""


@dataclass(frozen=True)
class Geometry:
    """How the directions lie in the space of the pretrained weights.

    Attributes:
        lengths: Frobenius norm of each direction over all weights it changes.
        base_length: Frobenius norm of the pretrained weights that any of them changes.
        cosine: of the angle between two directions; None for one. Of gated updates it is that of B A, every gate open.
        parameter_cosine: of the angle between the vectors v of two GAIN adapters, whatever the weights they multiply.
    """

    lengths: tuple[float, ...]
    base_length: float
    cosine: float | None = None
    parameter_cosine: float | None = None


class Directions(Protocol):
    """A model that can be moved along the directions of one or two adapters."""

    model: nn.Module

    def move(self, place: Sequence[float]) -> None:
        """Put the model at `W + sum_i place_i D_i`: zeros are the pretrained model, a single 1 an adapted one."""
        ...

    def geometry(self) -> Geometry:
        """Lengths and angles of the directions, computed in fp64."""
        ...

    def close(self) -> None:
        """Leave the base as it was."""
        ...


def way_of(adapters: Sequence[Path]) -> Way:
    """How a model is moved toward these adapters: through their parameters where all are of one kind that allows it.

    Raises:
        AdapterError: a folder that is no adapter.
        ConfigError: a DISeL adapter beside one of another method: they share no space to move in.
    """
    ways: dict[Path, Way] = {folder: _own_way(folder) for folder in adapters}
    if len(set(ways.values())) == 1:
        return next(iter(ways.values()))
    gated = [str(folder) for folder, way in ways.items() if way == "gated"]
    if gated:
        raise ConfigError(
            f"{gated[0]} has gates, so its update is no change of weights, and spans no plane with an adapter of "
            "another method: give two adapters of one method"
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
    return "weights" if beside or odd else method.line


def _is_plain(config: Any) -> bool:
    """Whether a LoRA configuration adds `(alpha / r) B A` to the pretrained weights and does nothing else."""
    variants = [entry.name for entry in fields(LoraConfig) if entry.metadata.get("is_lora_variant")]
    others = ("use_qalora", "megatron_config", "lora_bias", "target_parameters", "layer_replication")
    odd = any(getattr(config, name, None) for name in (*variants, *others, "trainable_token_indices"))
    return not odd and config.bias == "none" and config.init_lora_weights in (True, False, "gaussian")


@contextlib.contextmanager
def directions(base: Base, adapters: Sequence[str | Path], *, allow_other_base: bool = False) -> Iterator[Directions]:
    """Open one or two adapters' directions on a base; afterwards `base.model` is what it was, bit for bit.

    Args:
        base: the pretrained model; in fp32 where `way_of` says weights.
        adapters: one or two adapter folders.
        allow_other_base: take adapters that were trained on another base.

    Raises:
        AdapterError, BaseMismatchError: damaged, of another base, or of a method whose effect is no change of weights.
        ConfigError: adapters that cannot be set side by side, or a base in too few bits.
    """
    folders = [Path(folder) for folder in adapters]
    way = way_of(folders)
    flags = {name: parameter.requires_grad for name, parameter in base.model.named_parameters()}
    kinds: dict[Way, Callable[[Base, Sequence[Path], bool], Directions]] = {
        "gains": _Gains, "scale": _Scales, "gated": _Scales, "weights": _Weights
    }  # fmt: skip
    try:
        opened = kinds[way](base, folders, allow_other_base)
        try:
            yield opened
        finally:
            opened.close()
    finally:
        for name, parameter in base.model.named_parameters():
            parameter.requires_grad_(flags[name])


class _Attached:
    """Adapters side by side on a base."""

    def __init__(self, base: Base, adapters: Sequence[Path], allow_other_base: bool) -> None:
        self._base = base
        first = load_adapter(base, adapters[0], allow_other_base=allow_other_base)
        assert isinstance(first, PeftModel), "a full model is moved by its weights"
        self.model: nn.Module = first
        self._names = ["default"]
        try:
            for number, folder in enumerate(adapters[1:], start=2):
                add_adapter(first, base, folder, f"number{number}", allow_other_base=allow_other_base)
                self._names.append(f"number{number}")
        except Exception:
            self.close()
            raise
        tuner: Any = first.base_model
        tuner.set_adapter(self._names)
        first.requires_grad_(False)

    def close(self) -> None:
        strip_adapters(self._base.model)


class _Gains(_Attached):
    """`W diag(1 + sum_i t_i v_i)`: one adapter of a layer carries the sum, the others rest at a gain of 1."""

    def __init__(self, base: Base, adapters: Sequence[Path], allow_other_base: bool) -> None:
        super().__init__(base, adapters, allow_other_base)
        self._layers = [layer for layer in self.model.modules() if isinstance(layer, GainLayer)]
        self._learnt = [
            {name: layer.gain_v[name].detach().clone() for name in self._names if name in layer.gain_v}
            for layer in self._layers
        ]

    def move(self, place: Sequence[float]) -> None:
        at = dict(zip(self._names, place, strict=True))
        with torch.no_grad():
            for layer, learnt in zip(self._layers, self._learnt, strict=True):
                total = sum(at[name] * v for name, v in learnt.items())
                for number, name in enumerate(learnt):
                    layer.gain_v[name].copy_(torch.as_tensor(total) if number == 0 else torch.zeros_like(learnt[name]))

    def geometry(self) -> Geometry:
        count = len(self._names)
        weights, vectors, base = _Gram(count), _Gram(count), 0.0
        for layer, learnt in zip(self._layers, self._learnt, strict=True):
            weight = layer.get_base_weight().double()
            # GPT-2's layers keep their weight as (in, out)
            columns = weight.square().sum(dim=1 if isinstance(layer.get_base_layer(), Conv1D) else 0)
            base += float(columns.sum())
            v = {self._names.index(name): tensor.double() for name, tensor in learnt.items()}
            vectors.add(v)
            weights.add({number: tensor * columns.sqrt() for number, tensor in v.items()})
        return Geometry(weights.lengths(), math.sqrt(base), weights.cosine(), vectors.cosine())


class _Scales(_Attached):
    """`(alpha / r) B A`, or with gates `(alpha / r) B diag(g(x)) A`, times t: a factor on each layer's scale."""

    def __init__(self, base: Base, adapters: Sequence[Path], allow_other_base: bool) -> None:
        super().__init__(base, adapters, allow_other_base)
        self._layers = [layer for layer in self.model.modules() if isinstance(layer, LoraLayer)]
        self._scales = [dict(layer.scaling) for layer in self._layers]

    def move(self, place: Sequence[float]) -> None:
        at = dict(zip(self._names, place, strict=True))
        for layer, scales in zip(self._layers, self._scales, strict=True):
            for name, scale in scales.items():
                layer.scaling[name] = at[name] * scale

    def geometry(self) -> Geometry:
        gram, base = _Gram(len(self._names)), 0.0
        for layer, scales in zip(self._layers, self._scales, strict=True):
            kind: Any = type(layer)  # its update is with all gates open, which a gated layer itself refuses to give
            now = dict(layer.scaling)
            layer.scaling.update(scales)
            gram.add({self._names.index(name): kind.get_delta_weight(layer, name).double() for name in scales})
            layer.scaling.update(now)
            base += float(dequantize_module_weight(layer.get_base_layer()).double().square().sum())
        return Geometry(gram.lengths(), math.sqrt(base), gram.cosine())


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

    def move(self, place: Sequence[float]) -> None:
        for name, (weight, zero) in self._weights.items():
            steps = [(t, delta[name]) for t, delta in zip(place, self._deltas, strict=True) if name in delta and t]
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

    def close(self) -> None:
        for weight, zero in self._weights.values():
            weight.data = zero


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
        """Between two directions of any length; None otherwise."""
        lengths = self.lengths()
        if len(lengths) != 2 or 0.0 in lengths:
            return None
        return float(self._sums[0, 1]) / (lengths[0] * lengths[1])
