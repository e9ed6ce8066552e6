"""Registration of our methods with PEFT, in memory: nothing on disk is patched."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

from gaintune.errors import GaintuneError

logger = logging.getLogger(__name__)


class Method(NamedTuple):
    """A PEFT method's two classes, as "module:class", so that naming them imports nothing."""

    config: str
    model: str


METHODS: dict[str, Method] = {
    "GAIN": Method("gaintune.tuners.gain.config:GainConfig", "gaintune.tuners.gain.model:GainModel"),
    "DISEL": Method("gaintune.tuners.disel.config:DiselConfig", "gaintune.tuners.disel.model:DiselModel"),
}


def add_peft_type(name: str) -> Any:
    """The member `name` of `peft.PeftType`, added to the enumeration if it is not there yet."""
    from peft.utils import peft_types

    PeftType: Any = peft_types.PeftType  # noqa: N806  # it is a class
    known = PeftType._member_map_.get(name)
    if known is not None:
        return known
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType._member_names_)
    type.__setattr__(PeftType, name, member)  # Enum's own setter refuses new members
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    if hasattr(PeftType, "_hashable_values_"):  # Python 3.13 keeps a second list for `in`
        PeftType._hashable_values_.append(name)
    return member


def register() -> None:
    """Register every method of `METHODS` with PEFT; calling it again changes nothing.

    Raises `GaintuneError` where PEFT, or another package, already holds a method of that name.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
    from peft.utils.peft_types import register_peft_method

    for name, method in METHODS.items():
        config_cls, model_cls = _load(method.config), _load(method.model)
        peft_type = add_peft_type(name)
        holder = PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type)
        if holder is None:
            register_peft_method(name=name.lower(), config_cls=config_cls, model_cls=model_cls, prefix=model_cls.prefix)
            logger.debug("registered %s with PEFT", name)
        elif holder is not config_cls or PEFT_TYPE_TO_TUNER_MAPPING.get(peft_type) is not model_cls:
            raise GaintuneError(
                f"PEFT already has a method called {name}, {holder.__module__}.{holder.__qualname__}, which is not "
                f"gaintune's. Remove or upgrade the package {holder.__module__.partition('.')[0]!r}, or do not import "
                "both in one process."
            )
    _extend_hotswap()


def _load(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def _extend_hotswap() -> None:
    """Let `peft.utils.hotswap` swap gains and gates too: PEFT's own code knows the two matrices of LoRA."""
    from peft.utils import hotswap

    from gaintune.tuners.disel import hotswap as gates
    from gaintune.tuners.disel.model import require_gates
    from gaintune.tuners.gain.hotswap import swap_values

    gain, disel = add_peft_type("GAIN"), add_peft_type("DISEL")
    hotswap.CONFIG_KEYS_TO_CHECK.setdefault(gain, [])
    hotswap.CONFIG_KEYS_TO_CHECK.setdefault(disel, gates.keys_to_check(hotswap.CONFIG_KEYS_TO_CHECK))
    lora_only: Callable[..., None] = hotswap.hotswap_adapter_from_state_dict
    if getattr(lora_only, "swaps_gains", False):
        return
    pad_lora: Callable[..., bool] = hotswap._pad_lora_weights

    def hotswap_adapter_from_state_dict(
        model: Any,
        state_dict: dict[str, Any],
        adapter_name: str,
        config: Any,
        parameter_prefix: str = "lora_",
    ) -> None:
        if config.peft_type == gain:
            swap_values(model, state_dict, adapter_name)
            return
        if config.peft_type == disel:
            if config.gate_kind == "sigmoid":
                require_gates(state_dict, adapter_name)
            state_dict = gates.with_padded_biases(model, state_dict)
        lora_only(model, state_dict, adapter_name, config, parameter_prefix)

    def pad_weights(model: Any, target_rank: int) -> bool:
        found = pad_lora(model, target_rank)
        gates.pad_gates(model)
        return found

    hotswap_adapter_from_state_dict.swaps_gains = True  # type: ignore[attr-defined]  # marks the wrapper, once
    hotswap_adapter_from_state_dict.__doc__ = lora_only.__doc__
    hotswap.hotswap_adapter_from_state_dict = hotswap_adapter_from_state_dict
    hotswap._pad_lora_weights = pad_weights
