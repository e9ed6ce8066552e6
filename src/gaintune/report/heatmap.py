"""The matrices as a figure: stages down, domains across, one colour scale for all methods."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize, to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from gaintune.results.matrix import Cell, Matrix, MethodMatrix
from gaintune.results.records import Place
from gaintune.report.canvas import INK, MUTED, SHADE, styled
from gaintune.report.palette import diverging, ink_on, largest_change, limit_of
from gaintune.report.words import signed


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
