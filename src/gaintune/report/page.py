"""The report of a run: its tables and figures as files, and the page that shows them.

Figures are drawn through matplotlib's objects alone, so that nothing global changes; the same matrix gives the same
bytes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize, to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from gaintune.config import Plan, build_plan, plan_yaml, read_values
from gaintune.errors import RunDirectoryError
from gaintune.progress import plural
from gaintune.report import canvas, palette, tables, words
from gaintune.report.canvas import INK, MUTED, PAGE, SHADE, STYLE
from gaintune.report.palette import diverging, ink_on, limit_of, style_of
from gaintune.report.words import FIGURES, NONE, signed
from gaintune.results import Cell, Interval, Matrix, MethodMatrix, Place, exact, recomputed
from gaintune.storage import read_stored, write_bytes, write_json, write_text

TONES = {-1: "better", 0: "open", 1: "worse"}
"""Classes of the page by an interval's sign; lower perplexity is better."""
LARGE = {"in-domain": "in_domain", "earlier domains": "backward_transfer"}
"""Figures in large type, by heading."""
HIGHEST = 150.0  # % at which a curve or dot meets the edge, so that one collapse does not flatten the rest


def write_report(run: str | Path) -> Path:
    """Write report.html, figures/, matrix.csv and matrix.md into a run directory, from what it holds.

    Figures and intervals are computed again from the losses of every block, and matrix.json is written too where they
    differ from its own, as those of a run of an earlier version may. Returns the path of the page.

    Raises:
        RunDirectoryError: not a run directory, or one with no matrix.json yet, or a damaged one.
        ConfigError: no plan.yaml, or one that is not a plan.
    """
    run = Path(run)
    source = run / "matrix.json"
    if not run.is_dir():
        raise RunDirectoryError(f"no such run directory: {run.absolute()}")
    if not source.is_file() and not (run / "plan.yaml").is_file():
        raise RunDirectoryError(
            f"{run} is not a run directory, it has neither plan.yaml nor matrix.json; name the folder that "
            "`gaintune sequence` or `gaintune demo` was given with --run"
        )
    if not source.is_file():
        raise RunDirectoryError(f"{source}: nothing measured yet; run `gaintune sequence` on this run directory first")
    stored = read_stored(source, Matrix.from_dict)
    plan = build_plan(read_values(run / "plan.yaml"), str(run / "plan.yaml"))
    matrix = recomputed(run, stored, plan.evaluate)
    if matrix != stored:
        write_json(source, matrix.to_dict())
    record = run / "environment.json"
    environment = read_stored(record, dict) if record.is_file() else {}
    page = render(matrix, plan, environment, run.resolve().name)
    write_text(run / "matrix.csv", tables.tidy(matrix).to_csv(index=False, lineterminator="\n"))
    write_text(run / "matrix.md", tables.to_markdown(matrix))
    for name, draw in (("matrix", heatmaps), ("curves", curves), ("summary", summary)):
        for file, content in canvas.figure_files(name, draw(matrix)).items():
            write_bytes(run / "figures" / file, content)
    write_text(run / "report.html", page)
    return run / "report.html"


def render(matrix: Matrix, plan: Plan, environment: dict[str, Any], name: str) -> str:
    """Render the page as HTML text, which needs no other file and no network."""
    folder = FileSystemLoader(Path(__file__).parent)
    templates = Environment(
        loader=folder, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    light, dark = map(Markup, palette.css())
    limit, everywhere = limit_of(matrix), [method.label for method in matrix.methods]
    return templates.get_template("page.html.j2").render(
        name=name,
        matrix=matrix,
        title=words.title(matrix),
        light=light,
        dark=dark,
        facts=_facts(matrix, plan),
        methods=_methods(matrix),
        comparisons=[words.compare(one, matrix.partial) for one in matrix.comparisons],
        unfinished=_unfinished(matrix, plan),
        limit=f"{limit:g}",
        beyond=" or more" if palette.largest_change(matrix) > limit else "",
        summary=_table(tables.summary_frame(matrix), "Change of perplexity against the base in %, with intervals"),
        differences=_table(tables.comparison_frame(matrix), "Paired differences in points of %, with intervals"),
        summary_panels=[
            (FIGURES[name][0], _svg(summary_panel(matrix, name), f"summary-{name}")) for name in summary_names(matrix)
        ],
        curves=[(domain, _svg(curve(matrix, domain), f"curve-{index}")) for index, domain in enumerate(matrix.domains)],
        bases=[
            _table(frame, "The untouched base" if labels == everywhere else f"Base of {words.listed(labels)}")
            for labels, frame in tables.base_frames(matrix)
        ],
        definitions=list(FIGURES.values()),
        cautions=words.cautions(matrix),
        plan_text=plan_yaml(plan),
        environment=_flat(environment),
        version=_flat(environment).get("packages.gaintune"),
    )


def _table(frame: pd.DataFrame, caption: str) -> Markup:
    """Return Styler's HTML, in which every value and name is already escaped; nothing for a table without rows."""
    return Markup(tables.to_html(frame, caption)) if len(frame) else Markup()


def _svg(figure: Figure, name: str) -> Markup:
    return Markup(canvas.inline_svg(figure, name))  # matplotlib has escaped every text in it


def _methods(matrix: Matrix) -> list[dict[str, Any]]:
    """Describe each method: its sentence, its two large numbers, its matrix and tables, and how it was adapted."""
    frames = [(method, tables.cell_frame(matrix, method)) for method in matrix.methods]
    return [
        {
            "label": method.label,
            "series": index % len(palette.STYLES),
            "verdict": words.verdict(method),
            "numbers": [
                (heading, signed(figure.value, "%"), words.bracket(figure), TONES[figure.sign])
                for heading, name in LARGE.items()
                if (figure := getattr(method.summary, name)) is not None
            ],
            "stages": len(method.stages),
            "heatmap": Markup(tables.heatmap_html(matrix, method)) if method.stages else Markup(),
            "per_stage": _table(tables.stage_frame(method), f"{method.label}, right after each stage, in %"),
            "cells": _table(cells.map(words.with_interval), f"{method.label}: every cell with its interval, in %"),
            "info": {key.replace("_", " "): tables.setting(value) for key, value in _flat(method.info).items()},
        }
        for index, (method, cells) in enumerate(frames)
    ]


def _facts(matrix: Matrix, plan: Plan) -> list[tuple[str, str]]:
    """Describe the run at a glance."""
    train, data = plan.train, plan.data
    streamed = f", in one stream that blends over {data.stream_blend:g} of a domain" if data.stream else ""
    watched = [("Measured, never trained", ", ".join(domain.name for domain in data.watched))] if data.watched else []
    return [
        ("Base model", plan.model.name),
        ("Domains, in order", " → ".join(domain.name for domain in data.domains)),
        *watched,
        ("Training text", f"{data.train_tokens:,} tokens a domain, {plural(train.epochs, 'epoch')}{streamed}"),
        ("Validation text", f"{tables.budget(matrix)}, {data.block_size} tokens each"),
        ("Seeds", f"data {data.seed}, training {train.seed}, resampling {plan.evaluate.seed}"),
    ]


def _unfinished(matrix: Matrix, plan: Plan) -> list[str]:
    """Name what the plan asks for and the matrix does not hold yet."""
    total, finished = len(plan.data.domains), {method.label: len(method.per_stage) for method in matrix.methods}
    stages = {method.label: finished.get(method.label, 0) for method in plan.methods}
    return [f"{label}: {count} of {total} stages" for label, count in stages.items() if count < total]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values under dotted names, lists as text."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
    return flat


def _cell(axes: Axes, column: int, row: int, cell: Cell, place: Place, color: str) -> None:
    """Draw a cell with its number: outlined where the domain was just trained, hatched where it is still to come."""
    ink = ink_on(color)
    axes.add_patch(Rectangle((column, row), 1, 1, facecolor=color, edgecolor="white", linewidth=1.5, zorder=1))
    if place == "later":
        hatch = Rectangle((column + 0.02, row + 0.02), 0.96, 0.96, fill=False, hatch="////", linewidth=0, zorder=2)
        hatch.set_edgecolor((1.0, 1.0, 1.0, 0.55) if ink == "#ffffff" else (0.3, 0.33, 0.37, 0.3))
        axes.add_patch(hatch)
    if place == "learning":
        frame = Rectangle((column + 0.04, row + 0.04), 0.92, 0.92, fill=False, edgecolor=INK, linewidth=1.8, zorder=4)
        axes.add_patch(frame)
    text = axes.text(column + 0.5, row + 0.5, signed(cell.change), ha="center", va="center", color=ink, zorder=5)
    text.set_fontweight("bold" if place == "learning" else "normal")
    text.set_fontstyle("italic" if place == "later" else "normal")


def _heatmap(axes: Axes, matrix: Matrix, method: MethodMatrix, colors: Colormap, scale: Normalize) -> None:
    stages = max(len(matrix.planned), len(method.stages), 1)
    names = [*(row.domain for row in method.stages), *matrix.planned[len(method.stages) :]]
    for index, (column, domain) in itertools.product(range(stages), enumerate(matrix.domains)):
        cell = method.stages[index].cells.get(domain) if index < len(method.stages) else None
        if cell is None:
            axes.add_patch(Rectangle((column, index), 1, 1, facecolor=SHADE, edgecolor="white", linewidth=1.5))
        else:
            _cell(axes, column, index, cell, method.place(index, domain), to_hex(colors(scale(cell.change))))
    axes.set_xlim(0, len(matrix.domains))
    axes.set_ylim(stages, 0)
    axes.set_aspect(0.68)  # cells keep their shape, however few there are
    axes.xaxis.tick_top()
    slant = {"rotation": 35, "ha": "left", "rotation_mode": "anchor"} if max(map(len, matrix.domains)) > 9 else {}
    axes.set_xticks([column + 0.5 for column in range(len(matrix.domains))], list(matrix.domains), color=INK, **slant)
    rows = [f"{index + 1} {name}" for index, name in enumerate(names)]
    axes.set_yticks([row + 0.5 for row in range(stages)], rows, color=INK)
    canvas.without_frame(axes)
    axes.set_title(method.label, loc="left", pad=8)


def _tick(value: float, _: int | None = None) -> str:
    return signed(value).removesuffix(".0")


@matplotlib.rc_context(STYLE)
def heatmaps(matrix: Matrix) -> Figure:
    """Draw the matrices of all methods, side by side as far as they fit, on one color scale."""
    domains, stages, methods = len(matrix.domains), max(len(matrix.planned), 1), len(matrix.methods)
    columns = max(1, min(methods, 16 // domains))
    width = max(columns * (0.62 * domains + 0.085 * max(map(len, matrix.domains)) + 0.3), 6.4)
    sheet, grid = canvas.panels(methods, columns, lambda rows, _: (width, rows * (0.42 * stages + 0.9) + 1.2))
    limit = limit_of(matrix)
    for axes, method in zip(grid, matrix.methods, strict=True):
        _heatmap(axes, matrix, method, diverging(), Normalize(-limit, limit, clip=True))
    canvas.color_bar(
        sheet, ScalarMappable(Normalize(-limit, limit), diverging()), sheet.axes,
        "perplexity after the stage (row) against the base, %  —  blue is better, red is worse",
        orientation="horizontal", fraction=0.05, aspect=40, shrink=min(1.0, 6.0 / width), pad=0.03, format=_tick,
        extend="both" if palette.largest_change(matrix) > limit else "neither",
    )  # fmt: skip
    handles = [
        Patch(facecolor="white", edgecolor=INK, linewidth=1.8, label="trained at this stage"),
        Patch(facecolor="white", edgecolor="#9aa0a8", linewidth=0, hatch="////", label="not yet trained"),
    ]
    sheet.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    return sheet


def _series(method: MethodMatrix, domain: str) -> dict[int, Interval]:
    """Return the change of a domain in % at every stage at which it was measured; 0 is the base."""
    start = {0: exact(0.0)} if domain in method.base else {}
    rows = enumerate(method.stages, start=1)
    return start | {stage: row.cells[domain].interval for stage, row in rows if domain in row.cells}


def _limits(figures: Iterable[Interval | None], margin: float) -> tuple[float, float]:
    """Return the limits of an axis in % for figures with their intervals, always holding zero."""
    ends = [0.0, -2.0, 2.0]
    for figure in filter(None, figures):
        ends += [min(end, HIGHEST) for end in (figure.value, figure.low, figure.high) if end is not None]
    margin *= max(ends) - min(ends)
    return min(ends) - margin, max(ends) + margin


def _curve_panel(axes: Axes, matrix: Matrix, domain: str) -> None:
    """Draw one domain's change over the stages: a line for each method, its interval, a large marker where trained."""
    last = max(len(matrix.planned), *(len(method.stages) for method in matrix.methods), 1)
    own = matrix.planned.index(domain) + 1 if domain in matrix.planned else None
    everything = (_series(*pair) for pair in itertools.product(matrix.methods, matrix.domains))
    low, high = _limits(itertools.chain(*(series.values() for series in everything)), 0.06)
    axes.axvspan(0, own or last + 0.3, color=SHADE, linewidth=0, zorder=0)
    axes.axhline(0, color=INK, linewidth=0.9, zorder=1)
    for index, method in enumerate(matrix.methods):
        style, series = style_of(index), _series(method, domain)
        values = {stage: figure.value for stage, figure in series.items()}
        lows = [figure.value if figure.low is None else figure.low for figure in series.values()]
        highs = [figure.value if figure.high is None else figure.high for figure in series.values()]
        axes.fill_between([*values], lows, highs, color=style.color, alpha=0.18, linewidth=0, zorder=2)
        axes.plot([*values], [*values.values()], color=style.color, linestyle=style.dashes, linewidth=1.7, zorder=3)
        for stage, value in values.items():
            trained = stage > 0 and method.stages[stage - 1].domain == domain
            size, edge, width, order = (7.5, INK, 1.1, 5) if trained else (3.5, style.color, 0, 4)
            dot = Line2D([stage], [min(value, high)], marker=style.marker, markersize=size, color=style.color)
            dot.set(markeredgecolor=edge, markeredgewidth=width, zorder=order, clip_on=False)
            axes.add_line(dot)
        value, stage = max(((value, stage) for stage, value in values.items()), default=(0.0, 0))
        if value > HIGHEST:
            offset: Any = {"xytext": (-4, -3 - 11 * index), "textcoords": "offset points"}
            note = axes.annotate(f"{signed(value)} ▲", (stage, high), **offset)
            note.set(ha="right", va="top", fontsize=8, color=style.color)
    axes.set_xlim(0, last + 0.3)
    axes.set_ylim(low, high)
    axes.set_xticks(range(last + 1), ["base", *(str(step) for step in range(1, last + 1))])
    canvas.ruled(axes)
    axes.set_title(f"{own} {domain}" if own else f"{domain} (never trained)", loc="left")


@matplotlib.rc_context(STYLE)
def curves(matrix: Matrix) -> Figure:
    """Draw all domains' curves on one sheet."""
    count = len(matrix.domains)
    columns = min(count, 4) if count not in (5, 6, 9) else 3
    width = max(3.1 * columns, 5.2)
    sheet, grid = canvas.panels(count, columns, lambda rows, _: (width, 2.3 * rows + 0.75), sharey=True, sharex=True)
    for index, (axes, domain) in enumerate(zip(grid, matrix.domains, strict=True)):
        _curve_panel(axes, matrix, domain)
        axes.tick_params(labelleft=index % columns == 0, labelbottom=index + columns >= count)
    styles = {method.label: style_of(index) for index, method in enumerate(matrix.methods)}
    handles: list[Any] = [
        Line2D([], [], color=one.color, linestyle=one.dashes, marker=one.marker, markersize=5, label=label)
        for label, one in styles.items()
    ]
    ring: Any = {"marker": "o", "markersize": 7.5, "linestyle": "", "markeredgecolor": INK}
    handles += [Line2D([], [], color=MUTED, label="its own stage", **ring), Patch(color=SHADE, label="not yet trained")]
    sheet.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False, handlelength=3)
    sheet.supxlabel("after stage", fontsize=9, color=MUTED)
    sheet.supylabel("perplexity against the base, %", fontsize=9, color=MUTED)
    return sheet


@matplotlib.rc_context(STYLE)
def curve(matrix: Matrix, domain: str) -> Figure:
    """Draw the curve of one domain, as a small panel of the page."""
    sheet = Figure(figsize=(3.3, 2.2))
    sheet.subplots_adjust(left=0.135, right=0.985, bottom=0.11, top=0.88)
    _curve_panel(sheet.subplots(), matrix, domain)
    return sheet


def _summary_panel(axes: Axes, matrix: Matrix, name: str) -> None:
    """Draw one summary figure: a dot and its interval for each method."""
    left, right = _limits((getattr(method.summary, key) for method in matrix.methods for key in FIGURES), 0.05)
    axes.axvline(0, color=INK, linewidth=0.9, zorder=1)
    plate = {"facecolor": PAGE, "edgecolor": "none", "pad": 1.2}  # keeps lines out of the letters
    for row, method in enumerate(matrix.methods):
        style, figure = style_of(row), getattr(method.summary, name)
        text = NONE if figure is None else signed(figure.value, "%")
        axes.text(left, row - 0.3, method.label, va="center", fontsize=8.5, color=MUTED, bbox=plate)
        axes.text(right, row - 0.3, text, va="center", ha="right", color=INK, bbox=plate)
        if figure is None:
            continue
        height = row + 0.12
        if figure.low is not None and figure.high is not None:
            ends = [min(figure.low, HIGHEST), min(figure.high, HIGHEST)]
            axes.plot(ends, [height] * 2, color=style.color, linewidth=2.4, solid_capstyle="butt", zorder=2)
        value = min(figure.value, HIGHEST)
        axes.plot([value], [height], style.marker, color=style.color, markersize=5.5, zorder=3)
    axes.set_xlim(left, right)
    axes.set_ylim(len(matrix.methods) - 0.45, -0.65)
    axes.set_yticks([])
    canvas.ruled(axes, "x")
    axes.spines["left"].set_visible(False)
    axes.set_title(FIGURES[name][0], loc="left")


def summary_names(matrix: Matrix) -> list[str]:
    """List the summary figures that some method has."""
    return [name for name in FIGURES if any(getattr(method.summary, name) for method in matrix.methods)]


@matplotlib.rc_context(STYLE)
def summary_panel(matrix: Matrix, name: str) -> Figure:
    """Draw one summary figure for all methods, as a small panel of the page."""
    height = 0.6 + 0.45 * len(matrix.methods)
    sheet = Figure(figsize=(3.3, height))
    sheet.subplots_adjust(left=0.035, right=0.975, bottom=0.28 / height, top=1 - 0.28 / height)
    _summary_panel(sheet.subplots(), matrix, name)
    return sheet


@matplotlib.rc_context(STYLE)
def summary(matrix: Matrix) -> Figure:
    """Draw the summary figures beside each other, on one scale."""
    names = summary_names(matrix) or ["in_domain"]
    columns = min(len(names), 3)
    width, height = max(3.5 * columns, 4.5), 0.65 + 0.45 * len(matrix.methods)
    sheet, grid = canvas.panels(len(names), columns, lambda rows, _: (width, rows * height + 0.3))
    for axes, name in zip(grid, names, strict=True):
        _summary_panel(axes, matrix, name)
    sheet.supxlabel("perplexity against the base, % (lower is better)", fontsize=9, color=MUTED)
    return sheet
