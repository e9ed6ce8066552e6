"""Replace a DISeL adapter's values in place, through PEFT's hot swap of LoRA, which knows no gates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any

import torch
from peft import PeftType
from torch import nn

from gaintune.tuners.disel.layer import disel_layers
from gaintune.tuners.disel.model import require_gates


def keys_to_check(known: Mapping[Any, list[str]]) -> list[str]:
    """Name the settings in which two adapters must agree to be swapped: LoRA's, and the kind and rank of the gates."""
    return [*known[PeftType.LORA], "gate_kind", "gate_rank"]


def swap(
    model: nn.Module,
    state_dict: dict[str, torch.Tensor],
    adapter_name: str,
    config: Any,
    lora_only: Callable[..., None],
) -> None:
    """Let PEFT swap the new adapter's tensors, its gate biases padded to the rank on the model.

    PEFT fills up matrices of a smaller rank with zeros, but not vectors. A rank-one part whose row of A is zero adds
    nothing, whatever its gate.
    """
    if config.gate_kind == "sigmoid":
        require_gates(state_dict, adapter_name)
    padded = dict(state_dict)
    for key, value in state_dict.items():
        if ".lora_G." in key and value.dim() == 1:
            try:
                held = attrgetter(key)(model)
            except AttributeError:
                continue  # PEFT names every key that the model does not have
            if len(held) > len(value):
                padded[key] = torch.cat([value, value.new_zeros(len(held) - len(value))])
    lora_only(model, padded, adapter_name, config)


@torch.no_grad()
def pad(model: nn.Module) -> None:
    """Give every gate as many rows as its A has, after PEFT padded A and B for a compiled model."""
    for _, layer in disel_layers(model):
        for name, gate in layer.lora_G.items():
            missing = len(layer.lora_A[name].weight) - len(gate.weight)
            if missing <= 0:
                continue
            for part in ("weight", "bias"):
                value = getattr(gate, part)
                rows = value.new_zeros(missing, *value.shape[1:])
                setattr(gate, part, nn.Parameter(torch.cat([value, rows]), requires_grad=value.requires_grad))
