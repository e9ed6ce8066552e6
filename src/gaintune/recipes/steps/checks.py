"""What is known of a step before anything is trained: its settings refused or accepted, and the outcome to expect.

One function for each kind of step that trains or asks benchmarks, called in the order of the recipe with what the steps
before it will give. An analysis checks itself: see `analyse`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gaintune.config import Plan
from gaintune.errors import ConfigError
from gaintune.methods import check_method
from gaintune.recipes.outcome import Context, Outcome, last_of_each
from gaintune.recipes.steps.answers import asked_of
from gaintune.recipes.steps.benchmarks import asked_config, take_pick
from gaintune.recipes.steps.classify import Study
from gaintune.recipes.steps.sweep import plan_and_grid
from gaintune.recipes.steps.train import nothing_to_learn
from gaintune.results import BACKWARD_TRANSFER
from gaintune.workflows.sweep import check_comparison

NOWHERE = Path()  # an adapter that is to be expected has no folder yet
DOMAINS = {"data.domains": "the recipe says what each run learns"}


def refuse_owned(context: Context, owned: Mapping[str, str]) -> None:
    """Refuse values from the command line for keys that the step itself decides, run by run.

    Args:
        context: of the step.
        owned: dotted keys of a plan, each with the reason.

    Raises:
        ConfigError: naming the key.
    """
    for key, why in owned.items():
        node: Any = context.world.overrides
        for part in key.split("."):
            node = node.get(part) if isinstance(node, Mapping) else None
        if node is not None:
            raise ConfigError(f"--set {key}: {context.origin} decides it itself ({why}); leave it out")


def _learns(plan: Plan, **more: Any) -> Outcome:
    """The adapters of every method after every domain of a plan."""
    for method in plan.methods:
        check_method(method)
    keys = {f"{method.label}/{domain.name}": NOWHERE for method in plan.methods for domain in plan.data.domains}
    return Outcome(adapters=keys, plan=plan, **{"runs": (NOWHERE,), **more})


def sequence(settings: dict[str, Any], context: Context) -> Outcome:
    """Domains to be had, and a plan."""
    if why := nothing_to_learn(settings, context):
        return Outcome(notes=(why,), left_out=True)
    return _learns(context.world.plan(settings, origin=context.origin))


def separately(settings: dict[str, Any], context: Context) -> Outcome:
    """Likewise; each domain is a run of its own."""
    if why := nothing_to_learn(settings, context):
        return Outcome(notes=(why,), left_out=True)
    refuse_owned(context, {**DOMAINS, "data.watched": DOMAINS["data.domains"]})
    plan = context.world.plan(settings, origin=context.origin)
    return _learns(plan, apart=True, runs=tuple(Path(domain.name) for domain in plan.data.domains))


def sweep(settings: dict[str, Any], context: Context) -> Outcome:
    """Likewise, and a grid; its axes own their keys."""
    if why := nothing_to_learn(settings, context):
        return Outcome(notes=(why,), left_out=True)
    axes = {"rates": "train.lr", "seeds": "train.seed", "budgets": "data.train_tokens"}
    refuse_owned(context, {key: f"its {axis} are an axis" for axis, key in axes.items() if axis in settings})
    if isinstance(settings.get("orders"), list):
        refuse_owned(context, {"data.domains": "its orders name them"})
    check_comparison(settings.pop("figure", BACKWARD_TRANSFER), settings.pop("target", None))
    plan, _ = plan_and_grid(settings, context)
    return Outcome(plan=_learns(plan).plan)


def answers(settings: dict[str, Any], context: Context) -> Outcome:
    """Sets of questions that there are, and a plan."""
    asked = asked_of(settings, context)
    if asked.why_not:
        return Outcome(notes=(asked.why_not,), left_out=True)
    refuse_owned(context, {**DOMAINS, "data.task": "answers are learnt as instructions"})
    return _learns(asked.plan(settings, context))


def classify(settings: dict[str, Any], context: Context) -> Outcome:
    """Tasks that have rows, a plan for every classifier, and one for the texts."""
    owned = {"methods": "each task has its own", "train.seed": "its seeds are an axis", "data.task": "it learns labels"}
    refuse_owned(context, {**DOMAINS, **owned})
    study = Study(settings, context)
    if not study.tasks:
        return Outcome(notes=(study.why_not,), left_out=True)
    cells = list(study.cells())
    for cell in cells:
        check_method(cell.plan.methods[0])
    study.text_plan()
    keys = {f"{cell.variant}/{cell.task}-seed-{cell.seed}": NOWHERE for cell in cells}
    return Outcome(adapters=keys, plan=cells[0].plan, apart=True)


def benchmarks(settings: dict[str, Any], context: Context) -> Outcome:
    """Labels that there are, and rows of benchmarks; at scale paper also leave to run what a model writes."""
    trained, plan = context.trained(settings)
    last_of_each(trained, settings.pop("labels", None), settings.pop("after", None))
    target, tasks, pick = settings.pop("target", []), settings.pop("tasks", []), take_pick(settings, context)
    if not [*target, *tasks] or (pick == "target" and not target):
        raise ConfigError(f"{context.origin}: name `tasks`, and a `target` where it is to pick")
    config, missing = asked_config(settings, [*target, *tasks], plan, context)
    notes = tuple(f"{name}: {why}" for name, why in missing.items())
    return Outcome(notes=notes, left_out=config is None)
