"""Runs a recipe: step after step in one folder, then the paper's table, the numbers, and a verdict on every claim."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from gaintune.errors import ConfigError, GaintuneError, RunDirectoryError
from gaintune.models import resolve_device
from gaintune.progress import Progress, Silent
from gaintune.recipes.catalogue import recipe_named
from gaintune.recipes.differences import budget_note, dropped, names_in, note_of
from gaintune.recipes.outcome import Context, Finding, Outcome, RecipeResult
from gaintune.recipes.schema import SCALES, Claim, Recipe, Scale, Step
from gaintune.recipes.steps.kinds import KINDS
from gaintune.recipes.world import World, world_of
from gaintune.recipes.writing import write_results
from gaintune.results import judge
from gaintune.storage import Run, describe_environment, make_folder

RECORD = "recipe.json"


def run_recipe(
    recipe: Recipe | str,
    folder: str | Path,
    *,
    scale: Scale = "small",
    data: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    allow_code_execution: bool = False,
    progress: Progress | None = None,
) -> RecipeResult:
    """Run an experiment; a folder that was begun with the same recipe, scale and data is continued.

    Args:
        recipe: a recipe, or the id of one.
        folder: where everything goes.
        scale: paper (the papers' models, data and budgets), small (the demo model), or smoke (a tiny random model).
        data: folder of local copies under the papers' names; the Hub, or embedded texts, unless given.
        overrides: nested plan values laid over every step, such as `{"train": {"seed": 1}}`.
        allow_code_execution: whether programs that a model wrote may be run (HumanEval).
        progress: where to show progress.

    Raises:
        GaintuneError: bad input, a folder of another run, or a step that had to stop.
    """
    chosen = recipe_named(recipe) if isinstance(recipe, str) else recipe
    if scale not in SCALES:
        raise ConfigError(f"--scale {scale}: use {', '.join(SCALES)}")
    for step in chosen.steps:
        if step.do not in KINDS:
            raise ConfigError(
                f"recipe {chosen.id}: step {step.name}: unknown kind {step.do!r}; known: {', '.join(KINDS)}"
            )
    folder = Path(folder)
    place = None if data is None else Path(data)
    asked = {
        "recipe": chosen.model_dump(mode="json"),
        "scale": scale,
        "data": None if place is None else str(place.resolve()),
        "overrides": dict(overrides or {}),
    }
    began = _take(folder, asked)
    try:
        world = world_of(scale, chosen.model, place, overrides or {}, folder / "world")
        _check(chosen, folder, world, allow_code_execution)
    except GaintuneError:
        if began:
            _leave(folder)
        raise
    outcomes: dict[str, Outcome] = {}
    for step in chosen.steps:
        context = Context(step.name, folder / step.name, world, outcomes, progress or Silent(), allow_code_execution)
        settings = chosen.settings(step, scale)
        outcome = _waiting_for(settings, outcomes) or KINDS[step.do].run(settings, context)
        notes = note_of(chosen, step, scale)
        notes += budget_note(chosen, step, scale, outcome.plan) if outcome.plan else ()
        outcomes[step.name] = replace(outcome, notes=(*notes, *outcome.notes))
    lacking = {name for step in chosen.steps for name in _lacking(chosen, step, world)}
    lacking |= {label for outcome in outcomes.values() for label in outcome.diverged}
    findings = tuple(_judged(claim, outcomes) for claim in chosen.claims)
    result = RecipeResult(chosen, scale, folder, outcomes, findings)
    write_results(result, describe_environment(resolve_device("auto")))
    for finding in findings:
        _refuse_unknown_number(finding, outcomes, lacking)
    return result


def _check(recipe: Recipe, folder: Path, world: World, allow_code_execution: bool) -> None:
    """Refuse before anything is trained what could only be refused after it.

    Raises:
        GaintuneError: a step's settings, or values that no step uses; or the scale has not what any step needs.
    """
    expected: dict[str, Outcome] = {}
    for step in recipe.steps:
        context = Context(step.name, folder / step.name, world, expected, Silent(), allow_code_execution)
        settings = recipe.settings(step, world.scale)
        expected[step.name] = _waiting_for(settings, expected) or KINDS[step.do].check(settings, context)
    if all(outcome.left_out for outcome in expected.values()):
        told = "; ".join(f"step {step}: {note}" for step, one in expected.items() for note in one.notes)
        raise ConfigError(f"recipe {recipe.id}: nothing of it can be run at scale {world.scale} ({told})")
    if world.overrides and all(outcome.plan is None for outcome in expected.values()):
        raise ConfigError(f"recipe {recipe.id}: no step of it has a plan, so --set changes nothing; leave it out")
    if "methods" in world.overrides:
        _check_replaced_methods(recipe, world.scale, expected)


def _check_replaced_methods(recipe: Recipe, scale: Scale, expected: Mapping[str, Outcome]) -> None:
    """Refuse methods from the command line where a claim is about one that they are not."""
    own = {label for step in recipe.steps for label in names_in(recipe.settings(step, scale), "methods")}
    gone = own - {method.label for one in expected.values() if one.plan for method in one.plan.methods}
    for claim in recipe.claims:
        if about := [label for label in gone if _mentions(claim.number, label)]:
            raise ConfigError(
                f"--set methods: the claim {claim.says!r} is about {about[0]!r}, which is none of them; keep its "
                "label, or write a recipe of your own (`gaintune recipe show` has this one's steps)"
            )


def _waiting_for(settings: Mapping[str, Any], outcomes: Mapping[str, Outcome]) -> Outcome | None:
    """The outcome of a step that works on one that was left out; None for any other."""
    name = str(settings.get("of"))
    if name not in outcomes or not outcomes[name].left_out:
        return None
    return Outcome(notes=(f"left out: it works on step {name}, which is left out",), left_out=True)


def _take(folder: Path, asked: dict[str, Any]) -> bool:
    """Make the folder, or see that it was begun with the same recipe; whether it is begun only now."""
    if folder.exists() and not (folder.is_dir() and ((folder / RECORD).exists() or not any(folder.iterdir()))):
        raise RunDirectoryError(f"{folder} is there already and no recipe began it; name another folder")
    began = not (folder / RECORD).exists()
    make_folder(folder)
    Run(folder).settle(RECORD, asked, "A folder is one recipe at one scale on one set of texts: name another one")
    return began


def _leave(folder: Path) -> None:
    """Remove what taking a folder made, so that a corrected recipe may begin there."""
    (folder / RECORD).unlink()
    shutil.rmtree(folder / "world", ignore_errors=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def _lacking(recipe: Recipe, step: Step, world: World) -> list[str]:
    """What a scale has not of a step: domains without a text, and names that its settings leave out."""
    settings = recipe.settings(step, world.scale)
    texts = world.missing([*settings.get("domains", ()), *settings.get("watched", ())])
    return [*texts, *(name for names in dropped(recipe, step, world.scale).values() for name in names)]


def _judged(claim: Claim, outcomes: Mapping[str, Outcome]) -> Finding:
    """The verdict on a claim; a number that is not there decides nothing."""
    step, _, name = claim.number.partition(".")
    number = outcomes[step].numbers.get(name)
    return Finding(claim, number, "undecided" if number is None else judge(number, claim.expect.bounds))


def _refuse_unknown_number(finding: Finding, outcomes: Mapping[str, Outcome], lacking: Iterable[str]) -> None:
    """Refuse a claim about a number that its step gives at no scale; what this scale goes without is excused."""
    step, _, name = finding.claim.number.partition(".")
    outcome = outcomes[step]
    if finding.number is not None or outcome.left_out or name in outcome.without:
        return
    if not any(_mentions(name, each) for each in lacking):
        known = ", ".join(outcome.numbers)
        raise ConfigError(
            f"claim {finding.claim.says!r}: step {step} gives no number {name!r}; it gives {known}. The "
            "results are written, with this claim undecided"
        )


def _mentions(number: str, name: str) -> bool:
    """Whether a label, domain or task stands in the name of a number."""
    return re.search(rf"(?:^|[.-]){re.escape(name)}(?:$|[.@-])", number) is not None
