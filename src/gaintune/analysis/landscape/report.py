"""Loss landscapes as tables and figures: curves from pretrained to adapted, and heatmaps of planes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize, to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from gaintune.analysis.landscape.directions import WAYS
from gaintune.analysis.landscape.surface import DomainFigures, Surface
from gaintune.analysis.landscape.survey import Landscape
from gaintune.report.canvas import INK, MUTED, RULE, figure_files, styled
from gaintune.report.palette import LARGEST_LIMIT, SMALLEST_LIMIT, diverging, ink_on, look
from gaintune.report.tables import markdown_table
from gaintune.report.words import NONE, signed, with_interval
from gaintune.results.records import Interval
from gaintune.storage.files import write_bytes, write_json, write_text

TICKS = [(1, 2, 3, 4, 5, 6, 8), (1, 2, 5), (1,)]


def surfaces(found: Landscape) -> Iterator[tuple[str, Surface]]:
    """Every line, then the plane, each with its kind."""
    yield from (("line", line) for line in found.lines)
    if found.plane is not None:
        yield "plane", found.plane


def table(found: Landscape) -> pd.DataFrame:
    """One row for each place and domain; `x` is the first adapter's coordinate, `y` the second's (planes only)."""
    rows = []
    for kind, surface in surfaces(found):
        for point in surface.points:
            place = {"x": point.place[0], "y": point.place[1] if len(point.place) > 1 else None}
            for domain, loss in point.losses.items():
                change = surface.change(point, domain)
                measured = {"nats_per_token": loss.nats_per_token, "perplexity": loss.perplexity}
                interval = {"change": change.value, "low": change.low, "high": change.high}
                named = {"kind": kind, "adapters": " and ".join(surface.labels), "domain": domain}
                rows.append({**named, **place, **measured, **interval})
    return pd.DataFrame(rows)


def markdown(found: Landscape) -> str:
    """What each line and plane says of each domain, and the geometry of the directions."""
    parts = [
        "Loss between the pretrained model (0) and adapted ones (1). Changes of perplexity in %, paired by blocks, "
        "with intervals that are a bootstrap over blocks, widened for few blocks."
    ]
    frame = pd.DataFrame(
        [
            [domain, with_interval(one.at_adapted[0]), f"{one.best[0]:g}", *_spread(one, barrier=True)]
            for line in found.lines
            for domain, one in ((domain, line.figures(domain)) for domain in line.domains)
        ],
        index=[line.labels[0] for line in found.lines for _ in line.domains],
        columns=["Domain", "At the adapted model", "Lowest at", "Lowest", "Range, nats", "Barrier, nats"],
        dtype=object,
    )
    parts.append(markdown_table(frame, "Adapter"))
    if found.plane is not None:
        figures = {domain: found.plane.figures(domain) for domain in found.plane.domains}
        plane = pd.DataFrame(
            [
                [*map(with_interval, one.at_adapted), ", ".join(f"{t:g}" for t in one.best), *_spread(one)]
                for one in figures.values()
            ],
            index=list(figures),
            columns=[*found.plane.labels, "Both", "Lowest at", "Lowest", "Range, nats"],
            dtype=object,
        )
        parts += [f"The plane of {' and '.join(found.plane.labels)}:", markdown_table(plane, "Domain")]
    parts.append("\n".join(f"- {sentence}" for _, surface in surfaces(found) for sentence in geometry(surface)))
    note = (
        "Lowest: the best change between 0 and 1, and where. Range: highest less lowest loss a token there. Barrier: "
        "how far the loss rises above the straight line between its ends."
    )
    return "\n\n".join(part.rstrip("\n") for part in [*parts, note]) + "\n"


def _spread(one: DomainFigures, *, barrier: bool = False) -> list[str]:
    cells = [with_interval(one.best_change), in_nats(one.range)]
    return [*cells, in_nats(one.barrier)] if barrier else cells


def in_nats(figure: Interval | None) -> str:
    """A range or a barrier with its interval."""
    if figure is None:
        return NONE
    ends = "" if figure.low is None or figure.high is None else f" [{figure.low:.4f}, {figure.high:.4f}]"
    return f"{figure.value:.4f}{ends}"


def geometry(surface: Surface) -> list[str]:
    """How the model was moved, and how the directions lie, in words."""
    shape, names = surface.geometry, " and ".join(surface.labels)
    if len(surface.labels) == 1:
        relative = 100 * shape.lengths[0] / shape.base_length
        return [
            f"{names}: {WAYS[surface.way]}. In {surface.numbers}. The direction is {shape.lengths[0]:.4g} long, "
            f"{relative:.3g} % of the weights it changes."
        ]
    gates = ", every gate open" if surface.way == "gated" else ""
    cosine = "undefined: one has no length" if shape.cosine is None else f"{shape.cosine:+.4f}"
    own = "" if shape.parameter_cosine is None else f"; between the vectors v themselves {shape.parameter_cosine:+.4f}"
    return [f"{names}: cosine of the directions in the space of the weights{gates} {cosine}{own}."]


def _curve(axes: Axes, found: Landscape, domain: str) -> None:
    """Perplexity of one domain along every line, with its paired interval around the change."""
    for index, line in enumerate(found.lines):
        style, t = look(index), [point.place[0] for point in line.points]
        changes = [line.change(point, domain) for point in line.points]
        base = line.at(0.0).losses[domain].perplexity
        values, lows, highs = (
            [base * (1 + value / 100) for value in column]
            for column in (
                [one.value for one in changes],
                [one.value if one.low is None else one.low for one in changes],
                [one.value if one.high is None else one.high for one in changes],
            )
        )
        axes.fill_between(t, lows, highs, color=style.colour, alpha=0.16, linewidth=0)
        axes.plot(t, values, color=style.colour, linestyle=style.dashes, linewidth=1.6)
        axes.plot([1.0], [values[t.index(1.0)]], style.marker, color=style.colour, markersize=5, clip_on=False)
    for place in (0.0, 1.0):
        axes.axvline(place, color=RULE, linewidth=0.9, zorder=0)
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_yticks(ticks := _ticks(low, high), [f"{tick:g}" for tick in ticks])
    axes.set_yticks([], minor=True)
    axes.set_ylim(low, high)
    axes.set_title(domain, loc="left")
    axes.grid(axis="y", color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)


def _ticks(low: float, high: float) -> list[float]:
    """A few round perplexities between two: multiples on a wide range, an even grid on a narrow one."""
    if high / low < 3:
        step = 10.0 ** np.floor(np.log10((high - low) / 5))
        step *= next(k for k in (1, 2, 5, 10) if (high - low) / (k * step) <= 6)
        return [float(tick) for tick in np.arange(np.ceil(low / step), high / step) * step]
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    choices = [[m * 10.0**d for d in decades for m in part if low <= m * 10.0**d <= high] for part in TICKS]
    return next((ticks for ticks in choices if len(ticks) <= 7), choices[-1])


def line_figure(found: Landscape) -> Figure:
    """Perplexity along the lines, a panel for each domain (GAIN paper, Figure 3)."""

    def draw() -> Figure:
        domains = found.lines[0].domains
        columns = 2 if len(domains) == 4 else min(len(domains), 3)
        rows = -(-len(domains) // columns)
        sheet = Figure(figsize=(1.0 + 2.9 * columns, 0.9 + 2.4 * rows), layout="constrained")
        grid = sheet.subplots(rows, columns, squeeze=False, sharex=True)
        for place, axes in enumerate(grid.flat):
            if place < len(domains):
                _curve(axes, found, domains[place])
            else:
                axes.set_axis_off()
        grid[0, 0].set_xticks([0, 0.5, 1], ["0\npretrained", "0.5", "1\nadapted"])
        for axes in grid.flat:
            axes.tick_params(labelbottom=True)
        handles = [
            Line2D([], [], color=look(i).colour, linestyle=look(i).dashes, marker=look(i).marker, label=line.labels[0])
            for i, line in enumerate(found.lines)
        ]
        sheet.legend(handles=handles, loc="outside upper center", ncols=2, frameon=False, handlelength=3)
        sheet.supylabel("perplexity (log scale)", fontsize=9, color=MUTED)
        return sheet

    return styled(draw)


def _plate(axes: Axes, plane: Surface, domain: str, colours: Colormap, scale: Normalize) -> None:
    """Change of one domain over the plane, a cell for every place, with its number."""
    steps = sorted({point.place[0] for point in plane.points})
    values = np.array([[plane.change(plane.at(x, y), domain).value for x in steps] for y in steps])
    axes.pcolormesh(values, cmap=colours, norm=scale, edgecolors="white", linewidth=0.8)
    for row, y in enumerate(steps):
        for column, x in enumerate(steps):
            value = float(values[row, column])
            named = (x, y) in {(0.0, 0.0), (1.0, 0.0), (0.0, 1.0)}
            axes.text(
                column + 0.5, row + 0.5, signed(value), ha="center", va="center", fontsize=6.5,
                color=ink_on(to_hex(colours(scale(value)))), fontweight="bold" if named else "normal",
            )  # fmt: skip
    labels = [f"{step:g}".replace("-", "−") for step in steps]
    axes.set_xticks(np.arange(len(steps)) + 0.5, labels)
    axes.set_yticks(np.arange(len(steps)) + 0.5, labels)
    axes.set_aspect("equal")
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_title(domain, loc="left")


def plane_figure(plane: Surface) -> Figure:
    """Change of perplexity over the plane, a panel for each domain, one colour scale (GAIN paper, Figure 4)."""

    def draw() -> Figure:
        domains, steps = plane.domains, len({point.place[0] for point in plane.points})
        columns = 2 if len(domains) == 4 else min(len(domains), 3)
        rows = -(-len(domains) // columns)
        side = max(0.44 * steps, 2.2)
        sheet = Figure(figsize=(1.6 + (side + 0.4) * columns, 0.6 + (side + 0.4) * rows), layout="constrained")
        grid = sheet.subplots(rows, columns, squeeze=False)
        largest = max(abs(plane.change(point, domain).value) for point in plane.points for domain in domains)
        limit = min(max(5.0 * np.ceil(largest / 5.0), SMALLEST_LIMIT), LARGEST_LIMIT)
        scale, colours = Normalize(-limit, limit, clip=True), diverging()
        for place, axes in enumerate(grid.flat):
            if place < len(domains):
                _plate(axes, plane, domains[place], colours, scale)
            else:
                axes.set_axis_off()
        extend = "both" if largest > limit else "neither"
        mapped = ScalarMappable(Normalize(-limit, limit), colours)
        bar = sheet.colorbar(mapped, ax=list(grid.flat), shrink=0.8, extend=extend)
        bar.outline.set_visible(False)  # type: ignore[operator]
        bar.ax.tick_params(length=0)
        bar.set_label("change of perplexity, %", color=MUTED)
        sheet.supxlabel(f"toward {plane.labels[0]}", fontsize=9, color=INK)
        sheet.supylabel(f"toward {plane.labels[1]}", fontsize=9, color=INK)
        return sheet

    return styled(draw)


def write(found: Landscape, folder: Path) -> None:
    """Write landscape.csv, .md and .json, and landscape-lines and (of a plane) landscape-plane as PNG and SVG."""
    write_text(folder / "landscape.csv", table(found).to_csv(index=False, lineterminator="\n"))
    write_text(folder / "landscape.md", markdown(found))
    write_json(folder / "landscape.json", found.to_dict())
    drawn = figure_files("landscape-lines", line_figure(found))
    if found.plane is not None:
        drawn |= figure_files("landscape-plane", plane_figure(found.plane))
    else:
        for old in ("landscape-plane.png", "landscape-plane.svg"):  # of a call before this one
            (folder / old).unlink(missing_ok=True)
    for name, content in drawn.items():
        write_bytes(folder / name, content)
