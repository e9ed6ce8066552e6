"""Steps that repeat a sequence over rates, orders and seeds: `gaintune sweep`."""

from __future__ import annotations

from typing import Any

import pandas as pd

from gaintune.config import Plan
from gaintune.errors import SweepError
from gaintune.progress import plural
from gaintune.recipes.outcome import Context, Outcome
from gaintune.recipes.steps.train import left_out, nothing_to_learn
from gaintune.report import markdown_table
from gaintune.results import BACKWARD_TRANSFER, Interval, highest, lowest
from gaintune.storage import write_text
from gaintune.workflows.sweep import (
    Grid,
    SweepComparison,
    SweepTable,
    compare_sweep,
    curve_sentence,
    discard,
    heading,
    pair_sentence,
    point_frame,
    read_grid,
    remarks,
    run_sweep,
    target_title,
    unbroken,
    write,
)

AXES = ("rates", "orders", "order_seed", "seeds", "ranks", "budgets")


def sweep(settings: dict[str, Any], context: Context) -> Outcome:
    """Every combination of methods, rates, orders and seeds; numbers over replicates, in % of perplexity.

    Settings are those of a sequence, the axes of a grid, `target` and `figure` of its comparison. Numbers:
    `VARIANT@RATE.in_domain` and `.FIGURE`; `VARIANT.worst` and `.best`, the highest and lowest FIGURE of a variant;
    `matched.A-minus-B` and `curve.A-minus-B`, on FIGURE; `A-minus-B` of variants with one rate each, matched or not.
    A rate of which a run diverged has no number, and its variant no `.worst`; `.best` is that of the other rates.
    """
    if why := nothing_to_learn(settings, context):
        return Outcome(notes=(why,), left_out=True)
    target, figure = settings.pop("target", None), settings.pop("figure", BACKWARD_TRANSFER)
    plan, grid = plan_and_grid(settings, context)
    table = run_sweep(grid, context.folder, engine="sequential", progress=context.progress)
    discard(context.folder)
    broken = [row for row in table.failed if not row.diverged] or (() if table.finished else table.failed)
    if broken:
        raise SweepError(
            f"{context.origin}: {plural(len(broken), 'run')} did not finish, such as {broken[0].run.id}: "
            f"{broken[0].error}"
        )
    comparison = compare_sweep(table, target=target, figure=figure, confidence=plan.evaluate.confidence)
    write(comparison, context.folder)
    numbers, without = numbers_of(comparison)
    runs = runs_frame(table, figure)
    tables = {
        f"Every rate: change of perplexity against the base, %, intervals over {comparison.over}": point_frame(
            comparison.points, comparison
        ),
        target_title(comparison): point_frame(comparison.matched, comparison),
        "Every run, likewise": runs,
    }
    write_text(context.folder / "runs.md", markdown_table(runs, "Method"))
    told = [pair_sentence(each, comparison) for each in comparison.pairs]
    told += [curve_sentence(each, comparison) for each in comparison.curves]
    told += remarks(comparison)
    return Outcome(
        numbers=numbers,
        tables=tables,
        figures=tuple(sorted(context.folder.glob("*.png"))),
        plan=plan,
        notes=(*left_out(settings, context), *told),
        without=without,
        diverged={_plain(one.variant): f"at {one.lr:g}: {one.error}" for one in comparison.missing},
    )


def plan_and_grid(settings: dict[str, Any], context: Context) -> tuple[Plan, Grid]:
    """The plan that all runs have in common, its methods among it, and the grid over it."""
    axes = {key: settings.pop(key) for key in AXES if key in settings}
    plan = context.world.plan(settings, origin=context.origin)
    methods = context.world.overrides.get("methods", settings.get("methods", []))
    return plan, read_grid({**axes, "methods": methods, "plan": _without_methods(plan)})


def _without_methods(plan: Plan) -> dict[str, Any]:
    """A plan's values for a grid, which has the methods itself."""
    return {key: value for key, value in plan.model_dump(mode="json").items() if key != "methods"}


def numbers_of(comparison: SweepComparison) -> tuple[dict[str, Interval], dict[str, str]]:
    """The numbers of a comparison by the names that claims use, and those it has not with the reason."""
    numbers: dict[str, Interval] = {}
    without: dict[str, str] = {}
    for variant in dict.fromkeys(point.variant for point in comparison.points):
        own = [point for point in comparison.points if point.variant == variant]
        name = _plain(variant)
        for point in own:
            numbers[f"{name}@{point.lr:g}.in_domain"] = point.in_domain
            numbers[f"{name}@{point.lr:g}.{comparison.figure}"] = point.figure
        numbers[f"{name}.worst"] = highest([point.figure for point in own])
        numbers[f"{name}.best"] = lowest([point.figure for point in unbroken(own)])
    for pair in comparison.pairs:
        name = f"{_plain(pair.first)}-minus-{_plain(pair.second)}"
        if pair.one_rate_each and pair.difference is not None:
            numbers[name] = pair.difference
        if pair.unmatched is None and pair.difference is not None:
            numbers[f"matched.{name}"] = pair.difference
        else:  # what holds of methods that adapted unequally is no verdict on methods that adapted alike
            without[f"matched.{name}"] = str(pair.unmatched)
    for each in comparison.curves:
        name = f"curve.{_plain(each.first)}-minus-{_plain(each.second)}"
        if each.curve is None:
            without[name] = str(each.reason)
        else:
            numbers[name] = each.curve.difference
    for one in comparison.missing:  # means over the runs that survived would flatter it
        name, why = _plain(one.variant), f"{plural(one.runs, 'run')} at {one.lr:g} diverged"
        lost_ones = [f"{name}@{one.lr:g}.in_domain", f"{name}@{one.lr:g}.{comparison.figure}", f"{name}.worst"]
        if all(point.failed for point in comparison.points if point.variant == one.variant):
            lost_ones.append(f"{name}.best")
        for lost in lost_ones:
            numbers.pop(lost, None)
            without[lost] = why
    return numbers, without


def _plain(variant: str) -> str:
    """A variant's name as a part of a number's."""
    return variant.replace(" ", "-").replace(",", "")


def runs_frame(table: SweepTable, figure: str) -> pd.DataFrame:
    """A row for each run: rate, order, seed, in-domain change and the figure that is compared, in %."""
    frame = table.frame()
    shown = frame[["lr", "domains", "seed", "in_domain", figure]].copy()
    for column in ("in_domain", figure):
        shown[column] = shown[column].map(lambda value: f"{value:+.1f}".replace("-", "−"))
    shown.index = pd.Index(frame["label"])
    return shown.rename(
        columns={"lr": "LR", "domains": "Order", "seed": "Seed", "in_domain": "In-domain", figure: heading(figure)}
    ).astype(str)
