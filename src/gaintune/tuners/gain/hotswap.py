"""Replace an adapter's gains by those of another file while the model, compiled or not, stays as it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from gaintune.errors import AdapterError
from gaintune.tuners.gain.layer import GainLayer


def keys_to_check(known: Mapping[Any, list[str]]) -> list[str]:
    """Name the settings in which two adapters must agree to be swapped: none."""
    return []


def pad(model: nn.Module) -> None:
    """Leave the model as it is: gains have no rank."""


def swap(
    model: nn.Module, state_dict: Mapping[str, torch.Tensor], adapter_name: str, config: Any, lora_only: Any
) -> None:
    """Copy the gains in `state_dict` (keys with the adapter's name in them) into the adapter `adapter_name`.

    Layers which the file does not adapt go to gain 1. Raises before anything is changed: `ValueError` for a merged
    adapter, `AdapterError` for keys the model does not have, and for shapes or sides of a layer that differ.
    """
    model = getattr(model, "_orig_mod", model)
    scaled = tuple(config.output_modules or ())
    targets: dict[str, nn.Parameter] = {}
    for name, module in model.named_modules():
        if isinstance(module, GainLayer) and adapter_name in module.gain_v:
            if adapter_name in module.merged_adapters:
                raise ValueError(
                    f"Cannot hot-swap adapter {adapter_name!r} because it is merged into the base weights. Call "
                    "`unmerge_adapter()` first."
                )
            key = f"{name}.gain_v.{adapter_name}"
            targets[key] = module.gain_v[adapter_name]
            output = any(f".{name}".endswith(f".{ending}") for ending in scaled)
            if key in state_dict and output != bool(module.outputs):
                sides = ("input", "output") if output else ("output", "input")
                raise AdapterError(f"{name} has gains on its {sides[0]} here, and on its {sides[1]} in the new file.")
    unexpected = sorted(set(state_dict) - set(targets))
    if unexpected:
        raise AdapterError(
            f"Hot swap into adapter {adapter_name!r} needs the same adapted layers; the new file also has "
            f"{', '.join(unexpected)}. Load it as an adapter of its own instead."
        )
    for key, value in state_dict.items():
        if value.shape != targets[key].shape:
            shapes = f"{tuple(value.shape)} in the new file, {tuple(targets[key].shape)} here"
            raise AdapterError(f"The gains {key} have shape {shapes}.")
    with torch.no_grad():
        for key, parameter in targets.items():
            new = state_dict.get(key)
            if new is None:
                parameter.zero_()
            else:
                parameter.copy_(new)
