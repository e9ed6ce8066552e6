"""Measure a base and adapters on it in the same way, each adapter lent to the base for as long as it is measured."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from gaintune.adapters import BASE, adapter_labels, attached, load_adapter, read_record
from gaintune.config import Plan
from gaintune.errors import AdapterError
from gaintune.methods import Precision, measuring_precision
from gaintune.models import Base, load_classifier

T = TypeVar("T")

Measure = Callable[[nn.Module, str, torch.dtype | None], T]
"""Measures a model, given the model, what it is called, and the autocast dtype to measure it in, if any."""


@dataclass(frozen=True)
class Measured(Generic[T]):
    """What was measured of one adapter, and of the untouched base in the same precision."""

    label: str
    adapted: T
    base: T


def measure_base_and_adapters(
    plan: Plan,
    adapters: Sequence[Path],
    load: Callable[..., Base],
    prepare: Callable[[Base], Measure[T]],
    *,
    allow_other_base: bool = False,
) -> tuple[T, list[Measured[T]]]:
    """Measure the plan's untouched base, and then each adapter on it.

    An adapter is measured in the precision it was trained in, and against the base in the same. The base is loaded once
    for each precision, and is itself again after each adapter (`attached`). The base that is returned first is in the
    precision of the first adapter.

    Args:
        plan: names the base.
        adapters: their folders.
        load: makes the base of `plan.model` and a `dtype`.
        prepare: makes what measures models, once the first base is there.
        allow_other_base: take adapters of another base.

    Raises:
        ConfigError: an adapter named twice.
        AdapterError, BaseMismatchError: as `attached`.
    """
    labels = adapter_labels(adapters)
    precisions = [_precision(plan, folder) for folder in adapters] or [_precision(plan, None)]
    untouched: dict[Precision, T] = {}
    adapted: dict[str, T] = {}
    measure: Measure[T] | None = None
    for precision in dict.fromkeys(precisions):
        base = load(plan.model, dtype=precision.load)
        measure = measure or prepare(base)
        untouched[precision] = measure(base.model, BASE, precision.mixed)
        for label, folder, own in zip(labels, adapters, precisions, strict=False):
            if own == precision:
                with lent(base, folder, plan, allow_other_base=allow_other_base) as model:
                    adapted[label] = measure(model, label, precision.mixed)
                gc.collect()  # an adapted model refers to itself
        del base
    measured = [Measured(label, adapted[label], untouched[own]) for label, own in zip(labels, precisions, strict=False)]
    return untouched[precisions[0]], measured


def _precision(plan: Plan, folder: Path | None) -> Precision:
    """Return the precision to measure an adapter in; None stands for a base without one."""
    record = None if folder is None else read_record(folder)
    return measuring_precision(plan.model, record.method if record else None)


@contextlib.contextmanager
def lent(base: Base, folder: Path, plan: Plan, *, allow_other_base: bool = False) -> Iterator[nn.Module]:
    """Lend an adapter to the language model of `base`, causal or masked, for a while.

    Of a classifier the backbone is lent: it is loaded whole, as `load_adapter` does, which finds whatever is missing or
    left over, and then takes the place of the one that stands before the original language-model head (DISeL, arXiv
    2605.19028, appendix II.5).

    Raises:
        AdapterError, BaseMismatchError: as `load_adapter`; or a backbone of another class than the base's.
        BaseModelError: the base has no classifier of its kind.
    """
    record = read_record(folder)
    if record is None or not record.labels:
        with attached(base, folder, allow_other_base=allow_other_base) as (model, _):
            yield model
        return
    classifier = load_classifier(plan.model, record.labels, seed=0, dtype=base.model.dtype)
    adapted: Any = load_adapter(classifier, folder, allow_other_base=allow_other_base)
    carrier: Any = adapted.get_base_model() if hasattr(adapted, "get_base_model") else adapted
    model = base.model
    original: Any = model.base_model
    if type(carrier.base_model) is not type(original):
        raise AdapterError(f"{folder}: its backbone is a {type(carrier.base_model).__name__}, not {base.name!r}'s")
    setattr(model, model.base_model_prefix, carrier.base_model)
    try:
        yield model.eval()
    finally:
        setattr(model, model.base_model_prefix, original)
