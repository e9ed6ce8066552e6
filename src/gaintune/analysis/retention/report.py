"""Adaptations over time as a table and a figure: the target, what is kept, and one against the other."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gaintune.analysis.base import Headline, Result, Subject
from gaintune.analysis.drawing import drawn, ends, legend, ruled
from gaintune.analysis.retention import RetentionOptions
from gaintune.analysis.retention.survey import Retention, SnapshotScores, Trajectory
from gaintune.report import INK, Look, look, markdown_table, with_interval
from gaintune.results import Interval, highest, lowest

Read = Callable[[Trajectory, SnapshotScores], Interval | None]


@dataclass(frozen=True)
class Side:
    """One thing to draw over time: its name with unit, and how it is read from a snapshot."""

    name: str
    read: Read


def sides(found: Retention) -> list[tuple[Side, Side]]:
    """Target and retention, in perplexity and in benchmarks, as far as measured; the target twice where it is alone."""
    target = Side("target: change of perplexity, %", lambda one, at: found.change(one, at, found.target))
    texts = Side("other texts: change of perplexity, %", lambda one, at: found.change(one, at, found.texts))
    task = Side("target task: change, points of %", lambda _, at: at.scores and at.scores.target_change)
    kept = Side("benchmarks: change, points of %", lambda _, at: at.scores and at.scores.retention_change)
    rest = texts if found.texts else target
    scores = found.base.scores
    if scores is None:
        return [(target, rest)]
    asked = (task if scores.target is not None else target, kept if scores.retention is not None else rest)
    return [(target, rest), asked] if found.texts else [asked]


def _each_once(found: Retention) -> list[Side]:
    return list(dict.fromkeys(side for pair in sides(found) for side in pair))


def table(found: Retention) -> pd.DataFrame:
    """One row for each adaptation, snapshot and domain or benchmark.

    `value` is a perplexity or a metric in %, `change` against the pretrained model in % of perplexity; benchmarks have
    their mean change, in points of %, in rows of their own.
    """
    rows = []
    for trajectory in found.trajectories:
        for snapshot in trajectory.snapshots:
            place = {"adaptation": trajectory.label, "method": trajectory.method, "step": snapshot.step}
            for domain, loss in snapshot.losses.items():
                change = found.change(trajectory, snapshot, [domain])
                kind = "target" if domain in found.target else "text"
                rows.append({**place, "kind": kind, "name": domain, "value": loss.perplexity, **_columns(change)})
            if snapshot.scores is None:
                continue
            for score in snapshot.scores.tasks:
                rows.append(
                    {**place, "kind": "benchmark", "name": f"{score.task} {score.metric}", "value": score.value}
                )
            for name in ("target", "retention"):
                value, change = getattr(snapshot.scores, name), getattr(snapshot.scores, f"{name}_change")
                if value is not None:
                    kind = "mean of benchmarks"
                    rows.append({**place, "kind": kind, "name": name, "value": value, **_columns(change)})
    return pd.DataFrame(
        rows, columns=["adaptation", "method", "step", "kind", "name", "value", "change", "low", "high"]
    )


def _columns(figure: Interval | None) -> dict[str, float | None]:
    return {} if figure is None else {"change": figure.value, "low": figure.low, "high": figure.high}


def markdown(found: Retention) -> str:
    """Each adaptation at its best and at its last snapshot."""
    rows, names = [], []
    shown = _each_once(found)
    for trajectory in found.trajectories:
        best, last = found.best(trajectory), trajectory.snapshots[-1]
        for word, snapshot in (("best", best), ("last", last)):
            figures = [side.read(trajectory, snapshot) for side in shown]
            rows.append([word, str(snapshot.step), *map(with_interval, figures)])
            names.append(trajectory.label)
    heads = ["Snapshot", "Updates", *(side.name for side in shown)]
    frame = pd.DataFrame(rows, index=names, columns=heads, dtype=object)
    texts = f"; never learnt: {', '.join(found.texts)}" if found.texts else ""
    lines = [
        f"Learnt: {', '.join(found.target)}{texts}. Changes against the pretrained model, paired; a mean over domains"
    ]
    scores = found.base.scores
    if scores is None:
        lines[0] += "."
    else:
        lines[0] += " or benchmarks."
        tasks = ", ".join(f"{each.task} ({each.metric}) {each.value:.1f} %" for each in scores.tasks)
        lines.append(f"The pretrained model's benchmarks: {tasks}.")
    note = "Best is the snapshot at which the target is best: by its benchmark where there is one, else by perplexity."
    return "\n\n".join([*lines, markdown_table(frame, "Adaptation").rstrip("\n"), note]) + "\n"


def _over_time(axes: Axes, found: Retention, side: Side) -> None:
    """One side over the updates, a line for each adaptation, with its interval."""
    for index, trajectory in enumerate(found.trajectories):
        style = look(index)
        figures = [(snapshot.step, side.read(trajectory, snapshot)) for snapshot in trajectory.snapshots]
        points = [(step, one) for step, one in figures if one is not None]
        steps = [step for step, _ in points]
        axes.fill_between(steps, *ends([one for _, one in points]), color=style.colour, alpha=0.16, linewidth=0)
        values = [one.value for _, one in points]
        _line(axes, steps, values, style)
    axes.axhline(0, color=INK, linewidth=0.9, zorder=0)
    axes.set_xlabel("updates")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.set_title(side.name, loc="left")


def _line(axes: Axes, xs: Sequence[float], ys: Sequence[float], style: Look) -> None:
    axes.plot(xs, ys, color=style.colour, linestyle=style.dashes, marker=style.marker, linewidth=1.5, markersize=3.5)


def _against(axes: Axes, found: Retention, target: Side, kept: Side) -> None:
    """Retention against the target: each adaptation is a path, larger where it ends."""
    for index, trajectory in enumerate(found.trajectories):
        style = look(index)
        pairs = [
            (target.read(trajectory, snapshot), kept.read(trajectory, snapshot)) for snapshot in trajectory.snapshots
        ]
        places = [(one.value, other.value) for one, other in pairs if one is not None and other is not None]
        if not places:
            continue
        xs, ys = zip(*places, strict=True)
        _line(axes, xs, ys, style)
        axes.plot(xs[-1:], ys[-1:], style.marker, color=style.colour, markersize=8, markeredgecolor=INK)
    for line in (axes.axhline, axes.axvline):
        line(0, color=INK, linewidth=0.9, zorder=0)
    axes.set(xlabel=target.name, ylabel=kept.name)
    axes.set_title("one against the other", loc="left")


@drawn
def figure(found: Retention) -> Figure:
    """Target over time, retention over time, and one against the other (DISeL paper, Figures 6 to 9)."""
    rows = sides(found)
    columns = 1 if rows[0][0] is rows[0][1] else 3
    sheet = Figure(figsize=(0.6 + 3.2 * columns, 0.7 + 2.9 * len(rows)), layout="constrained")
    grid = sheet.subplots(len(rows), columns, squeeze=False)
    for (target, kept), panels in zip(rows, grid, strict=True):
        _over_time(panels[0], found, target)
        if columns > 1:
            _over_time(panels[1], found, kept)
            _against(panels[2], found, target, kept)
        for axes in panels:
            ruled(axes, "both")
    legend(sheet, [trajectory.label for trajectory in found.trajectories], 3, marked=True)
    return sheet


COLUMNS = {
    "target": "Target, % of perplexity",
    "texts": "Other texts, %",
    "texts.worst": "Other texts at their worst, %",
    "target_benchmarks": "Target's benchmarks, points",
    "kept": "Other benchmarks, points",
    "kept.worst": "Other benchmarks at their worst, points",
}
"""The numbers of a trajectory, and what a recipe's table calls them."""


def _trajectory_numbers(found: Retention, one: Trajectory) -> dict[str, Interval]:
    """The numbers of one adaptation over time, by their names."""
    last, later = one.snapshots[-1], [snapshot for snapshot in one.snapshots if snapshot.step]
    changes = [found.change(one, snapshot, found.texts) for snapshot in later]
    scores = [snapshot.scores.retention_change for snapshot in later if snapshot.scores]
    texts, kept = ([each for each in figures if each is not None] for figures in (changes, scores))
    numbers = {
        "target": found.change(one, last, found.target),
        "texts": found.change(one, last, found.texts),
        "texts.worst": highest(texts) if texts else None,
        "target_benchmarks": last.scores.target_change if last.scores else None,
        "kept": scores[-1] if scores else None,
        "kept.worst": lowest(kept) if kept else None,
    }
    return {name: value for name, value in numbers.items() if value is not None}


def result(found: Retention, subject: Subject, options: RetentionOptions) -> Result:
    """Put the survey together.

    Numbers: `LABEL.target` and `LABEL.texts`, change of perplexity in % at the last snapshot; `LABEL.texts.worst` at
    the worst one; `A-minus-B.texts` and `A-minus-B.target` at the last; in points against the base
    `LABEL.target_benchmarks` and, of all other benchmarks, `LABEL.kept` at the last, and `LABEL.kept.worst`.
    """
    called = dict(zip(subject.names or [each.label for each in found.trajectories], found.trajectories, strict=True))
    numbers: dict[str, Interval] = {}
    cells = {}
    for label, one in called.items():
        own = _trajectory_numbers(found, one)
        numbers |= {f"{label}.{name}": value for name, value in own.items()}
        cells[label] = [with_interval(own.get(name)) for name in COLUMNS]
    pairs = list(itertools.permutations(called, 2))
    for one_label, other in pairs:
        for name, domains in (("target", found.target), ("texts", found.texts)):
            if domains:
                pair = (called[one_label], called[other])
                numbers[f"{one_label}-minus-{other}.{name}"] = found.apart(*pair, domains)
    asked = [*(("target_benchmarks",) if options.target else ()), *(("kept", "kept.worst") if options.tasks else ())]
    without = {f"{label}.{name}": "its benchmarks are left out, see the notes" for label in called for name in asked}
    of_texts = [f"{label}.{name}" for label in called for name in ("texts", "texts.worst")]
    of_texts += [f"{one}-minus-{other}.texts" for one, other in pairs]
    without |= dict.fromkeys(of_texts, "no text is watched, or none of those is to be had")
    shown = _each_once(found)
    title = "At the last snapshot; intervals over validation blocks, of benchmarks over their rows"
    return Result(
        headline=Headline(
            ["adaptation", "updates", *(side.name for side in shown)],
            [
                [trajectory.label, str(snapshot.step), *(side.read(trajectory, snapshot) for side in shown)]
                for trajectory in found.trajectories
                for snapshot in trajectory.snapshots
            ],
            numeric=1,
        ),
        tables={"retention": table(found)},
        markdown=markdown(found),
        record=found.to_dict(),
        provenance=found.provenance.to_dict(),
        figures={"retention": figure(found)},
        numbers=numbers,
        without={name: why for name, why in without.items() if name not in numbers},
        shown={title: pd.DataFrame.from_dict(cells, orient="index", columns=list(COLUMNS.values()))},
    )
