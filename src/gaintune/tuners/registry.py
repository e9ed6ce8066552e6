"""Registration of our methods with PEFT, in memory: nothing on disk is patched.

A method is a folder beside this file, such as `gain`, with `GainConfig` in `config.py`, `GainModel` in `model.py`, and
in `hotswap.py` how values are swapped: `keys_to_check`, `swap` and `pad`. Without that file PEFT refuses to swap them.
"""

from __future__ import annotations

import importlib
import logging
import pkgutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from gaintune.errors import GaintuneError

logger = logging.getLogger(__name__)


def match_names(config: Any) -> None:
    """Put lists of module names in a configuration into sets: PEFT matches names in a set."""
    for key in ("target_modules", "exclude_modules"):
        if isinstance(getattr(config, key), list):
            setattr(config, key, set(getattr(config, key)))


def add_peft_type(name: str) -> Any:
    """Return the member `name` of `peft.PeftType`, added to the enumeration if it is not there yet."""
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
    """Register the method of every folder beside this file with PEFT; calling it again changes nothing.

    Raises `GaintuneError` where PEFT, or another package, already holds a method of that name.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
    from peft.utils.peft_types import register_peft_method

    swaps: dict[Any, ModuleType] = {}
    for folder in (entry.name for entry in pkgutil.iter_modules([str(Path(__file__).parent)]) if entry.ispkg):
        config_cls, model_cls = (
            getattr(
                importlib.import_module(f"gaintune.tuners.{folder}.{part}"), f"{folder.capitalize()}{part.capitalize()}"
            )
            for part in ("config", "model")
        )
        peft_type = add_peft_type(folder.upper())
        if (Path(__file__).parent / folder / "hotswap.py").is_file():
            swaps[peft_type] = importlib.import_module(f"gaintune.tuners.{folder}.hotswap")
        holder = PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type)
        if holder is None:
            register_peft_method(name=folder, config_cls=config_cls, model_cls=model_cls, prefix=model_cls.prefix)
            logger.debug("registered %s with PEFT", peft_type.value)
        elif holder is not config_cls or PEFT_TYPE_TO_TUNER_MAPPING.get(peft_type) is not model_cls:
            raise GaintuneError(
                f"PEFT already has a method called {peft_type.value}, {holder.__module__}.{holder.__qualname__}, which "
                f"is not gaintune's. Remove or upgrade the package {holder.__module__.partition('.')[0]!r}, or do not "
                "import both in one process."
            )
    _extend_hotswap(swaps)


def _extend_hotswap(swaps: Mapping[Any, ModuleType]) -> None:
    """Let `peft.utils.hotswap` swap our methods too, by their types: PEFT's own code knows the two matrices of LoRA."""
    from peft.utils import hotswap

    for peft_type, own in swaps.items():
        hotswap.CONFIG_KEYS_TO_CHECK.setdefault(peft_type, own.keys_to_check(hotswap.CONFIG_KEYS_TO_CHECK))
    lora_only: Callable[..., None] = hotswap.hotswap_adapter_from_state_dict
    if getattr(lora_only, "swaps_ours", False):
        return
    pad_lora: Callable[..., bool] = hotswap._pad_lora_weights

    def hotswap_adapter_from_state_dict(
        model: Any,
        state_dict: dict[str, Any],
        adapter_name: str,
        config: Any,
        parameter_prefix: str = "lora_",
    ) -> None:
        own = swaps.get(config.peft_type)
        if own is None:
            lora_only(model, state_dict, adapter_name, config, parameter_prefix)
        else:
            own.swap(model, state_dict, adapter_name, config, partial(lora_only, parameter_prefix=parameter_prefix))

    def pad_weights(model: Any, target_rank: int) -> bool:
        found = pad_lora(model, target_rank)
        for own in swaps.values():
            own.pad(model)
        return found

    hotswap_adapter_from_state_dict.swaps_ours = True  # type: ignore[attr-defined]  # marks the wrapper, once
    hotswap_adapter_from_state_dict.__doc__ = lora_only.__doc__
    hotswap.hotswap_adapter_from_state_dict = hotswap_adapter_from_state_dict
    hotswap._pad_lora_weights = pad_weights
