"""A linear layer with gains on its input or output, feature by feature, or with the gains merged into its weight."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils.quantization_utils import quantization_extra_repr, resolve_quantization_backend
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from gaintune.errors import UnsupportedModuleError
from gaintune.tuners.gain.config import GainConfig
from gaintune.tuners.precision import Float32ParameterDict
from gaintune.tuners.targets import refuse_name


def scale_features(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return `x * (1 + v)` in the dtype of `x`.

    Args:
        x: activations `(..., features)`.
        v: gain minus 1, `(features,)` or broadcastable to `x`.

    In half precision `1 + v` must not be rounded: bfloat16 has nothing between 1 and 1.0078, so gains within 0.3 % of
    1 would not act at all. There `x + x * v` is computed instead, with one rounding at the end; `v` itself may be
    rounded, since that error is relative to `v`.
    """
    if v.device != x.device:
        v = v.to(x.device)
    if x.dtype in (torch.bfloat16, torch.float16):
        return _ScaleHalf.apply(x, v)  # type: ignore[return-value]  # autograd.Function.apply is untyped
    return x * (1 + v.to(torch.promote_types(x.dtype, v.dtype)))


class _ScaleHalf(torch.autograd.Function):
    """Scaling in half precision; autograd's own gradient of addcmul takes three more passes over the activations."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:  # type: ignore[override]  # the context-free form
        return torch.addcmul(x, x, v.to(x.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor], output: torch.Tensor) -> None:
        x, v = inputs
        # x is kept for the gradient of v alone
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, v)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:  # type: ignore[override]
        x, v = ctx.saved_tensors
        grad_x = grad_v = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.addcmul(grad, grad, v.to(grad.dtype))
        if ctx.needs_input_grad[1]:
            grad_v = _sum_to_shape(grad, x, v)
        return grad_x, grad_v


def _sum_to_shape(grad: torch.Tensor, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return `grad * x`, summed in float32 over the dimensions along which `v` was broadcast."""
    # products of scaled gradients leave float16's range; bfloat16 has float32's
    product = grad.float() * x if x.dtype == torch.float16 else grad * x
    if v.dim() == 1:
        return product.reshape(-1, v.numel()).sum(0, dtype=torch.float32).to(v.dtype)
    return product.float().sum_to_size(v.shape).to(v.dtype)


class OriginalWeight:
    """The part of a base layer that a merge replaces: weight object, bias and, where quantized, the weight's state.

    Kept as references: an unmerged layer holds the very tensor it had, not a quotient. That costs the memory of the
    merged weights until the layer is unmerged or unloaded.
    """

    def __init__(self, layer: Any) -> None:
        base = layer.get_base_layer()
        self.wrapped = layer.base_layer
        self.weight, self.bias = getattr(base, "weight", None), getattr(base, "bias", None)
        # bitsandbytes writes into the attributes of the old weight while it makes the new one
        self.weight_attributes = dict(getattr(self.weight, "__dict__", {}))
        attributes = base.__dict__
        self.state = {name: copy.copy(attributes[name]) for name in ("state", "quant_state") if name in attributes}

    def restore(self, layer: Any) -> None:
        """Undo the merge in `layer`."""
        layer.base_layer = self.wrapped  # HQQ replaces the whole layer
        base = layer.get_base_layer()
        if self.weight is not None:
            base.weight = self.weight
            self.weight.__dict__.clear()
            self.weight.__dict__.update(self.weight_attributes)
        if self.bias is not None and base.bias is not self.bias:
            base.bias = self.bias
        base.__dict__.update(self.state)


def refuse_unmergeable(layer: BaseTunerLayer) -> None:
    """Raise `UnsupportedModuleError` for a quantized layer whose weight PEFT cannot read or write."""
    backend = layer.quantization_backend
    if backend is not None and not backend.supports_merge:
        raise UnsupportedModuleError(
            f"Gains cannot be merged into {backend.backend_name} layers: their weights cannot be dequantized. Keep the "
            "adapter beside the model, or load the base unquantized and merge there."
        )


def merge_gain(layer: Any, v: torch.Tensor, *, check_finite: bool, adapters: list[str]) -> None:
    """Replace the weight `W` of the base of `layer` by `W diag(1 + v)`, computed in float32 and then rounded once.

    Gains on outputs make it `diag(1 + v) W`, and scale the bias too. Raises `ValueError` before anything is changed if
    `check_finite` and a product is not finite.
    """
    base = layer.get_base_layer()
    weight = layer.get_base_weight()
    gain = 1 + layer.widened(v.detach()).to(device=weight.device)
    bias = getattr(base, "bias", None) if layer.outputs else None
    merged_bias = None if bias is None else _product(bias.detach(), gain.to(bias.device))
    # the input features are columns, in Conv1D, which stores (in, out), rows; the output features the other way round
    merged = _product(weight, gain.unsqueeze(1) if isinstance(base, Conv1D) != bool(layer.outputs) else gain)
    if check_finite and not all(torch.isfinite(made).all() for made in (merged, merged_bias) if made is not None):
        raise ValueError(
            f"NaNs detected in the merged weights. The adapter {', '.join(adapters)} seems to be broken: its gains, or "
            "the weights, are not finite, or their product leaves the range of the weight's dtype."
        )
    if layer.quantization_backend is None:
        # a new parameter, so that a module which shares the old one keeps it
        base.weight = nn.Parameter(merged, requires_grad=base.weight.requires_grad)
    else:
        layer.set_base_weight(merged)
    if bias is not None and merged_bias is not None:
        base = layer.get_base_layer()  # HQQ replaces the whole layer
        is_parameter = isinstance(bias, nn.Parameter)
        base.bias = nn.Parameter(merged_bias, requires_grad=bias.requires_grad) if is_parameter else merged_bias


def _product(values: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    """Multiply in float32 or wider, and round once."""
    return (values.to(torch.promote_types(values.dtype, torch.float32)) * gain).to(values.dtype)


BASE = "__base__"  # PEFT's name, in mixed batches, for the model without adapters


class GainLayer(BaseTunerLayer):
    """The adapters of one layer: `gain_v[name]` is the gain of adapter `name` minus 1, `(features,)`, float32.

    The features are those of its input, or, where `outputs` is not 0, its last so many of its output: of a module that
    computes queries, keys and values, the keys and values.
    """

    adapter_layer_names: tuple[str, ...] = ("gain_v",)
    other_param_names: tuple[str, ...] = ()

    base_layer: nn.Module
    gain_v: Float32ParameterDict

    def __init__(
        self, base_layer: nn.Module, *, outputs: int = 0, flattened_tokens: bool = False, **quantization: Any
    ) -> None:
        self.base_layer = base_layer
        self.gain_v = Float32ParameterDict()
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._original: OriginalWeight | None = None
        self.flattened_tokens = flattened_tokens
        base = self.get_base_layer()
        self.quantization_backend = resolve_quantization_backend(base, **quantization)
        in_features, out_features = _get_in_out_features(base)
        assert in_features is not None and out_features is not None, "a linear layer has features"
        self.in_features, self.out_features = in_features, out_features
        self.outputs = outputs

    def widened(self, v: torch.Tensor) -> torch.Tensor:
        """Return `v` `(..., features)` with zeros for the output features before those that are scaled."""
        before = self.out_features - self.outputs if self.outputs else 0
        return F.pad(v, (before, 0)) if before else v

    def update_layer(self, adapter_name: str, config: GainConfig) -> None:
        """Add the gains of one adapter: at 1, or at random around 1 where `config.init_weights` is off."""
        refuse_name(adapter_name, self.gain_v)
        features = self.outputs or self.in_features
        v = torch.zeros(features) if config.init_weights else 0.5 * torch.randn(features)
        self.gain_v[adapter_name] = nn.Parameter(v.float())
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move gains, and widen those loaded in half precision; PEFT's own method would narrow to the base's dtype."""
        if adapter_name not in self.gain_v:
            return
        parameter = self.gain_v[adapter_name]
        base = self.get_base_layer()
        target = device if device is not None else self._get_base_layer_device_and_dtype(base)[0]
        offloaded = target is not None and target.type == "meta" and hasattr(base, "_hf_hook")
        if parameter.device.type == "meta" or target is None or offloaded:
            target = parameter.device
        if parameter.device != target or parameter.dtype != torch.float32:
            moved = parameter.data.to(device=target, dtype=torch.float32)
            self.gain_v[adapter_name] = nn.Parameter(moved, requires_grad=parameter.requires_grad)

    def combined_v(self, adapter_names: Iterable[str]) -> torch.Tensor | None:
        """Return the product of the gains of these adapters, minus 1; None where the layer has none of them."""
        total = None
        for name in adapter_names:
            if name in self.gain_v:
                v = self.gain_v[name]
                total = v if total is None else total + v + total * v
        return total

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Absorb gains into the base weight, exactly as all merged adapters together prescribe.

        An active adapter that is not merged keeps acting on the activations. `unmerge` brings back the original weight.
        """
        new = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.gain_v]
        if not new:
            return
        refuse_unmergeable(self)
        before = list(self.merged_adapters)
        self._restore_weight()
        try:
            self._merge_from_original([*before, *new], safe_merge)
        except Exception:
            self._merge_from_original(before, check_finite=False)
            raise

    def _merge_from_original(self, adapter_names: list[str], check_finite: bool) -> None:
        v = self.combined_v(adapter_names)
        if v is None:
            return
        original = OriginalWeight(self)
        try:
            merge_gain(self, v, check_finite=check_finite, adapters=adapter_names)
        except Exception:
            original.restore(self)
            raise
        self._original = original
        self.merged_adapters = list(adapter_names)

    def unmerge(self) -> None:
        """Put back the weight that was there before merging: the same tensor, not a division."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._restore_weight()

    def _restore_weight(self) -> None:
        if self._original is not None:
            self._original.restore(self)
            self._original = None
        self.merged_adapters = []


class GainLinear(nn.Module, GainLayer):
    """`nn.Linear`, `Conv1D` or a quantized linear layer, with gains on its input or on its output."""

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: GainConfig,
        *,
        outputs: int = 0,
        flattened_tokens: bool = False,
        **quantization: Any,
    ) -> None:
        super().__init__()
        GainLayer.__init__(self, base_layer, outputs=outputs, flattened_tokens=flattened_tokens, **quantization)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def forward(
        self, x: torch.Tensor, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """Run the base layer on `x * gain`, `x` being `(..., in_features)`; the dtype is the base's own.

        With gains on outputs it is the base layer's output that is scaled. `adapter_names` names one adapter, or
        "__base__", for each row of the batch.
        """
        v = None
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
        elif adapter_names is not None:
            v = self._rows_v(x, adapter_names)
        else:
            v = self.combined_v(name for name in self.active_adapters if name not in self.merged_adapters)
        if v is None:
            return self.base_layer(x, *args, **kwargs)
        if not self.outputs:
            return self.base_layer(scale_features(x, v), *args, **kwargs)
        return scale_features(self.base_layer(x, *args, **kwargs), self.widened(v))

    def _rows_v(self, x: torch.Tensor, adapter_names: Sequence[str]) -> torch.Tensor | None:
        """Return each row's own gains minus 1; beams and repeated sequences of a row follow one another."""
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        repeats, rest = divmod(len(x), len(adapter_names))
        if rest or repeats == 0 or (repeats > 1 and x.dim() == 2 and not self.flattened_tokens):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if not any(name in self.gain_v for name in adapter_names):
            return None
        names, features = sorted(set(adapter_names)), self.outputs or self.in_features
        zero = x.new_zeros(features, dtype=torch.float32)
        table = torch.stack([self.gain_v[name].to(x.device) if name in self.gain_v else zero for name in names])
        row = torch.tensor([names.index(name) for name in adapter_names], device=x.device).repeat_interleave(repeats)
        return table[row].view(len(x), *[1] * (x.dim() - 2), features)

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)

    def __repr__(self) -> str:
        return "gain." + super().__repr__()
