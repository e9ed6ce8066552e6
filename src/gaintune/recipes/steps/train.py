"""Steps that train: a sequence of domains, and domains learnt apart from each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from gaintune.config import Plan
from gaintune.errors import DivergedError
from gaintune.recipes.outcome import Context, Outcome
from gaintune.recipes.world import STAND_INS
from gaintune.report import FIGURES, NONE, cell_frame, summary_frame, with_interval, write_report
from gaintune.results import Interval, Matrix, Summary, highest
from gaintune.storage import Run, read_stored
from gaintune.workflows import run_sequence

MEASURE = "change of perplexity against the base, %, intervals over validation blocks"


def sequence(settings: dict[str, Any], context: Context) -> Outcome:
    """Domain after domain with each method: `gaintune sequence`.

    Numbers, in % of perplexity: `LABEL.in_domain` and the other figures of a summary; `LABEL.worst_below`, the worst
    domain learnt before, at any stage; `LABEL.DOMAIN` after the last stage; `LABEL.after-STAGE.DOMAIN`;
    `LABEL-minus-FIRST.in_domain` and so on, paired, in points of %.
    """
    if why := nothing_to_learn(settings, context):
        return Outcome(notes=(why,), left_out=True)
    plan = context.world.plan(settings, origin=context.origin)
    matrix, diverged = learn(plan, context.folder, context)
    tables = {f"Summary: {MEASURE}": summary_frame(matrix)}
    for method in matrix.methods:
        tables[f"{method.label}, every domain after every stage, likewise"] = cell_frame(matrix, method).map(
            lambda cell: NONE if cell is None else with_interval(cell)
        )
    return Outcome(
        numbers=matrix_numbers(matrix),
        tables=tables,
        figures=tuple(sorted((context.folder / "figures").glob("*.png"))),
        adapters=adapters_of(context.folder, matrix),
        plan=plan,
        notes=(*left_out(settings, context), *notes_on(diverged)),
        runs=(context.folder,),
        diverged=diverged,
    )


def separately(settings: dict[str, Any], context: Context) -> Outcome:
    """Each domain learnt from the base by itself, every domain measured afterwards; numbers as `DOMAIN.LABEL.…`."""
    if why := nothing_to_learn(settings, context):
        return Outcome(notes=(why,), left_out=True)
    asked = settings.pop("domains", [])
    numbers: dict[str, Interval] = {}
    tables, figures, adapters = {}, [], {}
    plan, runs, diverged = None, [], {}
    for domain in context.world.domains(asked):
        others = [other for other in context.world.domains(asked) if other["name"] != domain["name"]]
        watched = [*others, *settings.get("watched", [])]
        plan = context.world.plan({**settings, "domains": [domain], "watched": watched}, origin=context.origin)
        run = context.folder / str(domain["name"])
        matrix, broken = learn(plan, run, context)
        diverged |= {label: f"{domain['name']}: {why}" for label, why in broken.items()}
        numbers |= {f"{domain['name']}.{name}": value for name, value in matrix_numbers(matrix).items()}
        tables[f"{domain['name']} learnt by itself: {MEASURE}"] = summary_frame(matrix)
        figures += sorted((run / "figures").glob("*.png"))
        adapters |= adapters_of(run, matrix)
        runs.append(run)
    notes = (*left_out({"domains": asked, **settings}, context), *notes_on(diverged))
    return Outcome(
        numbers, tables, tuple(figures), adapters, plan, notes, runs=tuple(runs), diverged=diverged, apart=True
    )


def learn(plan: Plan, run: Path, context: Context) -> tuple[Matrix, dict[str, str]]:
    """A sequence with its report: the matrix of the methods that finished, and those that diverged with the reason.

    Raises:
        DivergedError: every method diverged, or one of several processes did.
    """
    try:
        matrix, diverged = run_sequence(plan, run, progress=context.progress), {}
    except DivergedError as error:
        if not error.finished:
            raise
        diverged = error.methods
        found = read_stored(run / "matrix.json", Matrix.from_dict)
        matrix = replace(
            found,
            methods=tuple(method for method in found.methods if method.label not in diverged),
            comparisons=tuple(each for each in found.comparisons if not {each.label, each.against} & set(diverged)),
        )
    write_report(run)
    return matrix, diverged


def notes_on(diverged: Mapping[str, str]) -> tuple[str, ...]:
    """Say what diverged."""
    return tuple(f"{label} diverged, and claims about it are undecided: {why}" for label, why in diverged.items())


def nothing_to_learn(settings: Mapping[str, Any], context: Context) -> str | None:
    """Why this scale has not what a step learns; None where it has."""
    if not context.world.has_base(settings.get("base")):
        return f"left out: scale small has one base, and this step asks for {settings['base']} beside it"
    if context.world.scale == "small" and not context.world.domains(settings.get("domains", ())):
        names = ", ".join(context.world.missing(settings.get("domains", ())))
        return f"left out: there is no text for {names}; give --data FOLDER with a local copy"
    return None


def left_out(settings: Mapping[str, Any], context: Context) -> tuple[str, ...]:
    """Say which of the paper's domains have no text here."""
    names = [*settings.get("domains", ()), *settings.get("watched", ())]
    missing = context.world.missing(names)
    stand_ins = [
        f"{each['name']} is {each['source']}"
        for each in context.world.domains(names)
        if context.world.scale == "small" and each["source"] == STAND_INS.get(each["name"])
    ]
    notes = [f"left out for want of a text (give --data FOLDER): {', '.join(missing)}"] if missing else []
    return (*notes, *([f"embedded texts stand in: {', '.join(stand_ins)}"] if stand_ins else []))


def adapters_of(run: Path, matrix: Matrix) -> dict[str, Path]:
    """The adapter folders of a run, by `label/domain`."""
    return {
        f"{method.label}/{row.domain}": Run(run).stage(method.label, index, row.domain) / "adapter"
        for method in matrix.methods
        for index, row in enumerate(method.stages)
    }


def matrix_numbers(matrix: Matrix) -> dict[str, Interval]:
    """Every number of a matrix under the name that a claim uses."""
    found: dict[str, Interval] = {}
    for method in matrix.methods:
        found |= _summary(method.label, method.summary)
        for row in method.stages:
            found |= {f"{method.label}.after-{row.domain}.{name}": cell.interval for name, cell in row.cells.items()}
        below = [
            row.cells[earlier.domain].interval
            for number, row in enumerate(method.stages)
            for earlier in method.stages[:number]
        ]
        if below:
            found[f"{method.label}.worst_below"] = highest(below)
        if method.stages:
            found |= {f"{method.label}.{name}": cell.interval for name, cell in method.stages[-1].cells.items()}
    for comparison in matrix.comparisons:
        found |= _summary(f"{comparison.label}-minus-{comparison.against}", comparison.summary)
    return found


def _summary(label: str, summary: Summary) -> dict[str, Interval]:
    figures = ((name, getattr(summary, name)) for name in FIGURES)
    return {f"{label}.{name}": interval for name, interval in figures if interval is not None}
