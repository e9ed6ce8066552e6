"""What DISeL refuses to adapt, found before the model is touched: never adapt a part and say nothing."""

from __future__ import annotations

import copy
from collections.abc import Iterable

from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers
from torch import nn
from transformers.pytorch_utils import Conv1D

from gaintune.errors import AdapterError, UnsupportedModuleError
from gaintune.tuners.disel.config import DiselConfig
from gaintune.tuners.targets import matched_modules, refuse_parameters, refuse_shard, refuse_unfit


def check_modules(config: DiselConfig, model: nn.Module) -> None:
    """Raise `UnsupportedModuleError` for the first module that is named but cannot be adapted correctly."""
    if config._custom_modules:
        raise UnsupportedModuleError("Custom LoRA layers are not supported: they need not know of gates.")
    # on a copy, since layer replication adds modules to what "all-linear" stands for
    named = _maybe_include_all_linear_layers(copy.copy(config), model)
    matched = matched_modules(named, model)
    refuse_unfit(matched, model, refuse_module)
    refuse_parameters(named, model, matched, any_experts=config.target_modules == "all-linear")


def refuse_module(module: nn.Module, name: str) -> None:
    """Gates read a linear layer's input, and only some quantized layers of PEFT's LoRA let another update in."""
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    if isinstance(module, BaseTunerLayer) and not hasattr(module, "lora_G"):
        raise UnsupportedModuleError(
            f"{name} already carries an adapter of another method ({type(module).__module__}). Merge or unload it "
            "first, or exclude the module."
        )
    if not isinstance(base, nn.Linear | Conv1D):
        raise UnsupportedModuleError(
            f"{name} is a {type(base).__name__}, which DISeL does not adapt: its gates read the input of "
            "torch.nn.Linear, transformers' Conv1D and bitsandbytes' linear layers. Name other modules in "
            "`target_modules`, or this one in `exclude_modules`."
        )
    refuse_shard(base, name)


def refuse_layer(layer: nn.Module, name: str) -> None:
    """Raise for a LoRA layer whose forward pass would pass the gates by."""
    from peft.tuners import lora

    supported = [lora.Linear, *(getattr(lora, kind, lora.Linear) for kind in ("Linear8bitLt", "Linear4bit"))]
    if type(layer) not in supported:  # other quantized layers derive from lora.Linear
        raise UnsupportedModuleError(
            f"{name} became a {type(layer).__name__}, whose forward pass does not know gates. Load the base "
            "unquantized or through bitsandbytes."
        )


def require_gates(keys: Iterable[str], adapter_name: str = "") -> None:
    """Raise `AdapterError` where a file's keys, with the adapter's name in them if one is given, lack gates.

    PEFT only warns of keys that are missing when it loads, and fills them with zeros when it swaps.
    """
    known, inner = set(keys), f".{adapter_name}" if adapter_name else ""
    matrix = f".lora_A{inner}.weight"
    modules = [key.removesuffix(matrix) for key in known if key.endswith(matrix)]
    bare = sorted(
        name for name in modules if not {f"{name}.lora_G{inner}.weight", f"{name}.lora_G{inner}.bias"} <= known
    )
    if bare:
        raise AdapterError(
            f"The file has {len(bare)} modules (first: {bare[0]}) without their gates (lora_G): it was not written "
            "whole, or by another program. With other gates it would be another adapter."
        )
