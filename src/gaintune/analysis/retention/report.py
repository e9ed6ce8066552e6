"""Adaptations over time as a table and a figure: the target, what is kept, and one against the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from gaintune.analysis.retention.survey import Course, Moment, Retention
from gaintune.report import INK, NONE, RULE, Look, figure_files, look, markdown_table, styled, with_interval
from gaintune.results import Interval
from gaintune.storage import write_bytes, write_json, write_text

Read = Callable[[Course, Moment], Interval | None]


@dataclass(frozen=True)
class Side:
    """One thing to draw over time: its name with unit, and how it is read from a moment."""

    name: str
    read: Read


def sides(found: Retention) -> list[tuple[Side, Side]]:
    """Target and retention, in perplexity and in benchmarks, as far as measured; the target twice where it is alone."""
    target = Side("target: change of perplexity, %", lambda course, moment: found.change(course, moment, found.target))
    texts = Side(
        "other texts: change of perplexity, %", lambda course, moment: found.change(course, moment, found.texts)
    )
    task = Side("target task: change, points of %", lambda _, moment: moment.scores and moment.scores.target_change)
    kept = Side("benchmarks: change, points of %", lambda _, moment: moment.scores and moment.scores.retention_change)
    rest = texts if found.texts else target
    scores = found.base.scores
    if scores is None:
        return [(target, rest)]
    asked = (task if scores.target is not None else target, kept if scores.retention is not None else rest)
    return [(target, rest), asked] if found.texts else [asked]


def table(found: Retention) -> pd.DataFrame:
    """One row for each adaptation, snapshot and domain or benchmark.

    `value` is a perplexity or a metric in %, `change` against the pretrained model in % of perplexity; benchmarks have
    their mean change, in points of %, in rows of their own.
    """
    rows = []
    for course in found.courses:
        for moment in course.moments:
            place = {"adaptation": course.label, "method": course.method, "step": moment.step}
            for domain, loss in moment.losses.items():
                change = found.change(course, moment, [domain])
                kind = "target" if domain in found.target else "text"
                rows.append({**place, "kind": kind, "name": domain, "value": loss.perplexity, **_columns(change)})
            if moment.scores is None:
                continue
            for score in moment.scores.tasks:
                rows.append(
                    {**place, "kind": "benchmark", "name": f"{score.task} {score.metric}", "value": score.value}
                )
            for name in ("target", "retention"):
                value, change = getattr(moment.scores, name), getattr(moment.scores, f"{name}_change")
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
    shown = list(dict.fromkeys(side for pair in sides(found) for side in pair))
    for course in found.courses:
        best, last = found.best(course), course.moments[-1]
        for word, moment in (("best", best), ("last", last)):
            figures = [side.read(course, moment) for side in shown]
            rows.append([word, str(moment.step), *(NONE if one is None else with_interval(one) for one in figures)])
            names.append(course.label)
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
    for index, course in enumerate(found.courses):
        style = look(index)
        figures = [(moment.step, side.read(course, moment)) for moment in course.moments]
        points = [(step, one) for step, one in figures if one is not None]
        steps = [step for step, _ in points]
        lows = [one.value if one.low is None else one.low for _, one in points]
        highs = [one.value if one.high is None else one.high for _, one in points]
        axes.fill_between(steps, lows, highs, color=style.colour, alpha=0.16, linewidth=0)
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
    for index, course in enumerate(found.courses):
        style = look(index)
        pairs = [(target.read(course, moment), kept.read(course, moment)) for moment in course.moments]
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


def figure(found: Retention) -> Figure:
    """Target over time, retention over time, and one against the other (DISeL paper, Figures 6 to 9)."""

    def draw() -> Figure:
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
                axes.grid(color=RULE, linewidth=0.6)
                axes.set_axisbelow(True)
                axes.tick_params(length=0)
        handles = [
            Line2D([], [], color=look(i).colour, linestyle=look(i).dashes, marker=look(i).marker, label=course.label)
            for i, course in enumerate(found.courses)
        ]
        sheet.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False, handlelength=3)
        return sheet

    return styled(draw)


def write(found: Retention, folder: Path) -> None:
    """Write retention.csv, .md and .json, and the figure as PNG and SVG into a folder."""
    write_text(folder / "retention.csv", table(found).to_csv(index=False, lineterminator="\n"))
    write_text(folder / "retention.md", markdown(found))
    write_json(folder / "retention.json", found.to_dict())
    for name, content in figure_files("retention", figure(found)).items():
        write_bytes(folder / name, content)
