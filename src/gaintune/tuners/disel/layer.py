"""What makes a LoRA layer of PEFT a DISeL layer: its gates, and the variant that computes with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import nn

from gaintune.errors import MergeError, UnsupportedModuleError
from gaintune.tuners.disel.config import DiselConfig
from gaintune.tuners.disel.gate import Gate
from gaintune.tuners.disel.products import add_product, stacked_product

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
        """The layer's output with the update added, `(..., out_features)` in the dtype of `result`."""
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
        """`A x` and `g(x)`, each `(..., r)`, in float32 or wider."""
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
    """Why there is no merged model."""
    return MergeError(
        "a DISeL adapter cannot be merged: its gates depend on the input, and a weight cannot. Serve the model with "
        "the adapter on it."
    )


def refuse_delta_weight(adapter: str) -> NoReturn:
    """Stands in for the layer's own method, which gives the update with all gates open."""
    raise refusal_to_merge()


def compute_dtype(x: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    """Autocast's dtype where it is on, else the adapter's own."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return weight.dtype


def widened(product: torch.Tensor) -> torch.Tensor:
    """At least float32: a gate near 0.05 has two digits in bfloat16, and (..., r) is small."""
    return product.to(torch.promote_types(product.dtype, torch.float32))


def resolve_variant(config: Any, **kwargs: Any) -> DiselVariant:
    """The variant of a configuration; stands in for the layer's own method, which knows LoRA's variants only."""
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
    """Every DISeL layer of a model with its name.

    Each has `lora_G` (adapter name -> `Gate`; empty for Gated LoRA) and `gate_observers`, a list of `GateObserver`:
    what is appended there is called in every forward pass, and costs nothing while the list is empty.
    """
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and hasattr(module, "lora_G"):
            yield name, module
