"""What is known of a step before anything is trained: its settings refused or accepted, and the outcome to expect.

One function for each kind of step, called in the order of the recipe with what the steps before it will give.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from gaintune.analysis.linear_model.experiment import Settings
from gaintune.analysis.subspace.compare import SubspaceSettings
from gaintune.analysis.transfer.survey import Component
from gaintune.config import Plan
from gaintune.errors import ConfigError
from gaintune.methods import METHODS, check_method, get_method
from gaintune.recipes.outcome import Context, Outcome, last_of_each
from gaintune.recipes.steps.analyse import LINEAR, gated
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


def linear_model(settings: dict[str, Any], context: Context) -> Outcome:
    """Its settings."""
    context.read(Settings, settings, LINEAR)
    return Outcome()


def gates(settings: dict[str, Any], context: Context) -> Outcome:
    """A label of DISeL, and texts."""
    trained, _ = context.trained(settings)
    gated(settings, trained, context)
    return _measures(settings, context)


def gains(settings: dict[str, Any], context: Context) -> Outcome:
    """A run with factors."""
    trained, plan = context.trained(settings)
    context.refuse_unknown(settings)
    if not trained.runs:
        raise ConfigError(f"{context.origin}: the step it is `of` is no run of domains")
    if not any(get_method(method.name).factors for method in plan.methods):
        known = ", ".join(method.name for method in METHODS.values() if method.factors)
        raise ConfigError(f"{context.origin}: the step it is `of` has no method of {known}")
    return Outcome()


def subspace(settings: dict[str, Any], context: Context) -> Outcome:
    """Labels that there are, and its settings."""
    trained, _ = context.trained(settings)
    last_of_each(trained, settings.pop("labels", None), settings.pop("after", None))
    context.read(SubspaceSettings, settings, {})
    return Outcome()


def tokens(settings: dict[str, Any], context: Context) -> Outcome:
    """Labels that there are, and texts."""
    trained, _ = context.trained(settings)
    last_of_each(trained, settings.pop("labels", None), settings.pop("after", None))
    return _measures(settings, context)


def landscape(settings: dict[str, Any], context: Context) -> Outcome:
    """Places to measure at."""
    context.trained(settings)
    for key in ("line", "grid"):
        places = settings.pop(key, [0])
        if not isinstance(places, list) or not all(isinstance(each, int | float) for each in places) or not places:
            raise ConfigError(f"{context.origin}: {key} is a list of numbers, such as [0, 0.5, 1]")
    context.refuse_unknown(settings)
    return Outcome()


def transfer(settings: dict[str, Any], context: Context) -> Outcome:
    """A label that there is, of several domains, and components."""
    trained, _ = context.trained(settings)
    label, components = settings.pop("label", "gain-ffn"), settings.pop("components", ["mean"])
    context.refuse_unknown(settings)
    if label not in trained.labels:
        raise ConfigError(f"{context.origin}: no adapter is called {label!r}; there are {', '.join(trained.labels)}")
    if unknown := [each for each in components if each not in get_args(Component)]:
        raise ConfigError(f"{context.origin}: no component {unknown[0]!r}; there are {', '.join(get_args(Component))}")
    return Outcome()


def retention(settings: dict[str, Any], context: Context) -> Outcome:
    """Labels that there are, with snapshots, and rows of benchmarks."""
    trained, plan = context.trained(settings)
    last_of_each(trained, settings.pop("labels", None))
    if plan.train.snapshot_steps is None:
        raise ConfigError(f"{context.origin}: the step it is `of` keeps no snapshots; give it train.snapshot_steps")
    every = settings.pop("every", 1)
    if not isinstance(every, int) or every < 1:
        raise ConfigError(f"{context.origin}: every is {every!r}: take every snapshot (1), every second one (2), ...")
    asked = [*settings.pop("target", []), *settings.pop("tasks", [])]
    asked_config(settings, asked, plan, context)
    return Outcome()


def _measures(settings: dict[str, Any], context: Context) -> Outcome:
    """Texts to be had, and a plan over them."""
    if why := nothing_to_learn(settings, context):
        return Outcome(notes=(why,), left_out=True)
    return Outcome(plan=context.world.plan(settings, origin=context.origin))
