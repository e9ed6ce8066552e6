"""DISeL as a PEFT tuner: PEFT's LoRA, with a gate on every rank-one part."""

from __future__ import annotations

from typing import Any, NoReturn

from peft.tuners.lora import LoraModel
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn

from gaintune.errors import ConfigError, UnsupportedModuleError
from gaintune.tuners.disel.checks import check_modules, refuse_layer, refuse_module, require_gates
from gaintune.tuners.disel.config import DiselConfig
from gaintune.tuners.disel.layer import add_gates, refusal_to_merge
from gaintune.tuners.targets import refuse_parent


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
        if adapter_name in getattr(target, "lora_A", {}):
            raise UnsupportedModuleError(
                f"{current_key} already has an adapter called {adapter_name!r}: a second adapter needs a name of its "
                "own, and a model is wrapped by get_peft_model once. Call `unload()` or `delete_adapter` to start over."
            )
        super()._create_and_replace(
            lora_config, adapter_name, target, target_name, parent, current_key, parameter_name=parameter_name
        )
        layer = getattr(parent, target_name)
        refuse_layer(layer, current_key)
        add_gates(layer, adapter_name, lora_config)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Never: LoRA's update is the same for every input."""
        return False

    def _check_merge_allowed(self) -> NoReturn:
        raise refusal_to_merge()

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: the sum of two gated updates is not a gated update of the same rank."""
        raise ConfigError(
            "DISeL adapters cannot be combined into one: their gates differ. Activate several at once with "
            "`model.base_model.set_adapter([...])`; their updates add up."
        )

    def subtract_mutated_init(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: it would convert the adapter to LoRA."""
        raise _refusal_to_convert()

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: Any, adapter_name: str, state_dict: dict[str, Any]
    ) -> dict[str, Any]:
        """Called by PEFT as it loads a file; keys are without the adapter's name. PEFT only warns of missing ones."""
        if config.gate_kind == "sigmoid":
            require_gates(state_dict)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)

    @classmethod
    def _convert_state_dict_for_initial_model(cls, *args: Any, **kwargs: Any) -> NoReturn:
        raise _refusal_to_convert()


def _refusal_to_convert() -> ConfigError:
    return ConfigError("A DISeL adapter cannot be converted to LoRA: save it without an initial model to subtract.")
