"""What a scale goes without, against the recipe as the paper has it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gaintune.config import MethodConfig, Plan
from gaintune.evaluate.benchmarks import as_task
from gaintune.progress import plural
from gaintune.recipes.schema import Recipe, Scale, Step, laid_over
from gaintune.recipes.world import BUDGETS

LISTS = ("methods", "domains", "watched", "texts", "tasks", "target", "ranks", "rates", "seeds", "components", "ask")
"""Settings that list what an experiment compares; budgets are none of them."""

TRAINING = ("sequence", "separately", "sweep", "answers")
"""Kinds of steps that learn from the budget of a plan."""

RATE = "-lr"
"""What stands between a label and its rate, such as in lora-lr0.001."""


def stem_of(label: str) -> str:
    """A label without its rate."""
    return label.partition(RATE)[0]


def names_in(settings: Mapping[str, Any], key: str) -> list[str]:
    """What a setting lists, by name."""
    value = settings.get(key, ())
    if isinstance(value, Mapping) and key == "rates":
        return [f"{label} at {rate:g}" for label, rates in value.items() for rate in rates]
    return [_name(key, each) for each in ([value] if isinstance(value, str | int | float | Mapping) else value)]


def _name(key: str, value: Any) -> str:
    if key == "methods":
        return str(MethodConfig.model_validate(value).label)
    if key in ("tasks", "target"):
        value = as_task(value)
    return str(value["name"] if isinstance(value, Mapping) else value)


def dropped(recipe: Recipe, step: Step, scale: Scale) -> dict[str, list[str]]:
    """The names by setting that a step has at scale paper and not at this one; of methods also without their rates."""
    whole, here = recipe.settings(step, "paper"), recipe.settings(step, scale)
    gone = {key: [name for name in names_in(whole, key) if name not in names_in(here, key)] for key in LISTS}
    left = {stem_of(name) for name in names_in(here, "methods")}
    gone["methods"] = list(dict.fromkeys(stem for name in gone["methods"] if (stem := stem_of(name)) not in left))
    return {key: names for key, names in gone.items() if names}


def note_of(recipe: Recipe, step: Step, scale: Scale) -> tuple[str, ...]:
    """Say what a scale leaves out of a step, what stands there instead, and what it adds."""
    whole, here = recipe.settings(step, "paper"), recipe.settings(step, scale)
    told, gone = [], dropped(recipe, step, scale)
    for key, names in gone.items():
        new = [stem_of(name) if key == "methods" else name for name in names_in(here, key)]
        known = [stem_of(name) if key == "methods" else name for name in names_in(whole, key)]
        instead = list(dict.fromkeys(name for name in new if name not in known))
        told.append(f"{key} {', '.join(names)}" + (f" ({', '.join(instead)} instead)" if instead else ""))
    notes = [f"at scale {scale} left out: {'; '.join(told)}"] if told else []
    more = {key: [name for name in names_in(here, key) if name not in names_in(whole, key)] for key in LISTS}
    added = [f"{key} {', '.join(names)}" for key, names in more.items() if names and key not in (*gone, "methods")]
    notes += [f"at scale {scale} also: {'; '.join(added)}"] if added else []
    before, after = (_rates_by_method(settings) for settings in (whole, here))
    if other := [stem for stem, labels in before.items() if stem in after and after[stem] != labels]:
        rates = ", ".join(label for stem in other for label in after[stem])
        notes.append(f"at scale {scale} other rates: {rates}")
    return tuple(notes)


def budget_note(recipe: Recipe, step: Step, scale: Scale, plan: Plan) -> tuple[str, ...]:
    """Say what a step that trains has to learn from, and what it would have at scale paper."""
    if scale == "paper" or step.do not in TRAINING:
        return ()
    sections = plan.model_dump(mode="json", include={"data", "train"})
    settings = recipe.settings(step, "paper")
    whole = laid_over(
        sections, laid_over(BUDGETS["paper"], {key: settings[key] for key in sections if key in settings})
    )
    return (f"learnt here: {_budget(sections)}; at scale paper: {_budget(whole)}",)


def _budget(sections: Mapping[str, Any]) -> str:
    data, train = sections["data"], sections["train"]
    return (
        f"{data['train_tokens']:,} tokens a domain in blocks of {data['block_size']:,}, {train['batch_size']} a batch, "
        f"{plural(train['epochs'], 'epoch')}"
    )


def _rates_by_method(settings: Mapping[str, Any]) -> dict[str, list[str]]:
    """Labels that name a rate, by the method they are of."""
    found: dict[str, list[str]] = {}
    for label in names_in(settings, "methods"):
        if stem_of(label) != label:
            found.setdefault(stem_of(label), []).append(label)
    return found
