"""Gate statistics as tables and figures: histograms by depth and domain, and mean gates by layer and projection."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from gaintune.analysis.gates.apart import apart_table, row_table
from gaintune.analysis.gates.statistics import (
    CLOSED,
    EVERY,
    OPEN,
    GateRecord,
    GateSummary,
    LayerGates,
    select,
    summarise,
)
from gaintune.analysis.gates.survey import Survey
from gaintune.analysis.places import DEPTHS
from gaintune.progress import plural
from gaintune.report import MUTED, RULE, SHADE, figure_files, look, markdown_table, styled
from gaintune.storage import write_bytes, write_json, write_text

BLOCKS = ("attention", "mlp")
NAMES = {"attention": "attention", "mlp": "MLP", EVERY: "all layers"}
COLOURS = colormaps["viridis"]
PLATE = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}  # keeps lines out of the letters
SHOWN_BINS = 50  # bars of a drawn histogram, if the recorded bins can be put together so


def groups(record: GateRecord) -> Iterator[tuple[str, str, str, GateSummary]]:
    """Domain, depth third and block ("all" included), and the figures of those gates; empty groups are left out."""
    for domain, layers in record.domains.items():
        depths = dict.fromkeys(each.place.depth for each in layers)
        for depth in (EVERY, *sorted(depths, key=[*DEPTHS, "outside"].index)):
            for block in (EVERY, *BLOCKS):
                chosen = select(layers, depth, block)
                if chosen:
                    yield domain, depth, block, summarise(chosen)


def _figures(summary: GateSummary) -> dict[str, float]:
    return {
        "values": summary.values,
        "mean": summary.mean,
        "deviation": summary.deviation,
        f"share_below_{CLOSED:g}": summary.closed,
        f"share_from_{OPEN:g}": summary.open,
    }


def summary_table(survey: Survey) -> pd.DataFrame:
    """One row for each domain, depth third and block, "all" included."""
    return pd.DataFrame(
        [
            {"domain": domain, "tokens": survey.counted[domain], "depth": depth, "block": block, **_figures(summary)}
            for domain, depth, block, summary in groups(survey.record)
        ]
    )


def layer_table(record: GateRecord) -> pd.DataFrame:
    """One row for each domain, layer, projection and rank part; part "all" is all of them together."""
    rows = []
    for domain, layers in record.domains.items():
        for each in layers:
            for part in (None, *range(len(each.total))):
                place = {"layer": each.place.layer, "depth": each.place.depth, "block": each.place.block}
                named = {**place, "projection": each.place.projection, "part": EVERY if part is None else part}
                rows.append({"domain": domain, **named, **_figures(summarise([each], part)), "module": each.place.name})
    return pd.DataFrame(rows)


def markdown(survey: Survey) -> str:
    """The summary as Markdown, with what was counted."""
    found = list(groups(survey.record))
    frame = pd.DataFrame(
        [
            [
                depth,
                NAMES[block],
                f"{one.mean:.4f}",
                f"{one.deviation:.4f}",
                f"{100 * one.closed:.2f} %",
                f"{100 * one.open:.2f} %",
                f"{one.values:,}",
            ]
            for _, depth, block, one in found
        ],
        index=[domain for domain, *_ in found],
        columns=["Depth", "Block", "Mean gate", "SD", f"Below {CLOSED:g}", f"{OPEN:g} and above", "Gate values"],
        dtype=object,
    )
    counted = "\n".join(
        f"- {domain}: {_tokens(layers):,} tokens ({survey.counted[domain]} tokens)"
        for domain, layers in survey.record.domains.items()
    )
    return f"Gate values over validation text. {_origin(survey)}\n\n{counted}\n\n{markdown_table(frame, 'Domain')}"


def _origin(survey: Survey) -> str:
    """One sentence of what was measured, and with what."""
    data, packages = survey.plan.data, survey.environment["packages"]
    named = [f"{name} {packages[name]}" for name in ("gaintune", "torch", "transformers", "peft") if name in packages]
    return (
        f"Adapter {survey.adapter} on {survey.plan.model.name} (fingerprint {survey.base_fingerprint[:12]}), up to "
        f"{data.validation_tokens:,} tokens a domain in blocks of {data.block_size}, template {data.template}, "
        f"data.seed {data.seed}; {', '.join(named)}; {survey.environment['processor']}, "
        f"{survey.environment['device']}, {plural(survey.environment['threads'], 'thread')}."
    )


def _tokens(layers: tuple[LayerGates, ...]) -> int:
    return max((each.tokens for each in layers), default=0)


def record_values(survey: Survey) -> dict[str, Any]:
    """Everything as plain values for JSON: what was measured, and figures and histograms by group, and by layer."""

    def plain(summary: GateSummary) -> dict[str, Any]:
        return {**_figures(summary), "histogram": summary.histogram.tolist()}

    record = survey.record
    return {
        "adapter": str(survey.adapter),
        "base_fingerprint": survey.base_fingerprint,
        "plan": survey.plan.model_dump(mode="json", include={"model", "data", "evaluate"}),
        "environment": dict(survey.environment),
        "counted": survey.counted,
        "tokens": {domain: _tokens(layers) for domain, layers in record.domains.items()},
        "groups": [
            {"domain": domain, "depth": depth, "block": block, **plain(summary)}
            for domain, depth, block, summary in groups(record)
        ],
        "layers": [
            {"domain": domain, **asdict(each.place), **plain(summarise([each]))}
            for domain, layers in record.domains.items()
            for each in layers
        ],
    }


def _shown(histogram: np.ndarray) -> np.ndarray:
    """Density over [0, 1] (area 1), with bins put together to about fifty."""
    each = len(histogram) // SHOWN_BINS if len(histogram) % SHOWN_BINS == 0 else 1
    heights = histogram.reshape(-1, max(each, 1)).sum(axis=1)
    return heights * len(heights) / heights.sum()


def _histogram(axes: Axes, record: GateRecord, depth: str, block: str, lowest: float) -> None:
    """One panel: the density of gate values, a line for each domain, with its mean written beside."""
    for index, layers in enumerate(record.domains.values()):
        chosen = select(layers, depth, block)
        if not chosen:
            continue
        style, summary = look(index), summarise(chosen)
        density = np.maximum(_shown(summary.histogram), lowest)  # an empty bin sits on the floor of the log axis
        edges = np.linspace(0, 1, len(density) + 1)
        axes.stairs(density, edges, baseline=None, color=style.colour, linestyle=style.dashes, linewidth=1.4)
        place = {"xytext": (-3, -4 - 11 * index), "textcoords": "offset points", "ha": "right", "va": "top"}
        text = f"mean {summary.mean:.3f}"
        axes.annotate(text, (1, 1), xycoords="axes fraction", color=style.colour, fontsize=8, bbox=PLATE, **place)
    axes.set_yscale("log")
    axes.set_xlim(0, 1)
    axes.grid(axis="y", color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, which="both")


def histograms(survey: Survey) -> Figure:
    """Densities of gate values: depth thirds across, attention and MLP down, domains as lines."""

    def draw() -> Figure:
        record = survey.record
        places = [each.place for layers in record.domains.values() for each in layers]
        depths = [depth for depth in (*DEPTHS, "outside") if any(place.depth == depth for place in places)]
        blocks = [block for block in BLOCKS if any(place.block == block for place in places)]
        lowest = 0.5 * _smallest_density(record, depths, blocks)
        sheet = Figure(figsize=(1.2 + 2.6 * len(depths), 0.9 + 2.1 * len(blocks)), layout="constrained")
        grid = sheet.subplots(len(blocks), len(depths), squeeze=False, sharex=True, sharey=True)
        for row, block in enumerate(blocks):
            for column, depth in enumerate(depths):
                axes = grid[row, column]
                _histogram(axes, record, depth, block, lowest)
                axes.set_title(f"{depth}, {NAMES[block]}", loc="left")
        grid[0, 0].set_ylim(lowest, 8 * grid[0, 0].get_ylim()[1])  # room for the means
        grid[0, 0].yaxis.set_major_formatter("{x:g}")  # mathematics is off in labels
        grid[0, 0].set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "", "0.5", "", "1"])
        handles = []
        for style, domain in zip(map(look, range(len(record.domains))), record.domains, strict=True):
            label = f"{domain} ({survey.counted[domain]} tokens)"
            handles.append(Line2D([], [], color=style.colour, linestyle=style.dashes, linewidth=1.4, label=label))
        columns = min(len(handles), 3)
        sheet.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False, handlelength=3)
        sheet.supxlabel("gate value", fontsize=9, color=MUTED)
        sheet.supylabel("density (log scale)", fontsize=9, color=MUTED)
        return sheet

    return styled(draw)


def _smallest_density(record: GateRecord, depths: list[str], blocks: list[str]) -> float:
    """The smallest density above 0 in any panel."""
    found = [
        _shown(summarise(chosen).histogram)
        for layers in record.domains.values()
        for depth in depths
        for block in blocks
        if (chosen := select(layers, depth, block))
    ]
    return float(min(density[density > 0].min() for density in found))


def heatmap(survey: Survey) -> Figure:
    """Mean gate by layer (across) and projection (down), a panel for each domain, one colour scale."""

    def draw() -> Figure:
        record = survey.record
        grids = {domain: _means(layers) for domain, layers in record.domains.items()}
        highest = max(float(np.nanmax(values)) for _, _, values in grids.values())
        projections, numbers, _ = next(iter(grids.values()))
        size = (max(2.0 + 0.24 * len(numbers), 5.5), 0.9 + len(grids) * (0.65 + 0.24 * len(projections)))
        sheet = Figure(figsize=size, layout="constrained")
        rows = sheet.subplots(len(grids), 1, squeeze=False, sharex=True)[:, 0]
        scale = Normalize(0, highest)
        for axes, (domain, (names, layers, values)) in zip(rows, grids.items(), strict=True):
            axes.set_facecolor(SHADE)
            axes.pcolormesh(values, cmap=COLOURS, norm=scale, edgecolors="white", linewidth=0.8)
            axes.set_yticks(np.arange(len(names)) + 0.5, names)
            axes.set_xticks(np.arange(len(layers))[:: _every(len(layers))] + 0.5, layers[:: _every(len(layers))])
            axes.invert_yaxis()
            axes.tick_params(length=0)
            axes.set_title(f"{domain} ({survey.counted[domain]} tokens)", loc="left")
            for spine in axes.spines.values():
                spine.set_visible(False)
        rows[-1].set_xlabel("transformer layer")
        bar = sheet.colorbar(ScalarMappable(scale, COLOURS), ax=list(rows), shrink=0.9, aspect=25, pad=0.02)
        bar.outline.set_visible(False)  # type: ignore[operator]
        bar.ax.tick_params(length=0)
        bar.locator = MaxNLocator(5)
        bar.update_ticks()
        bar.set_label("mean gate", color=MUTED)
        return sheet

    return styled(draw)


def _every(count: int) -> int:
    """How many layers lie between two labels."""
    return 1 if count <= 16 else 2 if count <= 40 else 5


def _means(layers: tuple[LayerGates, ...]) -> tuple[list[str], list[int], np.ndarray]:
    """Projections, layer indices, and the mean gate of each `(projections, layers)`, NaN where there is none."""
    inside = [each for each in layers if each.place.layer is not None]
    projections = list(dict.fromkeys(each.place.projection for each in inside))
    numbers = sorted({each.place.layer for each in inside if each.place.layer is not None})
    values = np.full((len(projections), len(numbers)), np.nan)
    for row, projection in enumerate(projections):
        for column, number in enumerate(numbers):
            chosen = [each for each in inside if (each.place.projection, each.place.layer) == (projection, number)]
            if chosen:
                values[row, column] = summarise(chosen).mean
    return projections, numbers, values


def write(survey: Survey, folder: Path) -> None:
    """Write gates.csv, .md and .json, gates-layers, gates-apart and gates-rows.csv, and two figures into a folder."""
    write_text(folder / "gates.csv", summary_table(survey).to_csv(index=False, lineterminator="\n"))
    write_text(folder / "gates-layers.csv", layer_table(survey.record).to_csv(index=False, lineterminator="\n"))
    apart = apart_table(survey.record, survey.plan.evaluate)
    write_text(folder / "gates-apart.csv", apart.to_csv(index=False, lineterminator="\n"))
    write_text(folder / "gates-rows.csv", row_table(survey.record).to_csv(index=False, lineterminator="\n"))
    write_text(folder / "gates.md", markdown(survey))
    write_json(folder / "gates.json", record_values(survey))
    drawn = {
        **figure_files("gate-histograms", histograms(survey)),
        **figure_files("gate-heatmap", heatmap(survey)),
    }
    for name, content in drawn.items():
        write_bytes(folder / name, content)
