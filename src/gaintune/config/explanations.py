"""Errors of a plan in words: one line for each mistake, with its key and what to write instead."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from gaintune.errors import ConfigError

OTHER_WORDS = {  # names that other libraries give to our keys
    "learning_rate": "lr", "num_epochs": "epochs", "num_train_epochs": "epochs", "report_to": "trackers",
    "per_device_train_batch_size": "batch_size", "per_device_eval_batch_size": "batch_size", "r": "rank",
    "gradient_accumulation_steps": "gradient_accumulation", "lr_scheduler_type": "schedule", "max_grad_norm": "clip",
    "max_seq_length": "block_size", "model_name_or_path": "name", "torch_dtype": "dtype", "lora_alpha": "alpha",
    "target_modules": "targets",
}  # fmt: skip


def explain(error: ValidationError, origin: str, plan: type[BaseModel]) -> ConfigError:
    """Say every mistake on a line, with its key and the nearest known one; `plan` is the class of the whole plan."""
    lines, details = [], error.errors()
    for detail in details:
        if any(other["loc"][: len(detail["loc"])] == detail["loc"] != other["loc"] for other in details):
            continue  # a list called too short only because one of its entries is wrong
        key = ".".join(str(part) for part in detail["loc"])
        if detail["type"] == "extra_forbidden":
            unknown, known = str(detail["loc"][-1]), list(_section(plan, detail["loc"]).model_fields)
            ours = OTHER_WORDS.get(unknown)
            meant = [ours] if ours in known else get_close_matches(unknown, known, n=1)
            advice = f"did you mean {meant[0]!r}?" if meant else f"known keys: {', '.join(known)}"
            lines.append(f"{origin}: unknown key {key!r}; {advice}")
            continue
        value = detail["input"]
        got = f" (got {value!r})" if isinstance(value, str | int | float | bool | None) and key else ""
        message = detail["msg"].removeprefix("Value error, ")
        lines.append(": ".join(part for part in (origin, key, f"{message}{got}") if part))
    return ConfigError("\n".join(lines))


def _section(plan: type[BaseModel], location: Sequence[str | int]) -> type[BaseModel]:
    """Return the part of a plan to which the last key of a location would belong."""
    section = plan
    for part in location[:-1]:
        field = section.model_fields.get(str(part))
        section = section if field is None else section_of(field.annotation) or section
    return section


def section_of(annotation: Any) -> type[BaseModel] | None:
    """Return the part of a plan that a field holds, itself or in a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(section_of, get_args(annotation))), None)
