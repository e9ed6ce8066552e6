"""Run a recipe: step after step in one folder, then a verdict on every claim.

It leaves results.md to read, results.csv and results.json to compute with, and figures/ beside them.
"""

from __future__ import annotations

import contextlib
import gc
import json
import re
import shutil
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from gaintune.config import Plan
from gaintune.errors import ConfigError, GaintuneError, RunDirectoryError, disk_full, one_line
from gaintune.models import resolve_device
from gaintune.progress import Progress, Silent
from gaintune.recipes.outcome import Context, PreparedStep, StepOutcome
from gaintune.recipes.preflight import check_hub
from gaintune.recipes.scales import TRAINING, ScaleSetup, budget_note, dropped, names_in, note_of
from gaintune.recipes.schema import SCALES, Claim, Recipe, Scale, Step, laid_over, number_on, recipe_named
from gaintune.recipes.steps import KINDS
from gaintune.report import NONE, markdown_table, number
from gaintune.results import Interval, Verdict, judge
from gaintune.storage import (
    MANIFEST,
    Run,
    canonical_json,
    describe_environment,
    differences,
    discard,
    make_folder,
    nothing_finished,
    number_changes,
    read_stored,
    sha256_file,
    write_json,
    write_text,
)
from gaintune.workflows.sweep import check_engine

RECORD = "recipe.json"
TRACEBACK = "traceback.txt"  # in a step's folder
OUTCOME = "outcome.json"  # in the folder of a finished step that trains nothing
CLASSIFIERS = "classifiers/*/*/*/adapter"
CHECKED = ("sequence", "separately", "sweep")  # steps that compare all of their settings with what is in their folder
ROW_SUMS = ("rows.json", "questions.json")  # rows that a step began with; without results it may begin with others
SMOKE = (
    "Random weights, a few steps, and the standard library's functions as text under every name: the verdicts show "
    "that everything runs, and nothing else."
)
COLUMNS = ["step", "number", "value", "low", "high"]


@dataclass(frozen=True)
class Finding:
    """A claim with its number here (None where its step was left out or failed) and the verdict."""

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

    @property
    def failed(self) -> dict[str, str]:
        """The steps that failed while they ran, each with the reason; those that work on them are left out."""
        return {step: outcome.failed for step, outcome in self.outcomes.items() if outcome.failed}

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
    jobs: int = 1,
    engine: str | None = None,
    models: Sequence[str] = (),
    allow_code_execution: bool = False,
    progress: Progress | None = None,
    prepare: Callable[[], None] | None = None,
) -> RecipeResult:
    """Run an experiment; a folder that was begun with the recipe of this id, scale and data is continued.

    A step that fails while it runs does not stop the others, and raises nothing: `RecipeResult.failed` says why. The
    next call tries it again, with other settings or overrides if it has finished no training yet. A step that trains
    nothing is done again if its settings have changed, and claims may always change. Settings and overrides that change
    the plan of finished training are refused, even where no method reads the key. The keys of
    `gaintune.storage.SAME_NUMBERS` may always change, and `train.batch_size` may while the rows of an update stay the
    same.

    Args:
        recipe: a recipe, or the id of one.
        folder: where everything goes.
        scale: paper (the papers' models, data and budgets), small (embedded models), or smoke (a tiny random model).
        data: folder of local copies under the papers' names; the Hub, or embedded texts, unless given.
        overrides: nested plan values laid over every step, such as `{"train": {"seed": 1}}`; those under a step's name
            are for that step alone, such as `{"70b": {"model": {"quantization": "4bit"}}}`.
        jobs: runs of a sweep at a time.
        engine: where a sweep's runs compute, as in `run_sweep`; `sequential` unless given, for several jobs `loky`.
        models: which of the recipe's models to run, by label or Hub id; all unless given.
        allow_code_execution: whether programs that a model wrote may be run (HumanEval).
        progress: where to show progress.
        prepare: called by every worker of a sweep before a run; must be importable.

    Raises:
        GaintuneError: bad input, or a folder of another run, before anything is run; a claim about an unknown number,
            once the results are written.
    """
    recipe = recipe_named(recipe) if isinstance(recipe, str) else recipe
    if scale not in SCALES:
        raise ConfigError(f"--scale {scale}: use {', '.join(SCALES)}")
    for step in (step for step in recipe.steps if step.do not in KINDS):
        known = ", ".join(KINDS)
        raise ConfigError(f"recipe {recipe.id}: step {step.name}: unknown kind {step.do!r}; known: {known}")
    workers = {**_workers(recipe, jobs, engine), "prepare": prepare}
    folder, data = Path(folder), None if data is None else Path(data)
    try:
        given: dict[str, Any] = json.loads(canonical_json(overrides or {}))
    except (TypeError, ValueError) as error:  # a date, or a number that is not finite
        raise ConfigError(f"--set: a value is neither a text, a finite number nor a list of them ({error})") from None
    identity = {
        "recipe": recipe.model_dump(mode="json"),
        "scale": scale,
        "data": None if data is None else str(data.resolve()),
        "overrides": given,
    }
    recipe = _chosen(recipe, scale, models, given)
    _check_overrides(recipe, given)
    if models:
        identity["models"] = [*models]
    before = _take(folder, identity)
    try:
        setup = ScaleSetup.make(scale, recipe.model, data, given, folder / "world")
        session = _Session(recipe, folder, setup, allow_code_execution, workers, progress or Silent())
        expected = _check(session)
        if before is None or before[0] != identity["recipe"]:
            check_hub(recipe, setup, folder)
        if before is not None and before != (identity["recipe"], given):
            earlier = _chosen(Recipe.model_validate(before[0]), scale, models, before[1])
            _check_finished(
                session, expected, replace(session, recipe=earlier, setup=replace(setup, overrides=before[1]))
            )
            write_json(folder / RECORD, identity)
    except GaintuneError:
        if before is None:  # a corrected recipe may begin there
            (folder / RECORD).unlink()
            shutil.rmtree(folder / "world", ignore_errors=True)
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
    outcomes: dict[str, StepOutcome] = {}
    for step in recipe.steps:
        outcome = _run_step(session, step, outcomes)
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


def _chosen(recipe: Recipe, scale: Scale, models: Sequence[str], overrides: Mapping[str, Any]) -> Recipe:
    """Return the recipe as it runs at a scale, on one base where the overrides name it."""
    model = overrides.get("model")
    return recipe.at(scale, models, one_base=isinstance(model, Mapping) and "name" in model)


def _workers(recipe: Recipe, jobs: int, engine: str | None) -> dict[str, Any]:
    """Return where a sweep's runs compute; ConfigError if that cannot be used, or if no step is a sweep."""
    if (jobs != 1 or engine) and not any(step.do == "sweep" for step in recipe.steps):
        raise ConfigError(f"recipe {recipe.id}: no step of it is a sweep, so --jobs and --engine change nothing")
    return {"engine": check_engine(engine or ("sequential" if jobs == 1 else "loky"), jobs), "jobs": jobs}


def _check_overrides(recipe: Recipe, overrides: Mapping[str, Any]) -> None:
    """Refuse keys that are neither a section of a plan nor a step, and those that are both."""
    steps, sections = [step.name for step in recipe.steps], list(Plan.model_fields)
    for key, value in overrides.items():
        if key in steps and key in sections:
            raise ConfigError(
                f"--set {key}: recipe {recipe.id} has a step of that name, and a plan has such a section; rename the "
                "step in a copy of the recipe"
            )
        if key not in steps and key not in sections:
            raise ConfigError(
                f"--set {key}: unknown key {key!r}; it is neither a section of a plan ({', '.join(sections)}) nor a "
                f"step of recipe {recipe.id} ({', '.join(steps)})"
            )
        if key in steps and not isinstance(value, Mapping):
            raise ConfigError(f"--set {key}: write {key}.section.key=value, such as {key}.train.lr=0.005")


def _take(folder: Path, identity: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Make the folder, or check that it is this recipe's; return recipe and overrides of the call before, if any."""
    new = not (folder / RECORD).exists()
    if new and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunDirectoryError(f"{folder} is there already and no recipe began it; name another folder")
    make_folder(folder)
    advice = "A folder is one recipe at one scale on one set of texts: name another one"
    if new:
        Run(folder).write_once(RECORD, identity, advice)
        return None
    before = read_stored(folder / RECORD, lambda record: (dict(record["recipe"]), dict(record["overrides"])))
    may_change = {"recipe": {**before[0], "id": identity["recipe"]["id"]}, "overrides": before[1]}
    Run(folder).write_once(RECORD, {**identity, **may_change}, advice)
    return before


@dataclass(frozen=True)
class _Session:
    """One call: the recipe, and what its steps share."""

    recipe: Recipe
    folder: Path
    setup: ScaleSetup
    allow_code_execution: bool
    workers: Mapping[str, Any]
    progress: Progress

    def overrides(self, step: Step) -> dict[str, Any]:
        """Return the overrides of every step, and over them those of this one."""
        names = [other.name for other in self.recipe.steps]
        common = {key: value for key, value in self.setup.overrides.items() if key not in names}
        return laid_over(common, dict(self.setup.overrides.get(step.name, {})))

    def prepare(self, step: Step, earlier: Mapping[str, StepOutcome]) -> PreparedStep:
        """Read a step's settings; a step that works on one that was left out or failed is left out itself."""
        setup = replace(self.setup, overrides=self.overrides(step))
        settings = self.recipe.settings(step, setup.scale)
        name = str(settings.get("of"))
        if name in earlier and earlier[name].failed:
            return PreparedStep.left_out(f"not run: it works on step {name}, which failed")
        if name in earlier and earlier[name].left_out:
            return PreparedStep.left_out(f"left out: it works on step {name}, which is left out")
        folder = self.folder / step.name
        context = Context(step.name, folder, setup, earlier, self.progress, self.allow_code_execution, self.workers)
        return KINDS[step.do](settings, context)

    def expected(self) -> dict[str, StepOutcome]:
        """Return the expected outcome of every step."""
        expected: dict[str, StepOutcome] = {}
        for step in self.recipe.steps:
            expected[step.name] = self.prepare(step, expected).expected
        return expected


def _run_step(session: _Session, step: Step, earlier: Mapping[str, StepOutcome]) -> StepOutcome:
    """Run a step; an error is an outcome, and the traceback of an unexpected one is written into the step's folder."""
    folder = session.folder / step.name
    if folder.is_dir():  # of an earlier call
        discard(folder, [TRACEBACK] if _holds_work(folder) else [TRACEBACK, *ROW_SUMS])
    try:
        prepared = session.prepare(step, earlier)
        if prepared.run is None:
            return prepared.expected
        return _run_once(session, step, prepared, earlier)
    except GaintuneError as error:
        reason = one_line(error)
    except Exception as error:
        if disk_full(error):  # no other step can be written either
            raise
        write_text(folder / TRACEBACK, traceback.format_exc())
        reason = f"{type(error).__name__}: {one_line(error)} (traceback: {step.name}/{TRACEBACK})"
    gc.collect()  # the error held the step's model
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return StepOutcome(notes=(f"failed: {reason}",), failed=reason)


def _run_once(session: _Session, step: Step, prepared: PreparedStep, earlier: Mapping[str, StepOutcome]) -> StepOutcome:
    """Return the outcome that an earlier call kept for the same adapters and plan, else run the step and keep it.

    Steps that train have a plan in their outcome. They find their finished work on disk, so nothing is kept here.
    """
    assert prepared.run is not None
    folder = session.folder / step.name
    of = earlier.get(str(session.recipe.settings(step, session.setup.scale).get("of")), StepOutcome())
    plan = prepared.expected.plan or of.plan
    adapters = {key: adapter / MANIFEST for key, adapter in of.adapters.items()}
    basis = {
        "adapters": {key: sha256_file(manifest) for key, manifest in adapters.items() if manifest.exists()},
        "notes": list(prepared.expected.notes),  # what is left out for want of rows or texts
        "plan": {} if plan is None else plan.model_dump(mode="json"),
        "settings": json.loads(canonical_json(_described(session.recipe, step, session.setup.scale))),
    }
    if prepared.keep and (folder / OUTCOME).exists():
        kept = read_stored(folder / OUTCOME, lambda record: {**record["basis"], "outcome": record["outcome"]})
        same = all(kept.get(key) == basis[key] for key in ("adapters", "notes", "settings"))
        if same and not number_changes(json.loads(canonical_json(basis["plan"])), kept["plan"]):
            outcome = read_stored(folder / OUTCOME, lambda record: StepOutcome.from_dict(record["outcome"], folder))
            if all(figure.exists() for figure in outcome.figures):
                session.progress.note(f"{step.name} is finished")
                return outcome
    outcome = prepared.run()
    if outcome.plan is None and prepared.keep:
        write_json(folder / OUTCOME, {"basis": basis, "outcome": outcome.to_dict(folder)})
    return outcome


def _described(recipe: Recipe, step: Step, scale: Scale) -> dict[str, Any]:
    """Return what a step does at a scale: its kind and its settings."""
    return {"do": step.do, **recipe.settings(step, scale)}


def _check_finished(session: _Session, expected: Mapping[str, StepOutcome], before: _Session) -> None:
    """Refuse a recipe or overrides that give finished work another plan than the call before, unless by a free key."""
    known, scale = before.expected(), session.setup.scale
    earlier = {step.name: step for step in before.recipe.steps}
    for step in session.recipe.steps:
        folder, old = session.folder / step.name, earlier.get(step.name)
        if old is None:
            if any(folder.glob(CLASSIFIERS)):
                raise RunDirectoryError(
                    f"step {step.name} is new, and {folder} holds classifiers of an earlier recipe: delete it, or name "
                    "another folder for the run"
                )
            continue
        here, there = _described(session.recipe, step, scale), _described(before.recipe, old, scale)
        measured = (folder / OUTCOME).exists() and step.do not in TRAINING
        if not _holds_work(folder) or (here != there and measured):  # it is measured again
            continue
        plans = [one.plan.model_dump(mode="json") for one in (expected[step.name], known[step.name]) if one.plan]
        changed = number_changes(*plans, folder=folder) if len(plans) == 2 else []
        if step.do != old.do or step.do not in CHECKED:
            changed += [line for line in differences(here, there) if line not in changed]
        if changed:
            raise RunDirectoryError(
                f"step {step.name} holds work that was finished with another plan ({'; '.join(changed)}), and its "
                f"numbers belong to one plan: keep its settings, give --set STEP.SECTION.KEY=VALUE for another step "
                f"alone, name another folder, or delete {folder} to do the step again"
            )


def _holds_work(folder: Path) -> bool:
    """Tell whether a step has finished any training, or a step without training its measurements."""
    finished = (folder / OUTCOME).exists() or any(folder.glob(CLASSIFIERS))
    return finished or not nothing_finished(folder)


def _check(session: _Session) -> dict[str, StepOutcome]:
    """Refuse, before anything is trained, what would otherwise be refused only after it; return expected outcomes."""
    recipe, setup, expected = session.recipe, session.setup, session.expected()
    if all(outcome.left_out for outcome in expected.values()):
        why = "; ".join(f"step {step}: {note}" for step, outcome in expected.items() for note in outcome.notes)
        raise ConfigError(f"recipe {recipe.id}: no step of it can run at scale {setup.scale} ({why})")
    plans = [outcome.plan for outcome in expected.values() if outcome.plan]
    if setup.overrides and not plans:
        raise ConfigError(f"recipe {recipe.id}: no step of it has a plan, so --set changes nothing; leave it out")
    for name in (name for name in setup.overrides if name in expected and expected[name].plan is None):
        why = "is left out" if expected[name].left_out else "has no plan of its own"
        raise ConfigError(f"--set {name}: step {name} {why}, so it changes nothing; leave it out")
    if not any("methods" in session.overrides(step) for step in recipe.steps):
        return expected
    gone = {label for step in recipe.steps for label in names_in(recipe.settings(step, setup.scale), "methods")}
    gone -= {method.label for plan in plans for method in plan.methods}
    for claim in recipe.claims:
        if about := [label for label in gone if _mentions(claim.number, label)]:
            raise ConfigError(
                f"--set methods: the claim {claim.says!r} is about {about[0]!r}, which is none of them; keep its "
                "label, or write a recipe of your own (`gaintune recipe show` has this one's steps)"
            )
    return expected


def _judge(claim: Claim, outcomes: Mapping[str, StepOutcome]) -> Finding:
    """Decide a claim; a missing number leaves it undecided."""
    step, _, name = claim.number.partition(".")
    number = outcomes[step].numbers.get(name)
    return Finding(claim, number, "undecided" if number is None else judge(number, claim.expect.bounds))


def _refuse_unknown_number(finding: Finding, outcomes: Mapping[str, StepOutcome], lacking: list[str]) -> None:
    """Refuse a claim about a number that its step gives at no scale; `lacking` excuses what this scale lacks."""
    step, _, name = finding.claim.number.partition(".")
    outcome = outcomes[step]
    if finding.number is not None or outcome.left_out or outcome.failed or name in outcome.without:
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
    write_json(folder / "results.json", {**record, **({"failed": result.failed} if result.failed else {})})
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
    yield from _aside(recipe, result.scale)
    if result.scale == "smoke":
        yield from (SMOKE, "")
    if result.failed:
        failed = ", ".join(result.failed)
        yield from (f"Failed: {failed}. The same command tries that again, and keeps what is finished.", "")
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
    if recipe.models and recipe.table:
        yield from ("The models:", "", markdown_table(_over_models(result), "Model"), "")
    for step, outcome in result.outcomes.items():
        yield from (f"## {step}", "")
        notes = [*outcome.notes, *(f"no number {name}: {why}" for name, why in outcome.without.items())]
        yield from (f"- {note}" for note in notes)
        yield from [""] if notes else []
        for title, table in outcome.tables.items():
            yield from (f"{title}:", "", markdown_table(table, ""), "")
        for figure in outcome.figures:
            yield from (f"![{figure.stem}](figures/{_figure_name(result, step, figure)})", "")


def _aside(recipe: Recipe, scale: Scale) -> Iterator[str]:
    """Yield the lines that say what is not as in the paper."""
    if recipe.differs:
        yield from ("Not as in the paper, or not known from its text:", "")
        yield from (f"- {difference}" for difference in recipe.differs)
        yield ""


def _over_models(result: RecipeResult) -> pd.DataFrame:
    """Return a row for each model, and a column for each number of the recipe's table."""
    recipe, rows = result.recipe, {}
    labels = {recipe.model: "", **{further.model: further.label for further in recipe.models}}
    for model, label in labels.items():
        numbers = [number_on(label, number) if label else number for number in recipe.table.values()]
        split = [number.partition(".") for number in numbers]
        if split[0][0] in result.outcomes:
            rows[model] = [shown(result.outcomes[step].numbers.get(rest)) for step, _, rest in split]
    return pd.DataFrame.from_dict(rows, orient="index", columns=list(recipe.table))


def shown(value: Interval | None) -> str:
    """Format a number with its interval, the bare number, or a dash for none."""
    if value is None:
        return NONE
    ends = f" [{_digits(value.low)}, {_digits(value.high)}]" if value.low is not None and value.high is not None else ""
    return _digits(value.value) + ends


def _digits(value: float) -> str:
    return f"{'−' if value < 0 else ''}{number(abs(value))}" if abs(value) >= 1 else f"{value:.3g}".replace("-", "−")
