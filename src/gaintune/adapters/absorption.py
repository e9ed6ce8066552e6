"""Merge an adapter into the fp32 weights of its base, and count the changes that rounding to the final dtype undoes."""

from __future__ import annotations

import warnings
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, cast

import torch

from gaintune.adapters.disk import load_adapter
from gaintune.adapters.record import read_config, read_record
from gaintune.errors import AdapterError, one_line
from gaintune.models import Base


def absorb(base: Base, adapter: Path, dtype: torch.dtype, *, allow_other_base: bool = False) -> tuple[Any, Rounding]:
    """Merge an adapter folder into `base`, which must hold fp32 weights and is consumed; the result is in `dtype`.

    Raises:
        AdapterError: damaged, of another base, or of a method that does not change weights.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    record = read_record(adapter)
    if record is not None and record.whole:
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
                setattr(layer, "merge", _no_second_merge)  # noqa: B010  # OSF would merge again in the next call
            merged = model.merge_and_unload(safe_merge=True)  # removes the adapter's layers, puts modules_to_save in
    except (ValueError, NotImplementedError, AttributeError) as error:
        raise AdapterError(f"{adapter}: this adapter cannot be merged ({one_line(error)[:300]})") from error
    return merged.to(dtype), rounding


def _no_second_merge(*args: Any, **kwargs: Any) -> None:
    """Do nothing, in place of the merge of a layer that is merged already."""


def check_mergeable(adapter: Path) -> None:
    """Refuse an adapter whose method has nothing to merge, before any model is loaded; AdapterError."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    record = read_record(adapter)
    if record is not None and record.whole:
        return
    kind = read_config(adapter).get("peft_type")
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(cast(Any, kind))
    if tuner is not None and not (hasattr(tuner, "merge_and_unload") and getattr(tuner, "mergeable", True)):
        raise AdapterError(f"{adapter}: an adapter of type {kind} has no weights to merge; serve it beside its base")


def _absorb_full(base: Base, adapter: Path, dtype: torch.dtype, allow_other_base: bool) -> tuple[Any, Rounding]:
    """Replace the base's weights by fully fine-tuned ones; none of their changes counts as a gain."""
    before = {name: weight.detach().clone() for name, weight in base.model.named_parameters()}
    model: Any = load_adapter(base, adapter, allow_other_base=allow_other_base)
    rounding = Rounding()
    for name, weight in model.named_parameters():
        counted = count_rounding(before.pop(name), weight.detach(), dtype)
        rounding += Rounding(counted.changed, counted.unmoved)
    return model.to(dtype), rounding


@dataclass(frozen=True)
class Rounding:
    """Count of an adapter's changes to weights that rounding undoes; sums over layers with `+`.

    `changed` weights differ from the base in fp32; `unmoved` of them equal the base's again after rounding. `gains` are
    the multiplicative changes (one number for an input column or an output row) that differ from 1; `lost` are those
    that leave more than half of the weights they multiply unmoved; `error` sums over the gains the distance of the
    gain after rounding from the trained one, relative to the trained one's distance from 1.
    """

    changed: int = 0
    unmoved: int = 0
    gains: int = 0
    lost: int = 0
    error: float = 0.0

    def __add__(self, other: Rounding) -> Rounding:
        return Rounding(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))


def count_rounding(base: torch.Tensor, merged: torch.Tensor, dtype: torch.dtype) -> Rounding:
    """Compare a weight `(out, in)` in fp32 before and after a merge with both as rounded to `dtype`."""
    base, merged = base.float(), merged.float()
    base_rounded, merged_rounded = base.to(dtype).float(), merged.to(dtype).float()
    changed = merged != base
    unmoved = changed & (merged_rounded == base_rounded)
    total = Rounding(int(changed.sum()), int(unmoved.sum()))
    if base.dim() != 2 or not total.changed:
        return total
    for axis in (0, 1):  # columns first (GAIN), then rows (gains on outputs, or GPT-2's layers)
        gain = _gain(base, merged, axis)
        if not torch.allclose(merged, base * gain, rtol=1e-5, atol=1e-6 * base.abs().max().item()):
            continue
        trained, acting = gain - 1, _gain(base_rounded, merged_rounded, axis) - 1
        moving = (trained.abs() > 1e-6) & (changed.sum(dim=axis, keepdim=True) > 0)
        lost = moving & (2 * unmoved.sum(dim=axis, keepdim=True) > changed.sum(dim=axis, keepdim=True))
        error = ((acting - trained).abs() / trained.abs())[moving].double().sum()
        return total + Rounding(gains=int(moving.sum()), lost=int(lost.sum()), error=float(error))
    return total


def _gain(base: torch.Tensor, merged: torch.Tensor, axis: int) -> torch.Tensor:
    """Return the factors that bring each column or row of one matrix nearest to the other's; 1 for zeros."""
    norm = (base.double() ** 2).sum(dim=axis, keepdim=True)
    product = (base.double() * merged.double()).sum(dim=axis, keepdim=True)
    return torch.where(norm > 0, product / norm.clamp_min(1e-300), torch.ones_like(norm)).float()
