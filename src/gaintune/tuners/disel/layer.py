"""What makes a LoRA layer of PEFT a DISeL layer: its gates, two products, and the variant that computes with them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, NoReturn

import torch
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import nn
from torch.nn import functional as F

from gaintune.errors import MergeError, UnsupportedModuleError
from gaintune.tuners.disel.config import DiselConfig
from gaintune.tuners.precision import AtLeastFloat32


class Gate(AtLeastFloat32):
    """`z(x) = G x + c` for one layer, `(..., in_features)` to `(..., r)`; G is `weight`, or `weight @ weight_in`.

    The first product is left to the caller, who has another matrix to multiply the same `x` with: `reads` is that
    matrix, and `forward` takes `x @ reads.T`. Kept in float32 also where A and B are narrower.
    """

    def __init__(
        self,
        in_features: int,
        r: int,
        *,
        rank: int | None = None,
        weight_init: Literal["kaiming", "zeros"] = "kaiming",
        bias_init: float = -3.0,
    ) -> None:
        super().__init__()
        self.weight_in = None if rank is None else nn.Parameter(torch.empty(rank, in_features))
        self.weight = nn.Parameter(torch.empty(r, in_features if rank is None else rank))
        self.bias = nn.Parameter(torch.empty(r))
        self.reset(weight_init, bias_init)

    def reset(self, weight_init: Literal["kaiming", "zeros"], bias_init: float) -> None:
        """Set the start values: every bias at `bias_init` whatever the width, G as nn.Linear's own or at 0."""
        if self.weight_in is not None:
            nn.init.kaiming_uniform_(self.weight_in, a=math.sqrt(5))
        if weight_init == "zeros":
            nn.init.zeros_(self.weight)
        else:
            nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        nn.init.constant_(self.bias, bias_init)

    @property
    def reads(self) -> torch.Tensor:
        """The matrix that multiplies the layer's input."""
        return self.weight if self.weight_in is None else self.weight_in

    def forward(self, product: torch.Tensor) -> torch.Tensor:
        """Return the gate before its sigmoid, in the dtype of `product`."""
        bias = self.bias.to(product.dtype)
        if self.weight_in is None:
            return product + bias
        return F.linear(product, self.weight.to(product.dtype), bias)

    def extra_repr(self) -> str:
        rank = "" if self.weight_in is None else f", rank={len(self.weight_in)}"
        return f"in_features={self.reads.shape[1]}, r={len(self.weight)}{rank}"


def stacked_product(x: torch.Tensor, weights: tuple[torch.Tensor, ...], dtype: torch.dtype) -> torch.Tensor:
    """Multiply `x` by every matrix at once: `(..., rows of all weights)`, computed and returned in `dtype`.

    Autograd's own way would keep a copy of `x` in `dtype`, one for each of the layers that read the same `x`; this
    keeps `x` itself, and reads it once for all weights.
    """
    if not torch.is_grad_enabled():  # where torch.compile does not look into a function with a gradient of its own
        return _StackedProduct.forward(x, dtype, *weights)
    return _StackedProduct.apply(x, dtype, *weights)  # type: ignore[return-value]  # apply is untyped


def add_product(result: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return `result + hidden weight'` in the dtype of `result`; the product is computed in `dtype`, rounded once.

    Args:
        result: what the base layer computes, `(..., out_features)`.
        hidden: `(..., r)`.
        weight: `(out_features, r)`.
    """
    if not torch.is_grad_enabled():
        return _AddProduct.forward(result, hidden, weight, dtype)
    return _AddProduct.apply(result, hidden, weight, dtype)  # type: ignore[return-value]


class _StackedProduct(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor, dtype: torch.dtype, *weights: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return F.linear(x.to(dtype), torch.cat([weight.to(dtype) for weight in weights]))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        x, ctx.dtype, *weights = inputs
        ctx.save_for_backward(x, *weights)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        x, *weights = ctx.saved_tensors
        grad_x, grad_weights = None, [None] * len(weights)
        if ctx.needs_input_grad[0]:
            stacked = torch.cat([weight.to(ctx.dtype) for weight in weights])
            grad_x = (grad @ stacked).to(x.dtype)
        if any(ctx.needs_input_grad[2:]):
            rows = x.reshape(-1, x.shape[-1]).to(ctx.dtype)
            stacked = grad.reshape(-1, grad.shape[-1]).T @ rows
            parts = stacked.split([len(weight) for weight in weights])
            grad_weights = [part.to(weight.dtype) for part, weight in zip(parts, weights, strict=True)]
        return grad_x, None, *grad_weights


class _AddProduct(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(  # type: ignore[override]  # the context-free form
        result: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        return (result + F.linear(hidden.to(dtype), weight.to(dtype))).to(result.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        _, hidden, weight, ctx.dtype = inputs
        ctx.save_for_backward(hidden, weight)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        hidden, weight = ctx.saved_tensors
        wide = grad.to(ctx.dtype)
        grad_hidden = grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_hidden = (wide @ weight.to(ctx.dtype)).to(hidden.dtype)
        if ctx.needs_input_grad[2]:
            rows = hidden.reshape(-1, hidden.shape[-1]).to(ctx.dtype)
            grad_weight = (wide.reshape(-1, wide.shape[-1]).T @ rows).to(weight.dtype)
        return grad, grad_hidden, grad_weight, None


GateObserver = Callable[[str, torch.Tensor], None]
"""Called in every forward pass of a layer with the adapter's name and its gates `(..., r)`, detached."""


class DiselVariant(LoraVariant):
    """`result + scale * B (g(x) * A x)`, `g(x) = sigmoid(G x + c)`; A x and G x are one product."""

    def supports_lora_conversion(self) -> bool:
        return False

    @staticmethod
    def init(module: Any, adapter_name: str, config: DiselConfig, **kwargs: Any) -> None:  # type: ignore[override]
        module.lora_G[adapter_name] = Gate(
            module.in_features,
            module.r[adapter_name],
            rank=config.gate_rank,
            weight_init=config.gate_weight_init,
            bias_init=config.gate_bias_init,
        )
        module._move_adapter_to_device_of_base_layer(adapter_name)

    def forward(  # type: ignore[override]  # PEFT calls it on the instance
        self, module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """Return the layer's output with the update added, `(..., out_features)` in the dtype of `result`."""
        x = module.lora_dropout[active_adapter](x)
        weight_b = module.lora_B[active_adapter].weight
        dtype = compute_dtype(x, weight_b)
        hidden, gates = self.hidden_and_gates(module, active_adapter, x, dtype)
        for observe in module.gate_observers:
            observe(active_adapter, gates.detach())
        return add_product(result, hidden * gates * module.scaling[active_adapter], weight_b, dtype)

    def hidden_and_gates(
        self, module: Any, adapter_name: str, x: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `A x` and `g(x)`, each `(..., r)`, in float32 or wider."""
        weight_a, gate = module.lora_A[adapter_name].weight, module.lora_G[adapter_name]
        product = widened(stacked_product(x, (weight_a, gate.reads), dtype))
        r = len(weight_a)
        return product[..., :r], torch.sigmoid(gate(product[..., r:]))

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        raise refusal_to_merge()

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: torch.Tensor) -> None:
        raise refusal_to_merge()

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        raise refusal_to_merge()


class GatedLoraVariant(DiselVariant):
    """Gated LoRA: `B relu(A x)`, so a rank-one part acts where A's own feature is positive. Gates are 0 or 1."""

    @staticmethod
    def init(module: Any, adapter_name: str, config: DiselConfig, **kwargs: Any) -> None:  # type: ignore[override]
        pass

    def hidden_and_gates(
        self, module: Any, adapter_name: str, x: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = widened(stacked_product(x, (module.lora_A[adapter_name].weight,), dtype))
        return hidden, (hidden > 0).to(hidden.dtype)


def refusal_to_merge() -> MergeError:
    """Return the error that says why there is no merged model."""
    return MergeError(
        "a DISeL adapter cannot be merged: its gates depend on the input, and a weight cannot. Serve the model with "
        "the adapter on it."
    )


def refuse_delta_weight(adapter: str) -> NoReturn:
    """Refuse, in place of the layer's own method, which gives the update with all gates open."""
    raise refusal_to_merge()


def compute_dtype(x: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    """Return autocast's dtype where it is on, else the adapter's own."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return weight.dtype


def widened(product: torch.Tensor) -> torch.Tensor:
    """Return at least float32: a gate near 0.05 has two digits in bfloat16, and (..., r) is small."""
    return product.to(torch.promote_types(product.dtype, torch.float32))


def resolve_variant(config: Any, **kwargs: Any) -> DiselVariant:
    """Return the variant of a configuration; stands in for the layer's own method, which knows LoRA's variants only."""
    if not isinstance(config, DiselConfig):
        raise UnsupportedModuleError(
            f"This layer has DISeL adapters and takes no adapter of another kind ({type(config).__name__}) beside them."
        )
    return GatedLoraVariant() if config.gate_kind == "relu" else DiselVariant()


def add_gates(layer: Any, adapter_name: str, config: DiselConfig) -> None:
    """Make the adapter `adapter_name` of a LoRA layer a DISeL adapter; gates go where the layer is."""
    if not hasattr(layer, "lora_G"):
        layer.lora_G = nn.ModuleDict()
        layer.gate_observers = []
        layer.adapter_layer_names = (*layer.adapter_layer_names, "lora_G")
        layer.cast_input_dtype_enabled = False  # `stacked_product` casts, and keeps the input as it is
        layer.resolve_lora_variant = resolve_variant
        layer.get_delta_weight = refuse_delta_weight
    if adapter_name not in layer.lora_variant:
        layer.lora_variant[adapter_name] = variant = resolve_variant(config)
        variant.init(layer, adapter_name, config)
        layer.set_adapter(layer.active_adapters, inference_mode=config.inference_mode)


def disel_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield every DISeL layer of a model with its name.

    Each has `lora_G` (adapter name -> `Gate`; empty for Gated LoRA) and `gate_observers`, a list of `GateObserver`:
    what is appended there is called in every forward pass, and costs nothing while the list is empty.
    """
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and hasattr(module, "lora_G"):
            yield name, module
