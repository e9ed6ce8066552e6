"""The figures of a report: matrices side by side, a curve for each domain, and the summary with its intervals.

Drawn through matplotlib's objects alone, so that nothing global changes; the same matrix gives the same bytes.
"""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize, to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from gaintune.report.canvas import INK, MUTED, PAGE, RULE, SHADE, figure_files, styled
from gaintune.report.palette import diverging, ink_on, largest_change, limit_of, look
from gaintune.report.words import FIGURES, signed
from gaintune.results.matrix import Cell, Matrix, MethodMatrix
from gaintune.results.records import Place


def _cell(axes: Axes, column: int, row: int, cell: Cell, place: Place, colour: str) -> None:
    """One coloured cell with its number: outlined where just learnt, hatched where not yet learnt."""
    ink = ink_on(colour)
    axes.add_patch(Rectangle((column, row), 1, 1, facecolor=colour, edgecolor="white", linewidth=1.5, zorder=1))
    if place == "later":
        hatch = Rectangle((column + 0.02, row + 0.02), 0.96, 0.96, fill=False, hatch="////", linewidth=0, zorder=2)
        hatch.set_edgecolor((1.0, 1.0, 1.0, 0.55) if ink == "#ffffff" else (0.3, 0.33, 0.37, 0.3))
        axes.add_patch(hatch)
    if place == "learning":
        outline = Rectangle((column + 0.04, row + 0.04), 0.92, 0.92, fill=False, edgecolor=INK, linewidth=1.8, zorder=4)
        axes.add_patch(outline)
    text = axes.text(column + 0.5, row + 0.5, signed(cell.change), ha="center", va="center", color=ink, zorder=5)
    text.set(
        fontweight="bold" if place == "learning" else "normal", fontstyle="italic" if place == "later" else "normal"
    )


def _heatmap(axes: Axes, matrix: Matrix, method: MethodMatrix, colours: Colormap, scale: Normalize) -> None:
    stages = max(len(matrix.planned), len(method.stages), 1)
    names = [row.domain for row in method.stages] + list(matrix.planned[len(method.stages) :])
    for index in range(stages):
        for column, domain in enumerate(matrix.domains):
            cell = method.stages[index].cells.get(domain) if index < len(method.stages) else None
            if cell is None:
                empty = Rectangle((column, index), 1, 1, facecolor=SHADE, edgecolor="white", linewidth=1.5)
                axes.add_patch(empty)
            else:
                _cell(axes, column, index, cell, method.place(index, domain), to_hex(colours(scale(cell.change))))
    axes.set_xlim(0, len(matrix.domains))
    axes.set_ylim(stages, 0)
    axes.set_aspect(0.68)  # cells keep their shape, however few there are
    slanted = max(map(len, matrix.domains)) > 9
    axes.xaxis.tick_top()
    positions = [column + 0.5 for column in range(len(matrix.domains))]
    turn = {"rotation": 35, "ha": "left", "rotation_mode": "anchor"} if slanted else {}
    axes.set_xticks(positions, list(matrix.domains), color=INK, **turn)
    axes.set_yticks(
        [row + 0.5 for row in range(stages)], [f"{i + 1} {name}" for i, name in enumerate(names)], color=INK
    )
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_title(method.label, loc="left", pad=8)


def _tick(value: float, _: int | None = None) -> str:
    return signed(value).removesuffix(".0")


def heatmaps(matrix: Matrix) -> Figure:
    """The matrices of all methods, side by side as far as they fit, on one colour scale."""

    def draw() -> Figure:
        domains, stages, methods = len(matrix.domains), max(len(matrix.planned), 1), len(matrix.methods)
        columns = max(1, min(methods, 16 // domains))
        rows, limit = -(-methods // columns), limit_of(matrix)
        labels = 0.085 * max(map(len, matrix.domains)) + 0.3
        width = max(columns * (0.62 * domains + labels), 6.4)
        figure = Figure(figsize=(width, rows * (0.42 * stages + 0.9) + 1.2), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False)
        for place, axes in enumerate(grid.flat):
            if place < methods:
                _heatmap(axes, matrix, matrix.methods[place], diverging(), Normalize(-limit, limit, clip=True))
            else:
                axes.set_axis_off()
        bar = figure.colorbar(
            ScalarMappable(Normalize(-limit, limit), diverging()), ax=list(grid.flat), orientation="horizontal",
            fraction=0.05, aspect=40, shrink=min(1.0, 6.0 / width), pad=0.03,
            extend="both" if largest_change(matrix) > limit else "neither", format=_tick,
        )  # fmt: skip
        bar.outline.set_visible(False)  # type: ignore[operator]
        bar.ax.tick_params(length=0)
        bar.set_label(
            "perplexity after the stage (row) against the base, %  —  blue is better, red is worse", color=MUTED
        )
        handles = [
            Patch(facecolor="white", edgecolor=INK, linewidth=1.8, label="learnt at this stage"),
            Patch(facecolor="white", edgecolor="#9aa0a8", linewidth=0, hatch="////", label="not yet learnt"),
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
        return figure

    return styled(draw)


HIGHEST = 150.0  # % at which a curve or dot meets the edge, so that one collapse does not flatten the rest


def _series(
    matrix: Matrix, method: MethodMatrix, domain: str
) -> tuple[list[int], list[float], list[float], list[float]]:
    """Stages at which a domain was measured (0 is the base), its change, and its interval, in %."""
    points = [(0, 0.0, 0.0, 0.0)] if domain in method.base else []
    for index, row in enumerate(method.stages):
        if domain in row.cells:
            cell = row.cells[domain]
            low = cell.change if cell.low is None else cell.low
            points.append((index + 1, cell.change, low, cell.change if cell.high is None else cell.high))
    stages, values, lows, highs = (list(column) for column in zip(*points, strict=True)) if points else ([], [], [], [])
    return stages, values, lows, highs


def _limits(matrix: Matrix) -> tuple[float, float]:
    """Shared vertical range of the curves in %, always holding zero."""
    ends = [0.0, -2.0, 2.0]
    for method in matrix.methods:
        for domain in matrix.domains:
            _, _, lows, highs = _series(matrix, method, domain)
            ends += [min(value, HIGHEST) for value in (*lows, *highs)]
    margin = 0.06 * (max(ends) - min(ends))
    return min(ends) - margin, max(ends) + margin


def _curve_panel(axes: Axes, matrix: Matrix, domain: str) -> None:
    """Change of one domain over the stages: a line for each method, its interval, a large marker where learnt."""
    last = max(len(matrix.planned), *(len(method.stages) for method in matrix.methods), 1)
    learnt = matrix.planned.index(domain) + 1 if domain in matrix.planned else None
    low, high = _limits(matrix)
    axes.axvspan(0, learnt if learnt else last + 0.3, color=SHADE, linewidth=0, zorder=0)
    axes.axhline(0, color=INK, linewidth=0.9, zorder=1)
    for index, method in enumerate(matrix.methods):
        style = look(index)
        stages, values, lows, highs = _series(matrix, method, domain)
        axes.fill_between(stages, lows, highs, color=style.colour, alpha=0.18, linewidth=0, zorder=2)
        axes.plot(stages, values, color=style.colour, linestyle=style.dashes, linewidth=1.7, zorder=3)
        for stage, value in zip(stages, values, strict=True):
            own = stage > 0 and method.stages[stage - 1].domain == domain
            size, edge = (7.5, INK) if own else (3.5, style.colour)
            dot = Line2D([stage], [min(value, high)], marker=style.marker, markersize=size, color=style.colour)
            dot.set(markeredgecolor=edge, markeredgewidth=1.1 if own else 0, zorder=5 if own else 4, clip_on=False)
            axes.add_line(dot)
        beyond = [(value, stage) for stage, value in zip(stages, values, strict=True) if value > HIGHEST]
        if beyond:
            value, stage = max(beyond)
            note = axes.annotate(
                f"{signed(value)} ▲", (stage, high), xytext=(-4, -3 - 11 * index), textcoords="offset points"
            )
            note.set(ha="right", va="top", fontsize=8, color=style.colour)
    axes.set_xlim(0, last + 0.3)
    axes.set_ylim(low, high)
    axes.set_xticks(range(last + 1), ["base", *(str(step) for step in range(1, last + 1))])
    axes.grid(axis="y", color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.set_title(f"{learnt} {domain}" if learnt else f"{domain} (never learnt)", loc="left")


def _legend_lines(matrix: Matrix) -> list[Line2D]:
    return [
        Line2D(
            [], [], color=look(i).colour, linestyle=look(i).dashes, marker=look(i).marker, markersize=5, label=m.label
        )
        for i, m in enumerate(matrix.methods)
    ]


def curves(matrix: Matrix) -> Figure:
    """All domains' curves on one sheet."""

    def draw() -> Figure:
        count = len(matrix.domains)
        columns = min(count, 4) if count not in (5, 6, 9) else 3
        rows = -(-count // columns)
        figure = Figure(figsize=(max(3.1 * columns, 5.2), 2.3 * rows + 0.75), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False, sharey=True, sharex=True)
        for place, axes in enumerate(grid.flat):
            if place < count:
                _curve_panel(axes, matrix, matrix.domains[place])
                axes.tick_params(labelleft=place % columns == 0, labelbottom=place + columns >= count)
            else:
                axes.set_axis_off()
        handles = [
            *_legend_lines(matrix),
            Line2D(
                [],
                [],
                color=MUTED,
                marker="o",
                markersize=7.5,
                linestyle="",
                markeredgecolor=INK,
                label="its own stage",
            ),
            Patch(color=SHADE, label="not yet learnt"),
        ]
        figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False, handlelength=3)
        figure.supxlabel("after stage", fontsize=9, color=MUTED)
        figure.supylabel("perplexity against the base, %", fontsize=9, color=MUTED)
        return figure

    return styled(draw)


def curve(matrix: Matrix, domain: str) -> Figure:
    """The curve of one domain, as a small panel of the page."""

    def draw() -> Figure:
        figure = Figure(figsize=(3.3, 2.2))
        figure.subplots_adjust(left=0.135, right=0.985, bottom=0.11, top=0.88)
        _curve_panel(figure.subplots(), matrix, domain)
        return figure

    return styled(draw)


def _summary_panel(axes: Axes, matrix: Matrix, name: str, limits: tuple[float, float]) -> None:
    """One summary figure: a dot and its interval for each method."""
    axes.axvline(0, color=INK, linewidth=0.9, zorder=1)
    plate = {"facecolor": PAGE, "edgecolor": "none", "pad": 1.2}  # keeps lines out of the letters
    for row, method in enumerate(matrix.methods):
        style, figure = look(row), getattr(method.summary, name)
        text = "—" if figure is None else signed(figure.value, "%")
        axes.text(limits[0], row - 0.3, method.label, va="center", fontsize=8.5, color=MUTED, bbox=plate)
        axes.text(limits[1], row - 0.3, text, va="center", ha="right", color=INK, bbox=plate)
        if figure is None:
            continue
        if figure.low is not None and figure.high is not None:
            ends = [min(figure.low, HIGHEST), min(figure.high, HIGHEST)]
            axes.plot(ends, [row + 0.12] * 2, color=style.colour, linewidth=2.4, solid_capstyle="butt", zorder=2)
        axes.plot(
            [min(figure.value, HIGHEST)], [row + 0.12], style.marker, color=style.colour, markersize=5.5, zorder=3
        )
    axes.set_xlim(*limits)
    axes.set_ylim(len(matrix.methods) - 0.45, -0.65)
    axes.set_yticks([])
    axes.grid(axis="x", color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.spines["left"].set_visible(False)
    axes.set_title(FIGURES[name][0], loc="left")


def _summary_limits(matrix: Matrix) -> tuple[float, float]:
    figures = [getattr(method.summary, name) for method in matrix.methods for name in FIGURES]
    ends = [0.0, -2.0, 2.0]
    for figure in filter(None, figures):
        ends += [min(end, HIGHEST) for end in (figure.value, figure.low, figure.high) if end is not None]
    margin = 0.05 * (max(ends) - min(ends))
    return min(ends) - margin, max(ends) + margin


def summary_names(matrix: Matrix) -> list[str]:
    """The summary figures that some method has."""
    return [name for name in FIGURES if any(getattr(method.summary, name) for method in matrix.methods)]


def summary_panel(matrix: Matrix, name: str) -> Figure:
    """One summary figure for all methods, as a small panel of the page."""

    def draw() -> Figure:
        height = 0.6 + 0.45 * len(matrix.methods)
        figure = Figure(figsize=(3.3, height))
        figure.subplots_adjust(left=0.035, right=0.975, bottom=0.28 / height, top=1 - 0.28 / height)
        _summary_panel(figure.subplots(), matrix, name, _summary_limits(matrix))
        return figure

    return styled(draw)


def summary(matrix: Matrix) -> Figure:
    """The summary figures beside each other, on one scale."""

    def draw() -> Figure:
        names = summary_names(matrix) or ["in_domain"]
        columns = min(len(names), 3)
        rows = -(-len(names) // columns)
        height = rows * (0.65 + 0.45 * len(matrix.methods)) + 0.3
        figure = Figure(figsize=(max(3.5 * columns, 4.5), height), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False)
        for place, axes in enumerate(grid.flat):
            if place < len(names):
                _summary_panel(axes, matrix, names[place], _summary_limits(matrix))
            else:
                axes.set_axis_off()
        figure.supxlabel("perplexity against the base, % (lower is better)", fontsize=9, color=MUTED)
        return figure

    return styled(draw)


def files(matrix: Matrix) -> dict[str, bytes]:
    """The figures as files, by name."""
    return {
        **figure_files("matrix", heatmaps(matrix)),
        **figure_files("curves", curves(matrix)),
        **figure_files("summary", summary(matrix)),
    }
