"""DISeL as a PEFT tuner: PEFT's LoRA with a gate on every rank-one part, and what is refused beforehand."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn
from transformers.pytorch_utils import Conv1D

from gaintune.errors import AdapterError, ConfigError, UnsupportedModuleError
from gaintune.tuners.disel.config import DiselConfig
from gaintune.tuners.disel.layer import add_gates, refusal_to_merge
from gaintune.tuners.targets import (
    matched_modules,
    refuse_name,
    refuse_parameters,
    refuse_parent,
    refuse_shard,
    refuse_unfit,
    with_named_targets,
)


def check_modules(config: DiselConfig, model: nn.Module) -> None:
    """Raise `UnsupportedModuleError` for the first module that is named but cannot be adapted correctly."""
    if config._custom_modules:
        raise UnsupportedModuleError("Custom LoRA layers are not supported: they need not know of gates.")
    # on a copy, since layer replication adds modules to what "all-linear" stands for
    named = with_named_targets(config, model)
    matched = matched_modules(named, model)
    refuse_unfit(matched, model, refuse_module)
    refuse_parameters(named, model, matched, any_experts=config.target_modules == "all-linear")


def refuse_module(module: nn.Module, name: str) -> None:
    """Refuse what is no linear layer, or a quantized layer of PEFT's LoRA that lets no other update in."""
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


class DiselModel(LoraModel):
    """A model whose linear layers have gated low-rank updates.

    Made by `peft.get_peft_model(model, DiselConfig(...))`. See `DiselConfig` for the settings. Merging, conversion to
    LoRA and weighted combination of adapters are refused: none of them can carry a gate.
    """

    mergeable = False

    def _prepare_adapter_config(self, peft_config: DiselConfig, model_config: dict[str, Any]) -> DiselConfig:
        if peft_config.target_modules is None:
            peft_config.target_modules = "all-linear"
        return peft_config

    def _prepare_model(self, peft_config: DiselConfig, model: nn.Module) -> None:  # type: ignore[override]
        peft_config.check()
        if peft_config.target_modules != DUMMY_TARGET_MODULES:
            check_modules(peft_config, model)
        super()._prepare_model(peft_config, model)

    def _create_and_replace(  # type: ignore[override]  # PEFT annotates the base class of the config
        self,
        lora_config: DiselConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        *,
        parameter_name: str | None = None,
    ) -> None:
        refuse_parent(parent, current_key)
        refuse_module(target, current_key)
        refuse_name(adapter_name, getattr(target, "lora_A", {}), current_key)
        super()._create_and_replace(
            lora_config, adapter_name, target, target_name, parent, current_key, parameter_name=parameter_name
        )
        layer = getattr(parent, target_name)
        refuse_layer(layer, current_key)
        add_gates(layer, adapter_name, lora_config)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Return False: LoRA's update is the same for every input."""
        return False

    def _check_merge_allowed(self) -> NoReturn:
        raise refusal_to_merge()

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: the sum of two gated updates is not a gated update of the same rank."""
        raise ConfigError(
            "DISeL adapters cannot be combined into one: their gates differ. Activate several at once with "
            "`model.base_model.set_adapter([...])`; their updates add up."
        )

    def subtract_mutated_init(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: it would convert the adapter to LoRA."""
        raise _refusal_to_convert()

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: Any, adapter_name: str, state_dict: dict[str, Any]
    ) -> dict[str, Any]:
        """Require the gates of a file that PEFT loads: PEFT only warns of missing ones. Keys lack the name here."""
        if config.gate_kind == "sigmoid":
            require_gates(state_dict)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)

    @classmethod
    def _convert_state_dict_for_initial_model(cls, *args: Any, **kwargs: Any) -> NoReturn:
        raise _refusal_to_convert()


def _refusal_to_convert() -> ConfigError:
    return ConfigError("A DISeL adapter cannot be converted to LoRA: save it without an initial model to subtract.")
