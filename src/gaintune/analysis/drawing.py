"""What the figures of all analyses share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, ParamSpec

from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from gaintune.report import MUTED, RULE, look, styled
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
    handles = [
        Line2D([], [], color=style.colour, linestyle=style.dashes, label=label, **line, **marker)
        for label, style in ((label, look(index)) for index, label in enumerate(labels))
        for marker in [{"marker": style.marker} if marked else {}]
    ]
    columns = min(most, len(handles))
    sheet.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False, handlelength=3)


def ends(figures: Sequence[Interval]) -> tuple[list[float], list[float]]:
    """Return the lower and the upper ends, or the values where there are none."""
    lows = [one.value if one.low is None else one.low for one in figures]
    return lows, [one.value if one.high is None else one.high for one in figures]
