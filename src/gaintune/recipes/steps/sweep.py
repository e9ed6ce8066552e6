"""Steps that repeat a sequence over rates, orders and seeds: `gaintune sweep`."""

from __future__ import annotations

import math
import random
from typing import Any

import pandas as pd

import gaintune.workflows.sweep as sweeps
from gaintune.errors import ConfigError, SweepError
from gaintune.progress import plural
from gaintune.recipes.outcome import Context, PreparedStep, StepOutcome
from gaintune.recipes.steps.train import shortages
from gaintune.report import markdown_table
from gaintune.results import BACKWARD_TRANSFER, Interval, highest, lowest
from gaintune.storage import write_text

AXES = ("rates", "orders", "order_seed", "seeds", "ranks", "budgets")
OWNED = {"rates": "train.lr", "seeds": "train.seed", "budgets": "data.train_tokens"}  # the plan's key of an axis


def sweep(settings: dict[str, Any], context: Context) -> PreparedStep:
    """Train every combination of methods, rates, orders and seeds; numbers over replicates, in % of perplexity.

    Settings are those of a sequence, the axes of a grid, `target` and `figure` of its comparison. `random_orders` is
    how many orders to draw, where `orders` of a grid begins with the plan's own. Numbers:
    `VARIANT@RATE.in_domain` and `.FIGURE`; `VARIANT.worst` and `.best`, the highest and lowest FIGURE of a variant;
    `matched.A-minus-B` and `curve.A-minus-B`, on FIGURE; `A-minus-B` of variants with one rate each, matched or not.
    A rate at which a run diverged has no number, and its variant no `.worst`; `.best` is that of the other rates.
    """
    if why := context.setup.why_not(settings):
        return PreparedStep.left_out(why)
    context.refuse_owned({key: f"its {axis} are an axis" for axis, key in OWNED.items() if axis in settings})
    if isinstance(settings.get("orders"), list) or "random_orders" in settings:
        context.refuse_owned({"data.domains": "its orders name them"})
    target, figure = settings.pop("target", None), settings.pop("figure", BACKWARD_TRANSFER)
    sweeps.check_comparison(figure, target)
    axes = {key: settings.pop(key) for key in AXES if key in settings}
    drawn = settings.pop("random_orders", None)
    plan = context.setup.plan(settings, origin=context.origin)
    seed_note = [] if drawn is None else [f"random orders of the domains, drawn by seed {axes.get('order_seed', 0)}"]
    if drawn is not None:
        axes["orders"] = random_orders([domain.name for domain in plan.data.domains], drawn, axes, context.origin)
    methods = context.setup.overrides.get("methods", settings.get("methods", []))
    common = {key: value for key, value in plan.model_dump(mode="json").items() if key != "methods"}
    grid = sweeps.read_grid({**axes, "methods": methods, "plan": common})

    def run() -> StepOutcome:
        table = sweeps.run_sweep(grid, context.folder, progress=context.progress, **context.workers)
        sweeps.discard(context.folder)
        broken = [row for row in table.failed if not row.diverged] or (() if table.finished else table.failed)
        if broken:
            raise SweepError(
                f"{context.origin}: {plural(len(broken), 'run')} did not finish, such as {broken[0].run.id}: "
                f"{broken[0].error}"
            )
        comparison = sweeps.compare_sweep(table, target=target, figure=figure, confidence=plan.evaluate.confidence)
        sweeps.write(comparison, context.folder)
        numbers, without = numbers_of(comparison)
        short = dict.fromkeys(note for row in table.finished for note in shortages(row.run.plan, row.folder))
        runs = runs_frame(table, figure)
        write_text(context.folder / "runs.md", markdown_table(runs, "Method"))
        every_rate = f"Every rate: change of perplexity against the base, %, intervals over {comparison.over}"
        notes = [*context.setup.text_notes(settings), *seed_note]
        notes += [sweeps.pair_sentence(pair, comparison) for pair in comparison.pairs]
        notes += [sweeps.curve_sentence(curve, comparison) for curve in comparison.curves]
        return StepOutcome(
            numbers=numbers,
            tables={
                every_rate: sweeps.point_frame(comparison.points, comparison),
                sweeps.target_title(comparison): sweeps.point_frame(comparison.matched, comparison),
                "Every run, likewise": runs,
            },
            figures=tuple(sorted(context.folder.glob("*.png"))),
            plan=plan,
            notes=(*notes, *short, *sweeps.remarks(comparison)),
            without=without,
            diverged={_plain(lost.variant): f"at {lost.lr:g}: {lost.error}" for lost in comparison.missing},
        )

    return PreparedStep(StepOutcome(plan=StepOutcome.expected(plan).plan), run)


def random_orders(names: list[str], count: Any, axes: dict[str, Any], origin: str) -> list[tuple[str, ...]]:
    """Draw `count` different orders of the domains, all of them random; takes `order_seed` out of `axes`."""
    if "orders" in axes:
        raise ConfigError(f"{origin}: orders and random_orders both name the orders: leave one of them out")
    most = math.factorial(len(names))
    if type(count) is not int or not 1 <= count <= most:
        raise ConfigError(f"{origin}: random_orders: {len(names)} domains have {most:,} orders, not {count!r}")
    generator, orders = random.Random(axes.pop("order_seed", 0)), dict[tuple[str, ...], None]()
    while len(orders) < count:
        orders[tuple(generator.sample(names, len(names)))] = None
    return [*orders]


def numbers_of(comparison: sweeps.SweepComparison) -> tuple[dict[str, Interval], dict[str, str]]:
    """Return a comparison's numbers by the names that claims use, and the missing ones with the reason."""
    numbers: dict[str, Interval] = {}
    without: dict[str, str] = {}
    for variant in dict.fromkeys(point.variant for point in comparison.points):
        own = [point for point in comparison.points if point.variant == variant]
        name = _plain(variant)
        for point in own:
            numbers[f"{name}@{point.lr:g}.in_domain"] = point.in_domain
            numbers[f"{name}@{point.lr:g}.{comparison.figure}"] = point.figure
        numbers[f"{name}.worst"] = highest([point.figure for point in own])
        numbers[f"{name}.best"] = lowest([point.figure for point in sweeps.unbroken(own)])
    for pair in comparison.pairs:
        name = f"{_plain(pair.first)}-minus-{_plain(pair.second)}"
        if pair.one_rate_each and pair.difference is not None:
            numbers[name] = pair.difference
        if pair.unmatched is None and pair.difference is not None:
            numbers[f"matched.{name}"] = pair.difference
        else:  # a difference of methods that adapted unequally says nothing about methods that adapted equally
            without[f"matched.{name}"] = str(pair.unmatched)
    for pair in comparison.curves:
        name = f"curve.{_plain(pair.first)}-minus-{_plain(pair.second)}"
        if pair.curve is None:
            without[name] = str(pair.reason)
        else:
            numbers[name] = pair.curve.difference
    for lost in comparison.missing:  # means over the runs that survived would flatter it
        name = _plain(lost.variant)
        names = [f"{name}@{lost.lr:g}.in_domain", f"{name}@{lost.lr:g}.{comparison.figure}", f"{name}.worst"]
        if all(point.failed for point in comparison.points if point.variant == lost.variant):
            names.append(f"{name}.best")
        for name in names:
            numbers.pop(name, None)
            without[name] = f"{plural(lost.runs, 'run')} at {lost.lr:g} diverged"
    return numbers, without


def _plain(variant: str) -> str:
    """Return a variant's name as a part of a number's name."""
    return variant.replace(" ", "-").replace(",", "")


def runs_frame(table: sweeps.SweepTable, figure: str) -> pd.DataFrame:
    """Return a row for each run: rate, order, seed, in-domain change and the figure that is compared, in %."""
    frame = table.frame()
    shown = frame[list(dict.fromkeys(["lr", "domains", "seed", "in_domain", figure]))].copy()
    for column in {"in_domain", figure}:
        shown[column] = shown[column].map(lambda value: f"{value:+.1f}".replace("-", "−"))
    shown.index = pd.Index(frame["label"])
    heads = {"lr": "LR", "domains": "Order", "seed": "Seed", "in_domain": "In-domain", figure: sweeps.heading(figure)}
    return shown.rename(columns=heads).astype(str)
