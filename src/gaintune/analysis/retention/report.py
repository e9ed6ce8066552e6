"""Show adaptations over time as a table and a figure: the target, what is kept, and one against the other."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import astuple
from typing import NamedTuple

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gaintune.analysis.base import Headline, Result, Subject
from gaintune.analysis.drawing import drawn, ends, legend
from gaintune.analysis.retention import RetentionOptions
from gaintune.analysis.retention.survey import Retention, SnapshotScores, Trajectory
from gaintune.report import INK, LineStyle, markdown_table, ruled, style_of, with_interval
from gaintune.results import Interval, highest, lowest


class Side(NamedTuple):
    """A figure to draw over time: its name with unit, and how it is read from a snapshot."""

    name: str
    read: Callable[[Trajectory, SnapshotScores], Interval | None]


def sides(retention: Retention) -> list[tuple[Side, Side]]:
    """Pair target and retention, in perplexity and in benchmarks, as far as measured; a lone target with itself."""
    change = retention.change
    target = Side("target: change of perplexity, %", lambda one, at: change(one, at, retention.target))
    texts = Side("other texts: change of perplexity, %", lambda one, at: change(one, at, retention.texts))
    task = Side("target task: change, points of %", lambda _, at: at.scores and at.scores.target_change)
    kept = Side("benchmarks: change, points of %", lambda _, at: at.scores and at.scores.retention_change)
    rest = texts if retention.texts else target
    scores = retention.base.scores
    if scores is None:
        return [(target, rest)]
    scored = (task if scores.target is not None else target, kept if scores.retention is not None else rest)
    return [(target, rest), scored] if retention.texts else [scored]


def _distinct_sides(retention: Retention) -> list[Side]:
    return list(dict.fromkeys(itertools.chain(*sides(retention))))


def table(retention: Retention) -> pd.DataFrame:
    """Make a row for each adaptation, snapshot and domain or benchmark.

    `value` is a perplexity or a metric in %, `change` against the pretrained model in % of perplexity; benchmarks have
    their mean change, in points of %, in rows of their own.
    """
    rows = []
    for trajectory, snapshot in _snapshots(retention):
        figures: list[tuple[str, str, float | None, Interval | None]] = []
        for domain, loss in snapshot.losses.items():
            change = retention.change(trajectory, snapshot, [domain])
            figures.append(("target" if domain in retention.target else "text", domain, loss.perplexity, change))
        if scores := snapshot.scores:
            figures += [("benchmark", f"{each.task} {each.metric}", each.value, None) for each in scores.tasks]
            figures.append(("mean of benchmarks", "target", scores.target, scores.target_change))
            figures.append(("mean of benchmarks", "retention", scores.retention, scores.retention_change))
        names = (trajectory.label, trajectory.method, snapshot.step)
        for *figure, value, change in figures:
            if value is not None:
                rows.append((*names, *figure, value, *(astuple(change) if change else [None] * 3)))
    columns = ["adaptation", "method", "step", "kind", "name", "value", "change", "low", "high"]
    return pd.DataFrame(rows, columns=columns)


def _snapshots(retention: Retention) -> list[tuple[Trajectory, SnapshotScores]]:
    return [(trajectory, snapshot) for trajectory in retention.trajectories for snapshot in trajectory.snapshots]


def markdown(retention: Retention) -> str:
    """Write each adaptation at its best and at its last snapshot."""
    shown, scores = _distinct_sides(retention), retention.base.scores
    rows = []
    for trajectory in retention.trajectories:
        for word, snapshot in (("best", retention.best(trajectory)), ("last", trajectory.snapshots[-1])):
            cells = [with_interval(side.read(trajectory, snapshot)) for side in shown]
            rows.append([trajectory.label, word, str(snapshot.step), *cells])
    frame = pd.DataFrame(rows, columns=["", "Snapshot", "Updates", *(side.name for side in shown)]).set_index("")
    texts = f"; never trained: {', '.join(retention.texts)}" if retention.texts else ""
    lines = [
        f"Trained: {', '.join(retention.target)}{texts}. Changes against the pretrained model, paired; a mean over "
        f"domains{'' if scores is None else ' or benchmarks'}."
    ]
    if scores is not None:
        tasks = ", ".join(f"{each.task} ({each.metric}) {each.value:.1f} %" for each in scores.tasks)
        lines.append(f"The pretrained model's benchmarks: {tasks}.")
    note = "Best is the snapshot at which the target is best: by its benchmark where there is one, else by perplexity."
    return "\n\n".join([*lines, markdown_table(frame, "Adaptation").rstrip("\n"), note]) + "\n"


def _over_time(axes: Axes, retention: Retention, side: Side) -> None:
    """Draw a side over the updates, a line for each adaptation, with its interval."""
    for index, trajectory in enumerate(retention.trajectories):
        style = style_of(index)
        read = {snapshot.step: side.read(trajectory, snapshot) for snapshot in trajectory.snapshots}
        points = {step: figure for step, figure in read.items() if figure is not None}
        axes.fill_between([*points], *ends([*points.values()]), color=style.color, alpha=0.16, linewidth=0)
        _line(axes, [*points], [figure.value for figure in points.values()], style)
    axes.axhline(0, color=INK, linewidth=0.9, zorder=0)
    axes.set_xlabel("updates")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.set_title(side.name, loc="left")


def _line(axes: Axes, xs: Sequence[float], ys: Sequence[float], style: LineStyle) -> None:
    axes.plot(xs, ys, color=style.color, linestyle=style.dashes, marker=style.marker, linewidth=1.5, markersize=3.5)


def _against(axes: Axes, retention: Retention, target: Side, kept: Side) -> None:
    """Draw retention against the target: each adaptation is a path, larger where it ends."""
    for index, trajectory in enumerate(retention.trajectories):
        style = style_of(index)
        pairs = [[side.read(trajectory, snapshot) for side in (target, kept)] for snapshot in trajectory.snapshots]
        points = [(one.value, other.value) for one, other in pairs if one is not None and other is not None]
        if not points:
            continue
        xs, ys = zip(*points, strict=True)
        _line(axes, xs, ys, style)
        axes.plot(xs[-1:], ys[-1:], style.marker, color=style.color, markersize=8, markeredgecolor=INK)
    for line in (axes.axhline, axes.axvline):
        line(0, color=INK, linewidth=0.9, zorder=0)
    axes.set(xlabel=target.name, ylabel=kept.name)
    axes.set_title("one against the other", loc="left")


@drawn
def figure(retention: Retention) -> Figure:
    """Draw target over time, retention over time, and one against the other (DISeL paper, Figures 6 to 9)."""
    rows = sides(retention)
    columns = 1 if rows[0][0] is rows[0][1] else 3
    sheet = Figure(figsize=(0.6 + 3.2 * columns, 0.7 + 2.9 * len(rows)), layout="constrained")
    grid = sheet.subplots(len(rows), columns, squeeze=False)
    for (target, kept), panels in zip(rows, grid, strict=True):
        _over_time(panels[0], retention, target)
        if columns > 1:
            _over_time(panels[1], retention, kept)
            _against(panels[2], retention, target, kept)
        for axes in panels:
            ruled(axes, "both")
    legend(sheet, [trajectory.label for trajectory in retention.trajectories], 3, marked=True)
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


def _trajectory_numbers(retention: Retention, trajectory: Trajectory) -> dict[str, Interval]:
    """Return the numbers of one adaptation over time, by their names."""
    last, later = trajectory.snapshots[-1], [each for each in trajectory.snapshots if each.step]
    changes = [retention.change(trajectory, each, retention.texts) for each in later]
    scores = [each.scores.retention_change for each in later if each.scores]
    texts, kept = ([each for each in figures if each is not None] for figures in (changes, scores))
    numbers = {
        "target": retention.change(trajectory, last, retention.target),
        "texts": retention.change(trajectory, last, retention.texts),
        "texts.worst": highest(texts) if texts else None,
        "target_benchmarks": last.scores and last.scores.target_change,
        "kept": scores[-1] if scores else None,
        "kept.worst": lowest(kept) if kept else None,
    }
    return {name: value for name, value in numbers.items() if value is not None}


def result(retention: Retention, subject: Subject, options: RetentionOptions) -> Result:
    """Put the survey together.

    Numbers: `LABEL.target` and `LABEL.texts`, change of perplexity in % at the last snapshot; `LABEL.texts.worst` at
    the worst one; `A-minus-B.texts` and `A-minus-B.target` at the last; in points against the base
    `LABEL.target_benchmarks` and, of all other benchmarks, `LABEL.kept` at the last, and `LABEL.kept.worst`.
    """
    labels = subject.names or [trajectory.label for trajectory in retention.trajectories]
    trajectories = dict(zip(labels, retention.trajectories, strict=True))
    numbers: dict[str, Interval] = {}
    cells = {}
    for label, trajectory in trajectories.items():
        own = _trajectory_numbers(retention, trajectory)
        numbers |= {f"{label}.{name}": value for name, value in own.items()}
        cells[label] = [with_interval(own.get(name)) for name in COLUMNS]
    pairs = {f"{one}-minus-{other}": (one, other) for one, other in itertools.permutations(trajectories, 2)}
    for pair, (one, other) in pairs.items():
        for name, domains in (("target", retention.target), ("texts", retention.texts)):
            if domains:
                numbers[f"{pair}.{name}"] = retention.apart(trajectories[one], trajectories[other], domains)
    names = [*(("target_benchmarks",) if options.target else ()), *(("kept", "kept.worst") if options.tasks else ())]
    without = {f"{label}.{name}": "its benchmarks are left out, see the notes" for label in labels for name in names}
    of_texts = [f"{label}.{name}" for label in labels for name in ("texts", "texts.worst")]
    of_texts += [f"{pair}.texts" for pair in pairs]
    without |= dict.fromkeys(of_texts, "no text is watched, or none of those is to be had")
    shown = _distinct_sides(retention)
    rows = [
        [trajectory.label, str(snapshot.step), *(side.read(trajectory, snapshot) for side in shown)]
        for trajectory, snapshot in _snapshots(retention)
    ]
    title = "At the last snapshot; intervals over validation blocks, of benchmarks over their rows"
    return Result(
        headline=Headline(["adaptation", "updates", *(side.name for side in shown)], rows, numeric=1),
        tables={"retention": table(retention)},
        markdown=markdown(retention),
        record=retention.to_dict(),
        provenance=retention.provenance.to_dict(),
        figures={"retention": figure(retention)},
        numbers=numbers,
        without={name: why for name, why in without.items() if name not in numbers},
        shown={title: pd.DataFrame.from_dict(cells, orient="index", columns=list(COLUMNS.values()))},
    )
