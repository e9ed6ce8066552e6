"""Gate statistics as tables and figures: histograms by depth and domain, and mean gates by layer and projection."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gaintune.analysis.base import Headline, Result, Subject
from gaintune.analysis.drawing import color_bar, drawn, framed_by_nothing, legend, ruled
from gaintune.analysis.gates.statistics import (
    BLOCKS,
    CLOSED,
    EVERY,
    OPEN,
    GateRecord,
    GateSummary,
    Group,
    LayerGates,
    apart_table,
    compared,
    row_table,
    select,
    summarise,
)
from gaintune.analysis.gates.survey import GateSurvey
from gaintune.analysis.positions import DEPTHS
from gaintune.progress import plural
from gaintune.report import MUTED, SHADE, look, markdown_table
from gaintune.results import Interval, bare

NAMES = {"attention": "attention", "mlp": "MLP", EVERY: "all layers"}
COLOURS = colormaps["viridis"]
PLATE = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}  # keeps lines out of the letters
SHOWN_BINS = 50  # bars of a drawn histogram, if the recorded bins can be put together so


def groups(record: GateRecord) -> Iterator[tuple[str, str, str, GateSummary]]:
    """Domain, depth third and block ("all" included), and the figures of those gates; empty groups are left out."""
    for domain, layers in record.domains.items():
        depths = dict.fromkeys(each.position.depth for each in layers)
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


def summary_table(survey: GateSurvey) -> pd.DataFrame:
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
                place = {"layer": each.position.layer, "depth": each.position.depth, "block": each.position.block}
                named = {**place, "projection": each.position.projection, "part": EVERY if part is None else part}
                rows.append(
                    {"domain": domain, **named, **_figures(summarise([each], part)), "module": each.position.name}
                )
    return pd.DataFrame(rows)


def markdown(survey: GateSurvey) -> str:
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


def _origin(survey: GateSurvey) -> str:
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


def record_values(survey: GateSurvey) -> dict[str, Any]:
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
            {"domain": domain, **asdict(each.position), **plain(summarise([each]))}
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
    ruled(axes, which="both")


@drawn
def histograms(survey: GateSurvey) -> Figure:
    """Densities of gate values: depth thirds across, attention and MLP down, domains as lines."""
    record = survey.record
    positions = [each.position for layers in record.domains.values() for each in layers]
    depths = [depth for depth in (*DEPTHS, "outside") if any(each.depth == depth for each in positions)]
    blocks = [block for block in BLOCKS if any(each.block == block for each in positions)]
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
    legend(sheet, [f"{domain} ({survey.counted[domain]} tokens)" for domain in record.domains], 3, linewidth=1.4)
    sheet.supxlabel("gate value", fontsize=9, color=MUTED)
    sheet.supylabel("density (log scale)", fontsize=9, color=MUTED)
    return sheet


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


@drawn
def heatmap(survey: GateSurvey) -> Figure:
    """Mean gate by layer (across) and projection (down), a panel for each domain, one colour scale."""
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
        axes.set_title(f"{domain} ({survey.counted[domain]} tokens)", loc="left")
        framed_by_nothing(axes)
    rows[-1].set_xlabel("transformer layer")
    bar = color_bar(sheet, ScalarMappable(scale, COLOURS), list(rows), "mean gate", shrink=0.9, aspect=25, pad=0.02)
    bar.locator = MaxNLocator(5)
    bar.update_ticks()
    return sheet


def _every(count: int) -> int:
    """How many layers lie between two labels."""
    return 1 if count <= 16 else 2 if count <= 40 else 5


def _means(layers: tuple[LayerGates, ...]) -> tuple[list[str], list[int], np.ndarray]:
    """Projections, layer indices, and the mean gate of each `(projections, layers)`, NaN where there is none."""
    inside = [each for each in layers if each.position.layer is not None]
    projections = list(dict.fromkeys(each.position.projection for each in inside))
    numbers = sorted({each.position.layer for each in inside if each.position.layer is not None})
    values = np.full((len(projections), len(numbers)), np.nan)
    for row, projection in enumerate(projections):
        for column, number in enumerate(numbers):
            chosen = [
                each for each in inside if (each.position.projection, each.position.layer) == (projection, number)
            ]
            if chosen:
                values[row, column] = summarise(chosen).mean
    return projections, numbers, values


def _numbers(record: GateRecord, apart: Mapping[tuple[Group, Group], Interval]) -> dict[str, Interval]:
    numbers: dict[str, Interval] = {}
    for domain, depth, block, one in groups(record):
        name = f"{domain}.{depth}" if block == EVERY else f"{domain}.{depth}.{block}"
        numbers[f"{name}.mean"] = bare(one.mean)
    for domain, projection, one in _projections(record):
        numbers[f"{domain}.{projection}.mean"] = bare(one.mean)
    for (one, other), difference in apart.items():
        if one.domain == other.domain:
            name = f"{one.domain}.{one.part}-minus-{other.part}"
        else:
            name = ".".join([f"{one.domain}-minus-{other.domain}", *(each for each in one[1:] if each != EVERY)])
        numbers[f"{name}.mean"] = difference
    return numbers


def _projections(record: GateRecord) -> Iterator[tuple[str, str, GateSummary]]:
    for domain, layers in record.domains.items():
        for projection in dict.fromkeys(layer.position.projection for layer in layers):
            chosen = [layer for layer in layers if layer.position.projection == projection]
            yield domain, projection, summarise(chosen)


def _cells(one: GateSummary) -> list[str]:
    return [f"{one.mean:.4f}", f"{one.deviation:.4f}", f"{100 * one.closed:.1f} %"]


def result(survey: GateSurvey, subject: Subject, *_: Any) -> Result:
    """Put the survey together.

    Numbers: `DOMAIN.DEPTH.mean` and `DOMAIN.PROJECTION.mean`; with intervals over rows of text `A-minus-B.mean`,
    `.DEPTH.mean`, `.DEPTH.BLOCK.mean` and `.PROJECTION.mean` of two domains, and on one
    `DOMAIN.PROJECTION-minus-PROJECTION.mean` and `DOMAIN.mlp-minus-attention.mean`.
    """
    record = survey.record
    apart = compared(record, survey.plan.evaluate)
    found = list(groups(record))
    shown = {f"{domain}, {depth}, {block}": _cells(one) for domain, depth, block, one in found}
    shown |= {f"{domain}, {projection}": _cells(one) for domain, projection, one in _projections(record)}
    page = pd.DataFrame.from_dict(shown, orient="index", columns=["Mean", "SD", "Below 0.05"])
    rows = [[domain, depth, block, *_cells(one), f"{100 * one.open:.1f} %"] for domain, depth, block, one in found]
    heads = ["domain", "depth", "block", "mean gate", "sd", "below 0.05", "0.5 and above"]
    return Result(
        headline=Headline(heads, rows, numeric=3),
        tables={
            "gates": summary_table(survey),
            "gates-layers": layer_table(record),
            "gates-apart": apart_table(apart),
            "gates-rows": row_table(record),
        },
        markdown=markdown(survey),
        record=record_values(survey),
        figures={"gate-histograms": histograms(survey), "gate-heatmap": heatmap(survey)},
        numbers=_numbers(record, apart),
        shown={f"Gates of {subject.title}, from 0 (shut) to 1 (open)": page},
    )
