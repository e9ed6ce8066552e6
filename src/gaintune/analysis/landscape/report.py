"""Loss landscapes as tables and figures: curves from pretrained to adapted, and heatmaps of planes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize, to_hex
from matplotlib.figure import Figure

from gaintune.analysis.base import Headline, Numbers, Result, Subject
from gaintune.analysis.drawing import color_bar, drawn, ends, framed_by_nothing, legend, panels, ruled, with_ends
from gaintune.analysis.landscape.directions import WAYS
from gaintune.analysis.landscape.statistics import DomainFigures, Surface, range_apart
from gaintune.analysis.landscape.survey import Landscape
from gaintune.report import (
    INK,
    LARGEST_LIMIT,
    MUTED,
    NONE,
    RULE,
    SMALLEST_LIMIT,
    diverging,
    ink_on,
    look,
    markdown_table,
    signed,
    with_interval,
)
from gaintune.results import Interval, exact

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
    return with_ends(figure, ".4f")


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
        columns = ([one.value for one in changes], *ends(changes))
        values, lows, highs = ([base * (1 + value / 100) for value in column] for column in columns)
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
    ruled(axes)


def _ticks(low: float, high: float) -> list[float]:
    """A few round perplexities between two: multiples on a wide range, an even grid on a narrow one."""
    if high / low < 3:
        step = 10.0 ** np.floor(np.log10((high - low) / 5))
        step *= next(k for k in (1, 2, 5, 10) if (high - low) / (k * step) <= 6)
        return [float(tick) for tick in np.arange(np.ceil(low / step), high / step) * step]
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    choices = [[m * 10.0**d for d in decades for m in part if low <= m * 10.0**d <= high] for part in TICKS]
    return next((ticks for ticks in choices if len(ticks) <= 7), choices[-1])


def _columns(domains: Sequence[str]) -> int:
    return 2 if len(domains) == 4 else min(len(domains), 3)


@drawn
def line_figure(found: Landscape) -> Figure:
    """Perplexity along the lines, a panel for each domain (GAIN paper, Figure 3)."""
    domains = found.lines[0].domains
    sheet, grid = panels(
        len(domains), _columns(domains), lambda rows, columns: (1.0 + 2.9 * columns, 0.9 + 2.4 * rows), sharex=True
    )
    for domain, axes in zip(domains, grid, strict=True):
        _curve(axes, found, domain)
    grid[0].set_xticks([0, 0.5, 1], ["0\npretrained", "0.5", "1\nadapted"])
    for axes in grid:
        axes.tick_params(labelbottom=True)
    legend(sheet, [line.labels[0] for line in found.lines], 2, marked=True)
    sheet.supylabel("perplexity (log scale)", fontsize=9, color=MUTED)
    return sheet


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
    framed_by_nothing(axes)
    axes.set_title(domain, loc="left")


@drawn
def plane_figure(plane: Surface) -> Figure:
    """Change of perplexity over the plane, a panel for each domain, one colour scale (GAIN paper, Figure 4)."""
    domains, steps = plane.domains, len({point.place[0] for point in plane.points})
    side = max(0.44 * steps, 2.2) + 0.4
    sheet, grid = panels(
        len(domains), _columns(domains), lambda rows, columns: (1.6 + side * columns, 0.6 + side * rows)
    )
    largest = max(abs(plane.change(point, domain).value) for point in plane.points for domain in domains)
    limit = min(max(5.0 * np.ceil(largest / 5.0), SMALLEST_LIMIT), LARGEST_LIMIT)
    scale, colours = Normalize(-limit, limit, clip=True), diverging()
    for domain, axes in zip(domains, grid, strict=True):
        _plate(axes, plane, domain, colours, scale)
    mapped = ScalarMappable(Normalize(-limit, limit), colours)
    extend = "both" if largest > limit else "neither"
    color_bar(sheet, mapped, sheet.axes, "change of perplexity, %", shrink=0.8, extend=extend)
    sheet.supxlabel(f"toward {plane.labels[0]}", fontsize=9, color=INK)
    sheet.supylabel(f"toward {plane.labels[1]}", fontsize=9, color=INK)
    return sheet


NO_LENGTH = "a direction has no length"


def plane_numbers(found: Mapping[str, Landscape]) -> Numbers:
    """Return the numbers of every label's plane and of every two, and those that are not to be had, with the reasons.

    Numbers: `LABEL.cosine` of the two directions, `LABEL.DOMAIN.both` and `LABEL.DOMAIN.range`; of two labels
    `A-minus-B.cosine`, of the cosines without their signs, and `A-minus-B.DOMAIN.range`.
    """
    numbers: dict[str, Interval] = {}
    without: dict[str, str] = {}
    domains = next(iter(found.values())).lines[0].domains
    ranges = [f"{domain}.range" for domain in domains]
    planes = {
        label: one.plane or f"two adapters span a plane, and {label} has {len(one.lines)}"
        for label, one in found.items()
    }
    for label, plane in planes.items():
        if isinstance(plane, str):
            without |= {f"{label}.{name}": plane for name in ("cosine", *ranges, *(f"{each}.both" for each in domains))}
            continue
        if plane.geometry.cosine is None:
            without[f"{label}.cosine"] = NO_LENGTH
        else:
            numbers[f"{label}.cosine"] = exact(plane.geometry.cosine)
        for domain in domains:
            figure = plane.figures(domain)
            numbers |= {f"{label}.{domain}.both": figure.at_adapted[2], f"{label}.{domain}.range": figure.range}
    for (one, first), (other, second) in itertools.permutations(planes.items(), 2):
        name = f"{one}-minus-{other}"
        if isinstance(first, str) or isinstance(second, str):
            why = first if isinstance(first, str) else str(second)
            without |= {f"{name}.{figure}": why for figure in ("cosine", *ranges)}
            continue
        here, there = first.geometry.cosine, second.geometry.cosine
        if here is None or there is None:
            without[f"{name}.cosine"] = NO_LENGTH
        else:
            numbers[f"{name}.cosine"] = exact(abs(here) - abs(there))
        numbers |= {f"{name}.{domain}.range": range_apart(first, second, domain) for domain in domains}
    return numbers, without


def result(found: Landscape, subject: Subject, *_: Any) -> Result:
    """Put the survey together.

    Numbers: `DOMAIN.at-LEARNT`, change of perplexity in % at the adapter of LEARNT, and `LEARNT.barrier`, nats.
    """
    numbers: dict[str, Interval] = {}
    rows, shown = [], {}
    for line, learnt in zip(found.lines, subject.names or [line.labels[0] for line in found.lines], strict=True):
        for domain in line.domains:
            figure = line.figures(domain)
            at, lowest = figure.at_adapted[0], f"{figure.best[0]:g}"
            spread = [in_nats(figure.range), in_nats(figure.barrier)]
            numbers[f"{domain}.at-{learnt}"] = at
            if domain == learnt and figure.barrier is not None:
                numbers[f"{learnt}.barrier"] = figure.barrier
            rows.append([line.labels[0], domain, at, lowest, *spread])
            shown[f"{learnt}, {domain}"] = [with_interval(at), lowest, *spread]
    remarks = []
    if found.plane is not None:
        for domain in found.plane.domains:
            figure = found.plane.figures(domain)
            cells = [with_interval(figure.at_adapted[2]), NONE, in_nats(figure.range), NONE]
            shown[f"both (range of the plane), {domain}"] = cells
        cosine = found.plane.geometry.cosine
        remarks = [f"cosine of the two directions {'undefined' if cosine is None else format(cosine, '+.4f')}"]
    heads = ["At the adapted model, %", "Lowest at", "Range, nats", "Barrier, nats"]
    about = f"{subject.title}: learnt, measured; intervals over validation blocks"
    return Result(
        headline=Headline(
            ["adapter", "domain", "at the adapted model", "lowest at", "range, nats", "barrier, nats"], rows, numeric=2
        ),
        remarks=remarks,
        tables={"landscape": table(found)},
        markdown=markdown(found),
        record=found.to_dict(),
        provenance=found.provenance.to_dict(),
        figures={
            "landscape-lines": line_figure(found),
            "landscape-plane": None if found.plane is None else plane_figure(found.plane),
        },
        numbers=numbers,
        shown={about: pd.DataFrame.from_dict(shown, orient="index", columns=heads)},
        notes=[f"{subject.title}: {sentence}" for _, surface in surfaces(found) for sentence in geometry(surface)],
        survey=found,
    )
