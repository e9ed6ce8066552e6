"""What is wrong with a plan, in words: one line for each mistake, with its key and what to write instead."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from gaintune.errors import ConfigError

OTHER_WORDS = {
    "learning_rate": "lr",
    "num_epochs": "epochs",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "per_device_eval_batch_size": "batch_size",
    "gradient_accumulation_steps": "gradient_accumulation",
    "lr_scheduler_type": "schedule",
    "max_grad_norm": "clip",
    "report_to": "trackers",
    "max_seq_length": "block_size",
    "model_name_or_path": "name",
    "torch_dtype": "dtype",
    "r": "rank",
    "lora_alpha": "alpha",
    "target_modules": "targets",
}
"""What other libraries call a key of ours."""


def explain(error: ValidationError, origin: str, plan: type[BaseModel]) -> ConfigError:
    """One line for each mistake, with its key and the nearest known one; `plan` is the class of the whole plan."""
    lines = []
    details = error.errors()
    for detail in details:
        if any(other["loc"][: len(detail["loc"])] == detail["loc"] != other["loc"] for other in details):
            continue  # a list called too short only because one of its entries is wrong
        key = ".".join(str(part) for part in detail["loc"])
        if detail["type"] == "extra_forbidden":
            advice = _advice(str(detail["loc"][-1]), list(_section(plan, detail["loc"]).model_fields))
            lines.append(f"{origin}: unknown key {key!r}; {advice}")
            continue
        found = detail["input"]
        got = f" (got {found!r})" if isinstance(found, str | int | float | bool | None) and key else ""
        message = detail["msg"].removeprefix("Value error, ")
        lines.append(": ".join(part for part in (origin, key, f"{message}{got}") if part))
    return ConfigError("\n".join(lines))


def _advice(unknown: str, known: Sequence[str]) -> str:
    meant = [OTHER_WORDS[unknown]] if OTHER_WORDS.get(unknown) in known else get_close_matches(unknown, known, n=1)
    return f"did you mean {meant[0]!r}?" if meant else f"known keys: {', '.join(known)}"


def _section(plan: type[BaseModel], location: Sequence[str | int]) -> type[BaseModel]:
    """The part of a plan that the last key of a location was looked for in."""
    section = plan
    for part in location[:-1]:
        field = section.model_fields.get(str(part))
        section = section if field is None else section_of(field.annotation) or section
    return section


def section_of(annotation: Any) -> type[BaseModel] | None:
    """Return the part of a plan that a field holds, itself or in a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for each in get_args(annotation) if (found := section_of(each))), None)
