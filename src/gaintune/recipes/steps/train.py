"""Steps that train: a sequence of domains, and domains trained independently."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gaintune.config import Plan
from gaintune.errors import ConfigError, DivergedError
from gaintune.recipes.outcome import Context, PreparedStep, StepOutcome
from gaintune.report import FIGURES, NONE, cell_frame, summary_frame, with_interval, write_report
from gaintune.results import Interval, Matrix, Summary, build_matrix, exact, highest, stored_run
from gaintune.storage import Run, read_stored, sha256_file
from gaintune.workflows import run_sequence

MEASURE = "change of perplexity against the base, %, intervals over validation blocks"
BEST = "the best snapshot counts: it is chosen and judged on the same rows, which flatters it a little"
OWN_DOMAINS = {"data.domains": "the recipe says what each run trains on"}


def sequence(settings: dict[str, Any], context: Context) -> PreparedStep:
    """Train on domain after domain with each method: `gaintune sequence`.

    Numbers, in % of perplexity: `LABEL.in_domain` and the other figures of a summary; `LABEL.worst_below`, the worst
    earlier domain at any stage; `LABEL.DOMAIN` after the last stage; `LABEL.after-STAGE.DOMAIN`;
    `LABEL-minus-FIRST.in_domain` and so on, paired, in points of %; and `A-minus-B` for each two labels of `paired`.
    Counted: `LABEL.parameters`, those trained.
    """
    if why := context.setup.why_not(settings):
        return PreparedStep.left_out(why)
    pairs = [tuple(pair) for pair in settings.pop("paired", ())]
    plan = context.setup.plan(settings, origin=context.origin)
    labels = [method.label for method in plan.methods]
    if wrong := [pair for pair in pairs if len(pair) != 2 or not {*pair} <= {*labels}]:
        named = ", ".join(labels)
        raise ConfigError(f"{context.origin}: paired: {list(wrong[0])} are not two labels of its methods: {named}")

    def run() -> StepOutcome:
        matrix, outcome = train(plan, context.folder, context)
        tables = {f"Summary: {MEASURE}": summary_frame(matrix)}
        for method in matrix.methods:
            cells = cell_frame(matrix, method).map(lambda cell: NONE if cell is None else with_interval(cell))
            tables[f"{method.label}, every domain after every stage, likewise"] = cells
        numbers = {**outcome.numbers, **_paired(matrix, pairs, plan, context.folder)}
        notes = (*context.setup.text_notes(settings), *outcome.notes)
        return replace(outcome, numbers=numbers, tables=tables, notes=notes)

    return PreparedStep(StepOutcome.expected(plan), run)


def separately(settings: dict[str, Any], context: Context) -> PreparedStep:
    """Train on each domain from the base, and measure every domain afterwards; numbers as `DOMAIN.LABEL.…`."""
    setup = context.setup
    if why := setup.why_not(settings):
        return PreparedStep.left_out(why)
    context.refuse_owned({**OWN_DOMAINS, "data.watched": OWN_DOMAINS["data.domains"]})
    domains = setup.domains(settings.get("domains", ()))

    def run() -> StepOutcome:
        outcomes: dict[str, StepOutcome] = {}
        tables = {}
        lacking: list[str] = []
        for domain in domains:
            name = str(domain["name"])
            watched = [*(other for other in domains if other["name"] != name), *settings.get("watched", [])]
            plan = setup.plan({**settings, "domains": [domain], "watched": watched}, origin=context.origin)
            matrix, outcomes[name] = train(plan, context.folder / name, context)
            lacking += shortages(plan, context.folder / name)
            tables[f"{name} learnt by itself: {MEASURE}"] = summary_frame(matrix)
        by_name = outcomes.items()
        diverged = {label: f"{name}: {why}" for name, outcome in by_name for label, why in outcome.diverged.items()}
        return StepOutcome(
            numbers={f"{name}.{key}": value for name, outcome in by_name for key, value in outcome.numbers.items()},
            tables=tables,
            figures=tuple(figure for outcome in outcomes.values() for figure in outcome.figures),
            adapters={key: folder for outcome in outcomes.values() for key, folder in outcome.adapters.items()},
            plan=[outcome.plan for outcome in outcomes.values()][-1],
            notes=(*setup.text_notes(settings), *_notes_on(diverged), *lacking),
            runs=tuple(context.folder / name for name in outcomes),
            diverged=diverged,
            apart=True,
        )

    plan = setup.plan(settings, origin=context.origin)
    runs = tuple(Path(domain.name) for domain in plan.data.domains)
    return PreparedStep(StepOutcome.expected(plan, apart=True, runs=runs), run)


def train(plan: Plan, folder: Path, context: Context) -> tuple[Matrix, StepOutcome]:
    """Run a sequence and write its report; return the matrix of the methods that finished, and the outcome.

    Raises:
        DivergedError: every method diverged, or one of several processes did.
    """
    try:
        matrix, diverged = run_sequence(plan, folder, progress=context.progress, pass_over_unfit=True), {}
    except DivergedError as error:
        if not error.finished:
            raise
        diverged = error.methods
        whole = read_stored(folder / "matrix.json", Matrix.from_dict)
        matrix = replace(
            whole,
            methods=tuple(method for method in whole.methods if method.label not in diverged),
            comparisons=tuple(pair for pair in whole.comparisons if not {pair.label, pair.against} & set(diverged)),
        )
    write_report(folder)
    outcome = StepOutcome(
        numbers=_numbers(matrix),
        figures=tuple(sorted((folder / "figures").glob("*.png"))),
        adapters={
            f"{method.label}/{row.domain}": Run(folder).stage(method.label, index, row.domain) / "adapter"
            for method in matrix.methods
            for index, row in enumerate(method.stages)
        },
        plan=plan,
        notes=(*_notes_on(diverged), *shortages(plan, folder), *([BEST] if plan.train.keep == "best" else [])),
        runs=(folder,),
        diverged=diverged,
    )
    return matrix, outcome


def _paired(matrix: Matrix, pairs: Sequence[tuple[str, ...]], plan: Plan, folder: Path) -> dict[str, Interval]:
    """Return the numbers of one method less another, paired block by block, for each two labels that finished."""
    numbers: dict[str, Interval] = {}
    methods = {method.label: method for method in matrix.methods}
    for label, other in (pair for pair in pairs if {*pair} <= {*methods}):
        runs = [stored_run(Run(folder), methods[name]) for name in (other, label)]
        for comparison in build_matrix(runs, plan.evaluate, planned=matrix.planned).comparisons:
            numbers |= _summary_numbers(f"{label}-minus-{other}", comparison.summary)
    return numbers


def _notes_on(diverged: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(f"{label} did not finish, and claims about it are undecided: {why}" for label, why in diverged.items())


def shortages(plan: Plan, run: Path) -> tuple[str, ...]:
    """Name the domains of a run that have fewer training tokens than the plan wants."""
    domains = read_stored(run / "inputs.json", dict)["domains"]
    wanted = plan.data.train_tokens // plan.data.block_size * plan.data.block_size
    given = {domain.name: domains[domain.name]["train_tokens"] for domain in plan.data.domains}
    short = [f"{name} has {tokens:,}" for name, tokens in given.items() if tokens < wanted]
    return (f"fewer training tokens than the {wanted:,} asked for: {', '.join(short)}",) if short else ()


def sums_of(path: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of a local copy, by its path inside."""
    files = [path] if path.is_file() else [file for file in sorted(path.rglob("*")) if file.is_file()]
    return {file.relative_to(path).as_posix(): sha256_file(file) for file in files}


def _numbers(matrix: Matrix) -> dict[str, Interval]:
    """Return every number of a matrix under the name that a claim uses."""
    numbers: dict[str, Interval] = {}
    for method in matrix.methods:
        label, stages = method.label, method.stages
        if "trainable_parameters" in method.info:
            numbers[f"{label}.parameters"] = exact(method.info["trainable_parameters"])
        numbers |= _summary_numbers(label, method.summary)
        for row in stages:
            numbers |= {f"{label}.after-{row.domain}.{name}": cell.interval for name, cell in row.cells.items()}
        below = [row.cells[earlier.domain].interval for n, row in enumerate(stages) for earlier in stages[:n]]
        if below:
            numbers[f"{label}.worst_below"] = highest(below)
        if stages:
            numbers |= {f"{label}.{name}": cell.interval for name, cell in stages[-1].cells.items()}
    for comparison in matrix.comparisons:
        numbers |= _summary_numbers(f"{comparison.label}-minus-{comparison.against}", comparison.summary)
    return numbers


def _summary_numbers(label: str, summary: Summary) -> dict[str, Interval]:
    figures = ((name, getattr(summary, name)) for name in FIGURES)
    return {f"{label}.{name}": interval for name, interval in figures if interval is not None}
