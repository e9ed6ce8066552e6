"""Put an adapter's changes into the fp32 weights of its base, and count what rounding to the final dtype takes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, cast

import torch

from gaintune.adapters.disk import FULL, load_adapter, read_config, read_record
from gaintune.errors import AdapterError, one_line
from gaintune.models.base import Base
from gaintune.parity import Rounding, count_rounding


def absorb(base: Base, adapter: Path, dtype: torch.dtype, *, allow_other_base: bool = False) -> tuple[Any, Rounding]:
    """Merge an adapter folder into `base`, which must hold fp32 weights and is used up; the result is in `dtype`.

    Raises:
        AdapterError: damaged, of another base, or of a method whose effect is not a change of weights.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    record = read_record(adapter)
    if record is not None and record.method == FULL:
        return _absorb_full(base, adapter, dtype, allow_other_base)
    model: Any = load_adapter(base, adapter, allow_other_base=allow_other_base)
    rounding = Rounding()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="All adapters are already merged")
            for layer in [module for module in model.modules() if isinstance(module, BaseTunerLayer)]:
                before = layer.get_base_layer().weight.detach().clone()  # pyright: ignore[reportCallIssue]
                layer.merge(safe_merge=True)
                after: Any = layer.get_base_layer().weight
                rounding += count_rounding(before, after.detach(), dtype)
                setattr(layer, "merge", _no_second_merge)  # noqa: B010  # the next call asks, and OSF would obey
            merged = model.merge_and_unload(safe_merge=True)  # takes the adapter's layers out, and modules_to_save in
    except (ValueError, NotImplementedError, AttributeError) as error:
        reason = one_line(error)[:300]
        raise AdapterError(f"{adapter}: this adapter cannot be merged ({reason})") from error
    return merged.to(dtype), rounding


def _no_second_merge(*args: Any, **kwargs: Any) -> None:
    """Stands in for a layer's merge once it is merged."""


def check_mergeable(adapter: Path) -> None:
    """Refuse an adapter whose method has nothing to merge, before any model is loaded; AdapterError."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    record = read_record(adapter)
    if record is not None and record.method == FULL:
        return
    kind = read_config(adapter).get("peft_type")
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(cast(Any, kind))
    if tuner is not None and not (hasattr(tuner, "merge_and_unload") and getattr(tuner, "mergeable", True)):
        raise AdapterError(f"{adapter}: an adapter of type {kind} has no weights to merge; serve it beside its base")


def _absorb_full(base: Base, adapter: Path, dtype: torch.dtype, allow_other_base: bool) -> tuple[Any, Rounding]:
    """Fully fine-tuned weights take the base's place; only weights are counted, for none of them is a gain."""
    before = {name: weight.detach().clone() for name, weight in base.model.named_parameters()}
    model: Any = load_adapter(base, adapter, allow_other_base=allow_other_base)
    changed = unmoved = 0
    for name, weight in model.named_parameters():
        counted = count_rounding(before.pop(name), weight.detach(), dtype)
        changed, unmoved = changed + counted.changed, unmoved + counted.unmoved
    return model.to(dtype), Rounding(changed, unmoved)
