"""Colors that hold up under color blindness and on a dark page: the diverging scale, and the style of each method."""

from __future__ import annotations

import math
from dataclasses import dataclass

from matplotlib import colormaps
from matplotlib.colors import Colormap, LinearSegmentedColormap, to_hex, to_rgb

from gaintune.results import Matrix

BINS = 12  # shades on each side of zero on the page
# % at full color: noise must not look dramatic, nor one outlier hide the rest
SMALLEST_LIMIT, LARGEST_LIMIT = 5.0, 30.0


@dataclass(frozen=True)
class LineStyle:
    """Style of one method's line: color, dashes and marker all differ, so that none of them is needed alone."""

    color: str
    dark_color: str
    dashes: tuple[float, tuple[float, ...]]
    marker: str


# Okabe and Ito's colors, the light ones darkened to be read on white
STYLES = (
    LineStyle("#0072b2", "#56b4e9", (0, ()), "o"),
    LineStyle("#d55e00", "#ff8c42", (0, (5, 1.6)), "s"),
    LineStyle("#00856a", "#2fc79e", (0, (1, 1.2)), "^"),
    LineStyle("#a8518a", "#e59ac6", (0, (5, 1.4, 1, 1.4)), "D"),
    LineStyle("#8a6d00", "#e6c229", (0, (8, 2, 1, 1, 1, 2)), "v"),
    LineStyle("#4d4d4d", "#bdbdbd", (0, (3, 3)), "P"),
)


def style_of(index: int) -> LineStyle:
    """Return the line style of a method by its index in the plan."""
    return STYLES[index % len(STYLES)]


def diverging() -> Colormap:
    """Make the scale: blue is better than the base (below zero), red worse, white no change; without darkest ends."""
    full = colormaps["RdBu_r"]
    return LinearSegmentedColormap.from_list("gaintune", [full(0.1 + 0.8 * step / 32) for step in range(33)])


def largest_change(matrix: Matrix) -> float:
    """Return the largest change in % in any cell, either way."""
    changes = [abs(cell.change) for method in matrix.methods for row in method.stages for cell in row.cells.values()]
    return max(changes, default=0.0)


def limit_of(matrix: Matrix) -> float:
    """Return the change in % at which the color is full, shared by all methods."""
    return limit_for(largest_change(matrix))


def limit_for(largest: float) -> float:
    """Return the change in % at which the color is full, given the largest change: a multiple of 5 from 5 to 30."""
    return min(max(5.0 * math.ceil(largest / 5.0), SMALLEST_LIMIT), LARGEST_LIMIT)


def bin_of(change: float, limit: float) -> int:
    """Return the shade of a change on the page, -BINS to BINS."""
    return round(BINS * max(-1.0, min(1.0, change / limit)))


def ink_on(color: str) -> str:
    """Return black or white, whichever has the higher contrast on a color (WCAG's relative luminance)."""
    channels = [value / 12.92 if value <= 0.03928 else ((value + 0.055) / 1.055) ** 2.4 for value in to_rgb(color)]
    luminance = 0.2126 * channels[0] + 0.7152 * channels[1] + 0.0722 * channels[2]
    return "#ffffff" if 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.05 else "#111111"


def css() -> tuple[str, str]:
    """Write style rules of the shades and of the methods' colors: for light pages, and for dark ones."""
    dark = LinearSegmentedColormap.from_list("gaintune-dark", ["#2f7fc1", "#2b4a66", "#2a2d33", "#66392f", "#c24a3a"])
    return _rules(diverging(), [one.color for one in STYLES]), _rules(dark, [one.dark_color for one in STYLES])


def _rules(scale: Colormap, series: list[str]) -> str:
    shades = {step: to_hex(scale(0.5 + 0.5 * step / BINS)) for step in range(-BINS, BINS + 1)}
    colors = "".join(f"--series-{index}:{color};" for index, color in enumerate(series))
    rules = [f".shade-{step}{{background-color:{shade};color:{ink_on(shade)}}}" for step, shade in shades.items()]
    return "\n".join([f":root{{{colors}--scale:linear-gradient(90deg,{','.join(shades.values())})}}", *rules])
