"""Runs a recipe: step after step in one folder, then the paper's table, the numbers, and a verdict on every claim."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gaintune.environment import describe_environment
from gaintune.errors import ConfigError, RunDirectoryError
from gaintune.evaluate.records import Interval
from gaintune.evaluate.statistics import Verdict, judge
from gaintune.models import resolve_device
from gaintune.progress import Progress, Silent
from gaintune.recipes.catalogue import recipe_named
from gaintune.recipes.kinds import KINDS
from gaintune.recipes.outcome import Context, Outcome
from gaintune.recipes.schema import SCALES, Claim, Recipe, Scale
from gaintune.recipes.world import World, world_of
from gaintune.recipes.writing import write_results
from gaintune.runs import Run, make_folder

RECORD = "recipe.json"


@dataclass(frozen=True)
class Finding:
    """What became of a claim: its number here (None where its step was left out), and the verdict."""

    claim: Claim
    number: Interval | None
    verdict: Verdict

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "says": self.claim.says,
            "number": self.claim.number,
            "expected": str(self.claim.expect),
            "found": None if self.number is None else asdict(self.number),
            "verdict": self.verdict,
        }


@dataclass(frozen=True)
class RecipeResult:
    """Everything a recipe gave, and where it lies."""

    recipe: Recipe
    scale: Scale
    folder: Path
    outcomes: Mapping[str, Outcome]
    findings: tuple[Finding, ...]

    def number(self, name: str) -> Interval:
        """A number by its full name, such as run.gain-ffn.backward_transfer; KeyError where there is none."""
        return numbers_of(self.outcomes)[name]


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
    _take(folder, asked)
    world = world_of(scale, chosen.model, place, overrides or {}, folder / "world")
    outcomes: dict[str, Outcome] = {}
    for step in chosen.steps:
        context = Context(step.name, folder / step.name, world, outcomes, progress or Silent(), allow_code_execution)
        outcomes[step.name] = KINDS[step.do](chosen.settings(step, scale), context)
    if all(outcome.left_out for outcome in outcomes.values()):
        told = "; ".join(f"step {step}: {note}" for step, one in outcomes.items() for note in one.notes)
        raise ConfigError(f"recipe {chosen.id}: nothing of it can be run at scale {scale} ({told})")
    lacking = {name for step in chosen.steps for name in _lacking(chosen.settings(step, scale), world)}
    findings = tuple(_judged(claim, outcomes, lacking) for claim in chosen.claims)
    result = RecipeResult(chosen, scale, folder, outcomes, findings)
    write_results(result, describe_environment(resolve_device("auto")))
    return result


def _take(folder: Path, asked: dict[str, Any]) -> None:
    """Make the folder, or see that it was begun with the same recipe."""
    if folder.exists() and not (folder.is_dir() and ((folder / RECORD).exists() or not any(folder.iterdir()))):
        raise RunDirectoryError(f"{folder} is there already and no recipe began it; name another folder")
    make_folder(folder)
    Run(folder).settle(RECORD, asked, "A folder is one recipe at one scale on one set of texts: name another one")


def numbers_of(outcomes: Mapping[str, Outcome]) -> dict[str, Interval]:
    """All numbers of all steps by their full names."""
    return {f"{step}.{name}": value for step, one in outcomes.items() for name, value in one.numbers.items()}


def _lacking(settings: Mapping[str, Any], world: World) -> list[str]:
    """The domains of a step that have no text at this scale."""
    return world.missing([*settings.get("domains", ()), *settings.get("watched", ())])


def _judged(claim: Claim, outcomes: Mapping[str, Outcome], lacking: Iterable[str]) -> Finding:
    """The verdict on a claim; a number of a domain that has no text here decides nothing."""
    step, _, name = claim.number.partition(".")
    if outcomes[step].left_out or name in outcomes[step].without:
        return Finding(claim, None, "undecided")
    if name not in outcomes[step].numbers and any(domain in re.split(r"[.-]", name) for domain in lacking):
        return Finding(claim, None, "undecided")
    if name not in outcomes[step].numbers:
        known = ", ".join(outcomes[step].numbers)
        raise ConfigError(f"claim {claim.says!r}: step {step} gives no number {name!r}; it gives {known}")
    number = outcomes[step].numbers[name]
    return Finding(claim, number, judge(number, claim.expect.bounds))
