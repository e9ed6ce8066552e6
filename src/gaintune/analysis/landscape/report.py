"""Show loss landscapes as tables and figures: curves from pretrained to adapted, and heatmaps of planes."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize, to_hex
from matplotlib.figure import Figure

from gaintune.analysis.base import Headline, Numbers, Result, Subject
from gaintune.analysis.drawing import drawn, ends, legend, with_ends
from gaintune.analysis.landscape.directions import WAYS
from gaintune.analysis.landscape.survey import DomainFigures, Landscape, Surface, range_apart
from gaintune.report import (
    INK,
    MUTED,
    NONE,
    RULE,
    color_bar,
    diverging,
    ink_on,
    limit_for,
    markdown_table,
    panels,
    ruled,
    signed,
    style_of,
    with_interval,
    without_frame,
)
from gaintune.results import Interval, exact

TICKS = [(1, 2, 3, 4, 5, 6, 8), (1, 2, 5), (1,)]


def table(landscape: Landscape) -> pd.DataFrame:
    """Make a row for each position and domain; of a line, `y` is empty."""
    rows = []
    for surface in landscape.surfaces:
        kind, adapters = "line" if len(surface.labels) == 1 else "plane", " and ".join(surface.labels)
        for position, losses in surface.points.items():
            x, y = (*position, None)[:2]
            for domain, loss in losses.items():
                figures = [loss.nats_per_token, loss.perplexity, *astuple(surface.change(position, domain))]
                rows.append([kind, adapters, domain, x, y, *figures])
    columns = ["kind", "adapters", "domain", "x", "y", "nats_per_token", "perplexity", "change", "low", "high"]
    return pd.DataFrame(rows, columns=columns)


def markdown(landscape: Landscape) -> str:
    """Write what each line and plane says of each domain, and the geometry of the directions."""
    heads = ["Lowest at", "Lowest", "Range, nats"]
    rows = [
        [line.labels[0], domain, *_cells(line.figures(domain))] for line in landscape.lines for domain in line.domains
    ]
    columns = ["Adapter", "Domain", "At the adapted model", *heads, "Barrier, nats"]
    parts = [
        "Loss between the pretrained model (0) and adapted ones (1). Changes of perplexity in %, paired by blocks, "
        "with intervals that are a bootstrap over blocks, widened for few blocks.",
        markdown_table(pd.DataFrame(rows, columns=columns).set_index("Adapter"), "Adapter"),
    ]
    if plane := landscape.plane:
        rows = [_cells(plane.figures(domain))[:-1] for domain in plane.domains]
        frame = pd.DataFrame(rows, index=list(plane.domains), columns=[*plane.labels, "Both", *heads])
        parts += [f"The plane of {' and '.join(plane.labels)}:", markdown_table(frame, "Domain")]
    parts.append("\n".join(f"- {geometry(surface)}" for surface in landscape.surfaces))
    note = (
        "Lowest: the best change between 0 and 1, and where. Range: highest less lowest loss a token there. Barrier: "
        "how far the loss rises above the straight line between its ends."
    )
    return "\n\n".join(part.rstrip("\n") for part in [*parts, note]) + "\n"


def _cells(figures: DomainFigures) -> list[str]:
    at = ", ".join(f"{t:g}" for t in figures.best)
    spread = with_interval(figures.best_change), _in_nats(figures.range), _in_nats(figures.barrier)
    return [*map(with_interval, figures.at_adapted), at, *spread]


def _in_nats(figure: Interval | None) -> str:
    return with_ends(figure, ".4f")


def geometry(surface: Surface) -> str:
    """Say how the model was moved, and how the directions lie."""
    shape, names = surface.geometry, " and ".join(surface.labels)
    if len(surface.labels) == 1:
        relative = 100 * shape.lengths[0] / shape.base_length
        return (
            f"{names}: {WAYS[surface.way]}. In {surface.precision}. The direction is {shape.lengths[0]:.4g} long, "
            f"{relative:.3g} % of the weights it changes."
        )
    gates = ", every gate open" if surface.way == "gated" else ""
    cosine = "undefined: one has no length" if shape.cosine is None else f"{shape.cosine:+.4f}"
    own = "" if shape.parameter_cosine is None else f"; between the vectors v themselves {shape.parameter_cosine:+.4f}"
    return f"{names}: cosine of the directions in the space of the weights{gates} {cosine}{own}."


def _curve(axes: Axes, landscape: Landscape, domain: str) -> None:
    """Draw the perplexity of one domain along every line, with its paired interval around the change."""
    for index, line in enumerate(landscape.lines):
        style, t = style_of(index), [t for (t,) in line.points]
        changes = [line.change(position, domain) for position in line.points]
        base = line.origin[domain].perplexity
        columns = ([change.value for change in changes], *ends(changes))
        values, lows, highs = ([base * (1 + value / 100) for value in column] for column in columns)
        axes.fill_between(t, lows, highs, color=style.color, alpha=0.16, linewidth=0)
        axes.plot(t, values, color=style.color, linestyle=style.dashes, linewidth=1.6)
        axes.plot([1.0], [values[t.index(1.0)]], style.marker, color=style.color, markersize=5, clip_on=False)
    for end in (0.0, 1.0):
        axes.axvline(end, color=RULE, linewidth=0.9, zorder=0)
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_yticks(ticks := _ticks(low, high), [f"{tick:g}" for tick in ticks])
    axes.set_yticks([], minor=True)
    axes.set_ylim(low, high)
    axes.set_title(domain, loc="left")
    ruled(axes)


def _ticks(low: float, high: float) -> list[float]:
    """Choose a few round perplexities between two: multiples on a wide range, an even grid on a narrow one."""
    if high / low < 3:
        step = 10.0 ** np.floor(np.log10((high - low) / 5))
        step *= next(k for k in (1, 2, 5, 10) if (high - low) / (k * step) <= 6)
        return [float(tick) for tick in np.arange(np.ceil(low / step), high / step) * step]
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    choices = [[m * 10.0**d for d in decades for m in part if low <= m * 10.0**d <= high] for part in TICKS]
    return next((ticks for ticks in choices if len(ticks) <= 7), choices[-1])


def _domain_panels(
    domains: Sequence[str], width: tuple[float, float], height: tuple[float, float], **shared: Any
) -> tuple[Figure, list[Axes]]:
    """Make a panel for each domain; width and height of the sheet are a margin and the size of a panel."""
    columns = 2 if len(domains) == 4 else min(len(domains), 3)
    return panels(
        len(domains), columns, lambda rows, _: (width[0] + width[1] * columns, height[0] + height[1] * rows), **shared
    )


@drawn
def line_figure(landscape: Landscape) -> Figure:
    """Draw perplexity along the lines, a panel for each domain (GAIN paper, Figure 3)."""
    domains = landscape.lines[0].domains
    sheet, grid = _domain_panels(domains, (1.0, 2.9), (0.9, 2.4), sharex=True)
    for domain, axes in zip(domains, grid, strict=True):
        _curve(axes, landscape, domain)
    grid[0].set_xticks([0, 0.5, 1], ["0\npretrained", "0.5", "1\nadapted"])
    for axes in grid:
        axes.tick_params(labelbottom=True)
    legend(sheet, [line.labels[0] for line in landscape.lines], 2, marked=True)
    sheet.supylabel("perplexity (log scale)", fontsize=9, color=MUTED)
    return sheet


def _heatmap(axes: Axes, plane: Surface, domain: str, colors: Colormap, scale: Normalize) -> None:
    """Draw the change of one domain over the plane, a cell with its number for every position."""
    steps = sorted({x for x, _ in plane.points})
    values = np.array([[plane.change((x, y), domain).value for x in steps] for y in steps])
    axes.pcolormesh(values, cmap=colors, norm=scale, edgecolors="white", linewidth=0.8)
    for (row, column), value in np.ndenumerate(values):
        named = (steps[column], steps[row]) in {(0.0, 0.0), (1.0, 0.0), (0.0, 1.0)}
        axes.text(
            column + 0.5, row + 0.5, signed(float(value)), ha="center", va="center", fontsize=6.5,
            color=ink_on(to_hex(colors(scale(float(value))))), fontweight="bold" if named else "normal",
        )  # fmt: skip
    labels = [f"{step:g}".replace("-", "−") for step in steps]
    axes.set_xticks(np.arange(len(steps)) + 0.5, labels)
    axes.set_yticks(np.arange(len(steps)) + 0.5, labels)
    axes.set_aspect("equal")
    without_frame(axes)
    axes.set_title(domain, loc="left")


@drawn
def plane_figure(plane: Surface) -> Figure:
    """Draw the change of perplexity over the plane, a panel for each domain, on one scale (GAIN paper, Figure 4)."""
    side = max(0.44 * len({x for x, _ in plane.points}), 2.2) + 0.4
    sheet, grid = _domain_panels(plane.domains, (1.6, side), (0.6, side))
    largest = max(abs(plane.change(position, domain).value) for position in plane.points for domain in plane.domains)
    limit = limit_for(largest)
    scale, colors = Normalize(-limit, limit, clip=True), diverging()
    for domain, axes in zip(plane.domains, grid, strict=True):
        _heatmap(axes, plane, domain, colors, scale)
    mapped = ScalarMappable(Normalize(-limit, limit), colors)
    extend = "both" if largest > limit else "neither"
    color_bar(sheet, mapped, sheet.axes, "change of perplexity, %", shrink=0.8, extend=extend)
    sheet.supxlabel(f"toward {plane.labels[0]}", fontsize=9, color=INK)
    sheet.supylabel(f"toward {plane.labels[1]}", fontsize=9, color=INK)
    return sheet


def plane_numbers(landscapes: Mapping[str, Landscape]) -> Numbers:
    """Return the numbers of every label's plane and of every two, and the missing ones, each with the reason.

    Numbers: `LABEL.cosine` of the two directions, `LABEL.DOMAIN.both` and `LABEL.DOMAIN.range`; of two labels
    `A-minus-B.cosine`, of the cosines without their signs, and `A-minus-B.DOMAIN.range`.
    """
    numbers: dict[str, Interval | None] = {}
    without: dict[str, str] = {}
    domains = next(iter(landscapes.values())).lines[0].domains
    names = ["cosine", *(f"{domain}.range" for domain in domains)]
    planes = {label: each.plane for label, each in landscapes.items() if each.plane is not None}
    lines = {label: len(each.lines) for label, each in landscapes.items() if each.plane is None}
    lacking = {label: f"two adapters span a plane, and {label} has {count}" for label, count in lines.items()}
    for label, why in lacking.items():
        without |= {f"{label}.{name}": why for name in (*names, *(f"{domain}.both" for domain in domains))}
    for label, plane in planes.items():
        cosine = plane.geometry.cosine
        numbers[f"{label}.cosine"] = None if cosine is None else exact(cosine)
        for domain in domains:
            figures = plane.figures(domain)
            numbers |= {f"{label}.{domain}.both": figures.at_adapted[2], f"{label}.{domain}.range": figures.range}
    for first, second in itertools.permutations(landscapes, 2):
        pair = f"{first}-minus-{second}"
        if why := lacking.get(first) or lacking.get(second):
            without |= {f"{pair}.{name}": why for name in names}
            continue
        one, other = planes[first].geometry.cosine, planes[second].geometry.cosine
        numbers[f"{pair}.cosine"] = None if one is None or other is None else exact(abs(one) - abs(other))
        for domain in domains:
            numbers[f"{pair}.{domain}.range"] = range_apart(planes[first], planes[second], domain)
    without |= {name: "a direction has no length" for name, figure in numbers.items() if figure is None}
    return {name: figure for name, figure in numbers.items() if figure is not None}, without


def result(landscape: Landscape, subject: Subject, *_: Any) -> Result:
    """Put the survey together.

    Numbers: `DOMAIN.at-TRAINED`, change of perplexity in % at the adapter of TRAINED, and `TRAINED.barrier`, nats.
    """
    numbers: dict[str, Interval] = {}
    rows, shown = [], {}
    plane, names = landscape.plane, subject.names or [line.labels[0] for line in landscape.lines]
    for line, trained in zip(landscape.lines, names, strict=True):
        for domain in line.domains:
            figures = line.figures(domain)
            at, lowest = figures.at_adapted[0], f"{figures.best[0]:g}"
            spread = [_in_nats(figures.range), _in_nats(figures.barrier)]
            numbers[f"{domain}.at-{trained}"] = at
            if domain == trained and figures.barrier is not None:
                numbers[f"{trained}.barrier"] = figures.barrier
            rows.append([line.labels[0], domain, at, lowest, *spread])
            shown[f"{trained}, {domain}"] = [with_interval(at), lowest, *spread]
    remarks = []
    if plane is not None:
        for domain in plane.domains:
            figures = plane.figures(domain)
            cells = [with_interval(figures.at_adapted[2]), NONE, _in_nats(figures.range), NONE]
            shown[f"both (range of the plane), {domain}"] = cells
        cosine = plane.geometry.cosine
        remarks = [f"cosine of the two directions {'undefined' if cosine is None else format(cosine, '+.4f')}"]
    heads = ["lowest at", "range, nats", "barrier, nats"]
    about = f"{subject.title}: trained, measured; intervals over validation blocks"
    columns = ["At the adapted model, %", *map(str.capitalize, heads)]
    return Result(
        headline=Headline(["adapter", "domain", "at the adapted model", *heads], rows, numeric=2),
        remarks=remarks,
        tables={"landscape": table(landscape)},
        markdown=markdown(landscape),
        record=landscape.to_dict(),
        provenance=landscape.provenance.to_dict(),
        figures={"landscape-lines": line_figure(landscape), "landscape-plane": plane and plane_figure(plane)},
        numbers=numbers,
        shown={about: pd.DataFrame.from_dict(shown, orient="index", columns=columns)},
        notes=[f"{subject.title}: {geometry(surface)}" for surface in landscape.surfaces],
        survey=landscape,
    )
