"""Run a recipe: step after step in one folder, then a verdict on every claim.

It leaves results.md to read, results.csv and results.json to compute with, and figures/ beside them.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from gaintune.errors import ConfigError, GaintuneError, RunDirectoryError
from gaintune.models import resolve_device
from gaintune.progress import Progress, Silent
from gaintune.recipes.outcome import Context, PreparedStep, StepOutcome
from gaintune.recipes.preflight import check_hub
from gaintune.recipes.scales import ScaleSetup, budget_note, dropped, names_in, note_of
from gaintune.recipes.schema import SCALES, Claim, Recipe, Scale, Step, recipe_named
from gaintune.recipes.steps import KINDS
from gaintune.report import NONE, markdown_table, number
from gaintune.results import Interval, Verdict, judge
from gaintune.storage import Run, describe_environment, make_folder, write_json, write_text

RECORD = "recipe.json"
SMOKE = (
    "Random weights, a few steps, and the standard library's functions as text under every name: the verdicts show "
    "that everything runs, and nothing else."
)
COLUMNS = ["step", "number", "value", "low", "high"]


@dataclass(frozen=True)
class Finding:
    """A claim with its number here (None where its step was left out) and the verdict."""

    claim: Claim
    number: Interval | None
    verdict: Verdict


@dataclass(frozen=True)
class RecipeResult:
    """Outcomes and findings of a recipe, and the folder that holds them."""

    recipe: Recipe
    scale: Scale
    folder: Path
    outcomes: Mapping[str, StepOutcome]
    findings: tuple[Finding, ...]

    def number(self, name: str) -> Interval:
        """Return a number by its full name, such as run.gain-ffn.backward_transfer; KeyError where there is none."""
        step, _, rest = name.partition(".")
        return self.outcomes[step].numbers[rest]


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
    recipe = recipe_named(recipe) if isinstance(recipe, str) else recipe
    if scale not in SCALES:
        raise ConfigError(f"--scale {scale}: use {', '.join(SCALES)}")
    for step in (step for step in recipe.steps if step.do not in KINDS):
        known = ", ".join(KINDS)
        raise ConfigError(f"recipe {recipe.id}: step {step.name}: unknown kind {step.do!r}; known: {known}")
    folder, data, overrides = Path(folder), None if data is None else Path(data), dict(overrides or {})
    identity = {
        "recipe": recipe.model_dump(mode="json"),
        "scale": scale,
        "data": None if data is None else str(data.resolve()),
        "overrides": overrides,
    }
    new = _take(folder, identity)
    try:
        setup = ScaleSetup.make(scale, recipe.model, data, overrides, folder / "world")
        if new:
            check_hub(recipe, setup, folder)
        _check(recipe, folder, setup, allow_code_execution)
    except GaintuneError:
        if new:  # a corrected recipe may begin there
            (folder / RECORD).unlink()
            shutil.rmtree(folder / "world", ignore_errors=True)
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
    outcomes: dict[str, StepOutcome] = {}
    for step in recipe.steps:
        context = Context(step.name, folder / step.name, setup, outcomes, progress or Silent(), allow_code_execution)
        prepared = _prepare(recipe, step, context)
        outcome = prepared.run() if prepared.run else prepared.expected
        notes = note_of(recipe, step, scale)
        notes += budget_note(recipe, step, scale, outcome.plan) if outcome.plan else ()
        outcomes[step.name] = replace(outcome, notes=(*notes, *outcome.notes))
    result = RecipeResult(recipe, scale, folder, outcomes, tuple(_judge(claim, outcomes) for claim in recipe.claims))
    _write_results(result, describe_environment(resolve_device("auto")))
    lacking = [label for outcome in outcomes.values() for label in outcome.diverged]
    for step in recipe.steps:
        settings = recipe.settings(step, scale)
        lacking += setup.missing([*settings.get("domains", ()), *settings.get("watched", ())])
        lacking += [name for names in dropped(recipe, step, scale).values() for name in names]
    for finding in result.findings:
        _refuse_unknown_number(finding, outcomes, lacking)
    return result


def _take(folder: Path, identity: dict[str, Any]) -> bool:
    """Make the folder, or check that the same recipe began it; return whether it is new."""
    new = not (folder / RECORD).exists()
    if new and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunDirectoryError(f"{folder} is there already and no recipe began it; name another folder")
    make_folder(folder)
    advice = "A folder is one recipe at one scale on one set of texts: name another one"
    Run(folder).write_once(RECORD, identity, advice)
    return new


def _prepare(recipe: Recipe, step: Step, context: Context) -> PreparedStep:
    """Read a step's settings; a step that works on one that was left out is left out itself."""
    settings = recipe.settings(step, context.setup.scale)
    other = context.earlier.get(str(settings.get("of")))
    if other is not None and other.left_out:
        return PreparedStep.left_out(f"left out: it works on step {settings['of']}, which is left out")
    return KINDS[step.do](settings, context)


def _check(recipe: Recipe, folder: Path, setup: ScaleSetup, allow_code_execution: bool) -> None:
    """Refuse, before anything is trained, what would otherwise be refused only after it."""
    expected: dict[str, StepOutcome] = {}
    for step in recipe.steps:
        context = Context(step.name, folder / step.name, setup, expected, Silent(), allow_code_execution)
        expected[step.name] = _prepare(recipe, step, context).expected
    if all(outcome.left_out for outcome in expected.values()):
        why = "; ".join(f"step {step}: {note}" for step, outcome in expected.items() for note in outcome.notes)
        raise ConfigError(f"recipe {recipe.id}: no step of it can run at scale {setup.scale} ({why})")
    plans = [outcome.plan for outcome in expected.values() if outcome.plan]
    if setup.overrides and not plans:
        raise ConfigError(f"recipe {recipe.id}: no step of it has a plan, so --set changes nothing; leave it out")
    if "methods" not in setup.overrides:
        return
    gone = {label for step in recipe.steps for label in names_in(recipe.settings(step, setup.scale), "methods")}
    gone -= {method.label for plan in plans for method in plan.methods}
    for claim in recipe.claims:
        if about := [label for label in gone if _mentions(claim.number, label)]:
            raise ConfigError(
                f"--set methods: the claim {claim.says!r} is about {about[0]!r}, which is none of them; keep its "
                "label, or write a recipe of your own (`gaintune recipe show` has this one's steps)"
            )


def _judge(claim: Claim, outcomes: Mapping[str, StepOutcome]) -> Finding:
    """Decide a claim; a missing number leaves it undecided."""
    step, _, name = claim.number.partition(".")
    number = outcomes[step].numbers.get(name)
    return Finding(claim, number, "undecided" if number is None else judge(number, claim.expect.bounds))


def _refuse_unknown_number(finding: Finding, outcomes: Mapping[str, StepOutcome], lacking: list[str]) -> None:
    """Refuse a claim about a number that its step gives at no scale; `lacking` excuses what this scale lacks."""
    step, _, name = finding.claim.number.partition(".")
    outcome = outcomes[step]
    if finding.number is not None or outcome.left_out or name in outcome.without:
        return
    if not any(_mentions(name, missing) for missing in lacking):
        known = ", ".join(outcome.numbers)
        raise ConfigError(
            f"claim {finding.claim.says!r}: step {step} gives no number {name!r}; it gives {known}. The "
            "results are written, with this claim undecided"
        )


def _mentions(number: str, name: str) -> bool:
    """Tell whether a label, domain or task is part of the name of a number."""
    return re.search(rf"(?:^|[.-]){re.escape(name)}(?:$|[.@-])", number) is not None


def _write_results(result: RecipeResult, environment: Mapping[str, Any]) -> None:
    """Write results.md, results.csv (every number), results.json, environment.json, and figures/."""
    folder = result.folder
    make_folder(folder / "figures")
    for step, outcome in result.outcomes.items():
        for figure in outcome.figures:
            shutil.copyfile(figure, folder / "figures" / _figure_name(result, step, figure))
    numbers = [(step, *item) for step, outcome in result.outcomes.items() for item in outcome.numbers.items()]
    frame = pd.DataFrame([(step, name, n.value, n.low, n.high) for step, name, n in numbers], columns=COLUMNS)
    write_text(folder / "results.csv", frame.to_csv(index=False, lineterminator="\n"))
    claims = [
        {
            "says": finding.claim.says,
            "number": finding.claim.number,
            "expected": str(finding.claim.expect),
            "found": None if finding.number is None else asdict(finding.number),
            "verdict": finding.verdict,
        }
        for finding in result.findings
    ]
    record = {
        "recipe": result.recipe.id,
        "scale": result.scale,
        "numbers": {f"{step}.{name}": [n.value, n.low, n.high] for step, name, n in numbers},
        "claims": claims,
        "notes": {step: list(outcome.notes) for step, outcome in result.outcomes.items()},
        "without": {
            f"{step}.{name}": why for step, one in result.outcomes.items() for name, why in one.without.items()
        },
    }
    write_json(folder / "results.json", record)
    write_json(folder / "environment.json", dict(environment))
    write_text(folder / "results.md", "\n".join(_page(result)))


def _figure_name(result: RecipeResult, step: str, figure: Path) -> str:
    """Return a file name that no figure of another step has."""
    part = figure.parent.relative_to(result.folder / step).as_posix().replace("figures", "").strip("/.")
    return "-".join(filter(None, (step, part.replace("/", "-"), figure.name)))


def _page(result: RecipeResult) -> Iterator[str]:
    """Yield the lines of the page: the question, a verdict on every claim, and each step's notes and tables."""
    recipe = result.recipe
    yield from (f"# {recipe.id}: {recipe.title}", "", f"{recipe.source}; scale {result.scale}.", "")
    yield from (recipe.asks.strip(), "")
    if result.scale == "smoke":
        yield from (SMOKE, "")
    if result.findings:
        rows = {
            finding.claim.says: [finding.verdict, shown(finding.number), finding.claim.expected, finding.claim.number]
            for finding in result.findings
        }
        frame = pd.DataFrame.from_dict(rows, orient="index", columns=["Verdict here", "Found", "Claimed", "Number"])
        yield from (markdown_table(frame, "Claim"), "")
        yield from (
            "Figures are in the unit of the step's tables. Counted figures are their own interval. A figure without an "
            "interval decides nothing.",
            "",
        )
    for step, outcome in result.outcomes.items():
        yield from (f"## {step}", "")
        notes = [*outcome.notes, *(f"no number {name}: {why}" for name, why in outcome.without.items())]
        yield from (f"- {note}" for note in notes)
        yield from [""] if notes else []
        for title, table in outcome.tables.items():
            yield from (f"{title}:", "", markdown_table(table, ""), "")
        for figure in outcome.figures:
            yield from (f"![{figure.stem}](figures/{_figure_name(result, step, figure)})", "")


def shown(value: Interval | None) -> str:
    """Format a number with its interval, the bare number, or a dash for none."""
    if value is None:
        return NONE
    ends = f" [{_digits(value.low)}, {_digits(value.high)}]" if value.low is not None and value.high is not None else ""
    return _digits(value.value) + ends


def _digits(value: float) -> str:
    return f"{'−' if value < 0 else ''}{number(abs(value))}" if abs(value) >= 1 else f"{value:.3g}".replace("-", "−")
