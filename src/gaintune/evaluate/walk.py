"""A base, then adapters on it, each looked at in the same way and gone from memory before the next is loaded."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from gaintune.adapters import BASE, adapter_labels, load_adapter, read_record
from gaintune.config import Plan
from gaintune.errors import AdapterError
from gaintune.methods import Precision, measuring_precision
from gaintune.models import Base, load_classifier


def with_adapter(base: Base, folder: Path, plan: Plan, *, allow_other_base: bool = False) -> nn.Module:
    """The language model of `base`, causal or masked, with an adapter in it; `base.model` is changed in place.

    A classifier is loaded whole, as `load_adapter` does, which finds whatever is missing or left over; its backbone
    then takes the place of the one that stands before the original language-model head (DISeL, arXiv 2605.19028,
    appendix II.5). Another adapter is put onto the language model itself.

    Raises:
        AdapterError, BaseMismatchError: as `load_adapter`; or a backbone of another class than the base's.
        BaseModelError: the base has no classifier of its kind.
    """
    record = read_record(folder)
    if record is None or not record.labels:
        return load_adapter(base, folder, allow_other_base=allow_other_base)
    classifier = load_classifier(plan.model, record.labels, seed=0, dtype=base.model.dtype)
    adapted: Any = load_adapter(classifier, folder, allow_other_base=allow_other_base)
    carrier: Any = adapted.get_base_model() if hasattr(adapted, "get_base_model") else adapted
    model = base.model
    if type(carrier.base_model) is not type(model.base_model):
        raise AdapterError(f"{folder}: its backbone is a {type(carrier.base_model).__name__}, not {base.name!r}'s")
    setattr(model, model.base_model_prefix, carrier.base_model)
    return model.eval()


T = TypeVar("T")

Look = Callable[[nn.Module, str, torch.dtype | None], T]
"""What looks at a model, given the model, what it is called, and the autocast dtype to measure it in, if any."""


@dataclass(frozen=True)
class Looked(Generic[T]):
    """What was found of one adapter, and of the untouched base in the same numbers."""

    label: str
    found: T
    base: T


def look_at_adapters(adapters: Sequence[Path], look: Callable[[str, Path], T]) -> list[T]:
    """What `look` finds with each adapter, given its label and its folder; ConfigError where one is named twice."""
    found = []
    for label, folder in zip(adapter_labels(adapters), adapters, strict=True):
        found.append(look(label, folder))
        gc.collect()  # an adapted model refers to itself
    return found


def look_at_base_and_adapters(
    plan: Plan,
    adapters: Sequence[Path],
    load: Callable[..., Base],
    put_on: Callable[[Base, Path], nn.Module],
    prepare: Callable[[Base], Look[T]],
) -> tuple[T, list[Looked[T]]]:
    """What is found with the plan's untouched base, and then with each adapter on a base of its own.

    An adapter is measured in the numbers it was trained in, and against the base in the same; the base that comes first
    is in those of the first adapter.

    Args:
        plan: names the base.
        adapters: their folders.
        load: makes the base of `plan.model` and a `dtype`.
        put_on: a base with an adapter; the base is changed in place.
        prepare: what looks at models, once the base is there.
    """
    first = _numbers(plan, adapters[0] if adapters else None)
    bases = [load(plan.model, dtype=first.load)]
    look = prepare(bases[0])
    untouched = {first: look(bases[0].model, BASE, first.mixed)}

    def with_adapter(label: str, folder: Path) -> Looked[T]:
        numbers = _numbers(plan, folder)
        base = bases.pop() if bases else load(plan.model, dtype=numbers.load)  # the first goes onto what was looked at
        if numbers not in untouched:
            untouched[numbers] = look(base.model, BASE, numbers.mixed)
        return Looked(label, look(put_on(base, folder), label, numbers.mixed), untouched[numbers])

    looked = look_at_adapters(adapters, with_adapter)
    return untouched[first], looked


def _numbers(plan: Plan, folder: Path | None) -> Precision:
    """The numbers to measure an adapter in; None stands for a base without one."""
    record = None if folder is None else read_record(folder)
    return measuring_precision(plan.model, record.method if record else None)
