"""Style of every figure, its bytes on disk, and its form inside the page."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure

from gaintune.report.palette import STYLES

INK, MUTED, RULE, SHADE, PAGE = "#1a1d21", "#5f6773", "#d5d9df", "#eef0f3", "#fefefe"
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,  # a name may hold a dollar sign
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "figure.constrained_layout.w_pad": 0.08,
    "figure.constrained_layout.h_pad": 0.08,
    "hatch.linewidth": 0.6,
    "svg.hashsalt": "gaintune",
}


def styled(draw: Callable[[], Figure]) -> Figure:
    """Draw under the report's style, leaving matplotlib's settings as they were."""
    with matplotlib.rc_context(STYLE):
        return draw()


def panels(
    count: int, columns: int, size: Callable[[int, int], tuple[float, float]], **shared: Any
) -> tuple[Figure, list[Axes]]:
    """Make a sheet with so many panels, its size by rows and columns; the rest of the last row stays empty."""
    rows = -(-count // columns)
    sheet = Figure(figsize=size(rows, columns), layout="constrained")
    grid = list(sheet.subplots(rows, columns, squeeze=False, **shared).flat)
    for axes in grid[count:]:
        axes.set_axis_off()
    return sheet, grid[:count]


def ruled(axes: Axes, along: Literal["x", "y", "both"] = "y", which: Literal["major", "both"] = "major") -> None:
    """Draw thin rules behind the data, and no ticks."""
    axes.grid(axis=along, color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, which=which)


def without_frame(axes: Axes) -> None:
    """Draw neither ticks nor a frame, as around a heatmap."""
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def color_bar(sheet: Figure, mapped: ScalarMappable, beside: Sequence[Axes], label: str, **options: Any) -> Any:
    """Add the scale of a heatmap beside its panels."""
    bar = sheet.colorbar(mapped, ax=list(beside), **options)
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.ax.tick_params(length=0)
    bar.set_label(label, color=MUTED)
    return bar


def render(figure: Figure, kind: str, *, fonttype: str = "path", **options: Any) -> bytes:
    """Return a figure as the bytes of a PNG or SVG file, without dates or program names in it."""
    if kind == "svg":
        options["metadata"] = {"Date": None, "Creator": None, "Format": None, "Type": None}
    buffer = io.BytesIO()
    with matplotlib.rc_context({**STYLE, "svg.fonttype": fonttype}):
        figure.savefig(buffer, format=kind, **options)
    return buffer.getvalue()


def figure_files(name: str, figure: Figure) -> dict[str, bytes]:
    """Return a figure as files by name: PNG (144 dots an inch, on white), and SVG with its letters as shapes."""
    paper = {"facecolor": "white", "bbox_inches": "tight", "pad_inches": 0.12}
    png = render(figure, "png", dpi=144, metadata={"Software": None}, **paper)
    figure.set_layout_engine("none")  # keep the PNG's layout
    return {f"{name}.png": png, f"{name}.svg": render(figure, "svg", **paper)}


def inline_svg(figure: Figure, name: str) -> str:
    """Return a figure as an SVG element for the page, in the page's own font and colors, with ids of its own.

    It is hidden from screen readers: the caller puts a label around it, and the numbers stand in a table.
    """
    text = render(figure, "svg", fonttype="none", transparent=True).decode("utf-8")
    text = text[text.index("<svg") :]
    used = set(re.findall(r'(?:xlink:href="#|url\(#)([^")]+)', text))
    text = re.sub(r' id="([^"]+)"', lambda match: f' id="{name}-{match[1]}"' if match[1] in used else "", text)
    text = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{name}-", text)
    themed = {INK: "--ink", MUTED: "--muted", RULE: "--rule", SHADE: "--shade", PAGE: "--page"}
    themed |= {one.color: f"--series-{index}" for index, one in enumerate(STYLES)}
    for color, variable in themed.items():
        text = text.replace(color, f"var({variable})")
    text = re.sub(r"font: ((?:[\w-]+ )*)([\d.]+)px [^;\"]+", r"font: \1\2px var(--font)", text)
    text = re.sub(r'<svg ([^>]*?)width="([\d.]+)pt" height="([\d.]+)pt"', r"<svg \1", text, count=1)
    return text.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1)
