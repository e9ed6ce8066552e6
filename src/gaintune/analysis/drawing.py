"""What the figures of all analyses share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, ParamSpec

from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from gaintune.report import MUTED, NONE, RULE, look, styled
from gaintune.results import Interval

P = ParamSpec("P")


def drawn(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Draw under the report's style."""

    @functools.wraps(draw)
    def under_style(*args: P.args, **kwargs: P.kwargs) -> Figure:
        return styled(lambda: draw(*args, **kwargs))

    return under_style


def ruled(axes: Axes, along: Literal["x", "y", "both"] = "y", which: Literal["major", "both"] = "major") -> None:
    """Draw thin rules behind the data, and no ticks."""
    axes.grid(axis=along, color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, which=which)


def framed_by_nothing(axes: Axes) -> None:
    """Draw neither ticks nor a frame: for heatmaps."""
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def color_bar(sheet: Figure, mapped: ScalarMappable, panels: Sequence[Axes], label: str, **options: Any) -> Any:
    """Add the scale of a heatmap beside its panels."""
    bar = sheet.colorbar(mapped, ax=list(panels), **options)
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.ax.tick_params(length=0)
    bar.set_label(label, color=MUTED)
    return bar


def legend(sheet: Figure, labels: Sequence[str], most: int, *, marked: bool = False, **line: Any) -> None:
    """Name the lines above the panels, at most so many in a row, in the looks of their order."""
    handles = []
    for label, style in zip(labels, map(look, range(len(labels))), strict=True):
        marker: Any = style.marker if marked else None
        handles.append(Line2D([], [], color=style.colour, linestyle=style.dashes, marker=marker, label=label, **line))
    columns = min(most, len(handles))
    sheet.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False, handlelength=3)


def panels(
    count: int, columns: int, size: Callable[[int, int], tuple[float, float]], **shared: Any
) -> tuple[Figure, list[Axes]]:
    """Make a sheet with so many panels, its size by rows and columns; what is left of the last row is empty."""
    rows = -(-count // columns)
    sheet = Figure(figsize=size(rows, columns), layout="constrained")
    grid = list(sheet.subplots(rows, columns, squeeze=False, **shared).flat)
    for axes in grid[count:]:
        axes.set_axis_off()
    return sheet, grid[:count]


def with_ends(figure: Interval | None, form: str) -> str:
    """Write a figure and its interval in a format such as `.4f`."""
    if figure is None:
        return NONE
    interval = "" if figure.low is None or figure.high is None else f" [{figure.low:{form}}, {figure.high:{form}}]"
    return f"{figure.value:{form}}{interval}"


def ends(figures: Sequence[Interval]) -> tuple[list[float], list[float]]:
    """Return the lower and the upper ends, or the values where there are none."""
    lows = [one.value if one.low is None else one.low for one in figures]
    return lows, [one.value if one.high is None else one.high for one in figures]
