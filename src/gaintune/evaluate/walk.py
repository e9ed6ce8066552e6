"""A base, then adapters on it, each looked at in the same way and gone from memory before the next is loaded."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import nn

from gaintune.adapters.disk import BASE, adapter_labels, read_record
from gaintune.config.plan import Plan
from gaintune.methods.attach import Numbers, measuring_numbers
from gaintune.models.base import Base

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


def _numbers(plan: Plan, folder: Path | None) -> Numbers:
    """The numbers to measure an adapter in; None stands for a base without one."""
    record = None if folder is None else read_record(folder)
    return measuring_numbers(plan.model, record.method if record else None)
