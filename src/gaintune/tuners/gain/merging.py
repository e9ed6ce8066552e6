"""Absorbing gains into a base layer's weight, and putting the original weight back bit for bit."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from gaintune.errors import UnsupportedModuleError


class OriginalWeight:
    """What a merge replaces in a base layer: its weight object and, where quantized, the state that belongs to it.

    Kept as references: an unmerged layer holds the very tensor it had, not a quotient. That costs the memory of the
    merged weights until the layer is unmerged or unloaded.
    """

    def __init__(self, layer: Any) -> None:
        base = layer.get_base_layer()
        self.wrapped = layer.base_layer
        self.weight = getattr(base, "weight", None)
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

    Raises `ValueError` before anything is changed if `check_finite` and the product is not finite.
    """
    base = layer.get_base_layer()
    weight = layer.get_base_weight()
    gain = 1 + v.detach().to(device=weight.device)
    if isinstance(base, Conv1D):  # stores (in, out): the input features are rows
        gain = gain.unsqueeze(1)
    merged = (weight.to(torch.promote_types(weight.dtype, torch.float32)) * gain).to(weight.dtype)
    if check_finite and not torch.isfinite(merged).all():
        raise ValueError(
            f"NaNs detected in the merged weights. The adapter {', '.join(adapters)} seems to be broken: its gains, or "
            "the weights, are not finite, or their product leaves the range of the weight's dtype."
        )
    if layer.quantization_backend is None:
        # a new parameter, so that a module which shares the old one keeps it
        base.weight = nn.Parameter(merged, requires_grad=base.weight.requires_grad)
    else:
        layer.set_base_weight(merged)
