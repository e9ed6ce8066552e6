"""What GAIN refuses to adapt, found before the model is touched: never adapt a part and say nothing."""

from __future__ import annotations

from functools import partial
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import nn
from transformers.pytorch_utils import Conv1D

from gaintune.errors import UnsupportedModuleError
from gaintune.tuners.gain.config import GainConfig
from gaintune.tuners.gain.mapping import Projections
from gaintune.tuners.targets import matched_modules, refuse_parameters, refuse_shard, refuse_unfit


def check_modules(config: GainConfig, model: nn.Module, quantization: dict[str, Any]) -> None:
    """Raise `UnsupportedModuleError` for the first module that is named but cannot be adapted correctly."""
    matched = matched_modules(config, model)
    refuse_unfit(matched, model, partial(refuse_module, quantization=quantization))
    refuse_parameters(config, model, matched, any_experts=config.ffn)


def refuse_module(module: nn.Module, name: str, quantization: dict[str, Any]) -> None:
    """Only a linear layer has an input on which a gain is a column scale of its weight."""
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    if isinstance(module, BaseTunerLayer) and not hasattr(module, "gain_v"):
        raise UnsupportedModuleError(
            f"{name} already carries an adapter of another method ({type(module).__module__}). Gains in front of it "
            "would scale that adapter's input too. Merge or unload it first, or exclude the module."
        )
    if isinstance(base, nn.Linear | Conv1D):
        refuse_shard(base, name)
        return
    backend = resolve_quantization_backend(base, **quantization)
    fused_norm = type(base).__name__ in ("LayerNormLinear", "LayerNormMLP")  # the norm would undo the gains
    if backend is None or backend.layer_type != "linear" or fused_norm:
        raise UnsupportedModuleError(
            f"{name} is a {type(base).__name__}, not a linear layer: GAIN scales the input of torch.nn.Linear, "
            "transformers' Conv1D and quantized linear layers. Name other modules in `target_modules`, or this one in "
            "`exclude_modules`."
        )


def check_groups(config: GainConfig, model: nn.Module, projections: Projections) -> None:
    """Raise if a group of default modules matches nothing, as for a model class without that part."""
    names = matched_modules(config, model)
    groups = {"attention output projections": projections.attention}
    if config.ffn:
        groups["feed-forward down-projections"] = projections.ffn
    for what, endings in groups.items():
        if not any(_ends_with(name, endings) for name in names):
            raise UnsupportedModuleError(
                f"No {what} found: no module to adapt ends with {' or '.join(endings)}. Please specify "
                "`target_modules` in `peft_config`, and check `exclude_modules` and `layers_to_transform`."
            )


def unmatched_targets(config: GainConfig, model: nn.Module) -> set[str]:
    """The names in a list of `target_modules` that no module is called."""
    if not isinstance(config.target_modules, set):
        return set()
    names = [name for name, _ in model.named_modules()]
    return {target for target in config.target_modules if not any(_ends_with(name, (target,)) for name in names)}


def _ends_with(name: str, endings: tuple[str, ...]) -> bool:
    return any(name == ending or name.endswith(f".{ending}") for ending in endings)
