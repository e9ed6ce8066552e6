"""What the tables and figures of all analyses share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from gaintune.report import NONE, SHADE, markdown_table, style_of, styled, without_frame
from gaintune.results import Interval

P = ParamSpec("P")


def text_frame(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> pd.DataFrame:
    """Return rows of text as a frame: the first cell names the row, and heads begin with a capital."""
    corner, *columns = [head[:1].upper() + head[1:] for head in heads]
    names = pd.Index([row[0] for row in rows], name=corner)
    return pd.DataFrame([row[1:] for row in rows], index=names, columns=columns, dtype=object)


def text_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return rows of text as a Markdown table."""
    frame = text_frame(heads, rows)
    return markdown_table(frame, str(frame.index.name))


def with_ends(figure: Interval | None, form: str) -> str:
    """Write a figure and its interval in a format such as `.4f`."""
    if figure is None:
        return NONE
    interval = "" if figure.low is None or figure.high is None else f" [{figure.low:{form}}, {figure.high:{form}}]"
    return f"{figure.value:{form}}{interval}"


def ends(figures: Sequence[Interval]) -> tuple[list[float], list[float]]:
    """Return the lower and the upper ends, or the values where there are none."""
    lows = [figure.value if figure.low is None else figure.low for figure in figures]
    return lows, [figure.value if figure.high is None else figure.high for figure in figures]


def drawn(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Draw under the report's style."""

    @functools.wraps(draw)
    def under_style(*args: P.args, **kwargs: P.kwargs) -> Figure:
        return styled(lambda: draw(*args, **kwargs))

    return under_style


def line(index: int, *, marked: bool = True, **options: Any) -> dict[str, Any]:
    """Return what matplotlib needs to draw the line of a method, an adapter or a domain, by its position."""
    style = style_of(index)
    marker = {"marker": style.marker} if marked else {}
    return {"color": style.color, "linestyle": style.dashes, **marker, **options}


def layer_cells(
    axes: Axes, values: np.ndarray, rows: Sequence[str], layers: Sequence[int], every: int, **colors: Any
) -> None:
    """Draw a heatmap of `(rows, layers)`, NaN as a gap, with the number of every so many layers below."""
    axes.set_facecolor(SHADE)
    axes.pcolormesh(values, edgecolors="white", **colors)
    axes.set_yticks(np.arange(len(rows)) + 0.5, rows)
    axes.set_xticks(np.arange(len(layers))[::every] + 0.5, [str(layer) for layer in layers[::every]])
    axes.invert_yaxis()
    without_frame(axes)


def legend(sheet: Figure, labels: Sequence[str], most: int, *, marked: bool = False, **options: Any) -> None:
    """Name the lines above the panels in their order, at most so many in a row."""
    handles = [Line2D([], [], label=label, **line(at, marked=marked, **options)) for at, label in enumerate(labels)]
    columns = min(most, len(handles))
    sheet.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False, handlelength=3)
