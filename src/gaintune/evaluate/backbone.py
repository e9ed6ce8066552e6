"""A base under its original head with an adapter's backbone: how a classifier is measured on text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from gaintune.adapters.disk import load_adapter, read_record
from gaintune.config.plan import Plan
from gaintune.errors import AdapterError
from gaintune.models.heads import load_classifier
from gaintune.models.base import Base


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
