"""Gates as tables and figures: histograms by depth and domain, and mean gates by layer and projection."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
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
from gaintune.analysis.drawing import drawn, layer_cells, legend, line, text_frame, text_table
from gaintune.analysis.gates import CLOSED, OPEN
from gaintune.analysis.gates.survey import (
    ALL,
    BLOCKS,
    GateRecord,
    GateSummary,
    GateSurvey,
    Group,
    LayerGates,
    compared,
    levels,
    projections_of,
    row_sums,
    select,
    summarize,
)
from gaintune.analysis.positions import DEPTHS
from gaintune.config import EvaluateConfig
from gaintune.progress import plural
from gaintune.report import MUTED, color_bar, ruled
from gaintune.results import Interval, bare, in_percent

NAMES = {"attention": "attention", "mlp": "MLP", ALL: "all layers"}
HEADS = ("domain", "depth", "block", "mean gate", "sd", f"below {CLOSED:g}", f"{OPEN:g} and above")
WHERE = (*DEPTHS, "outside")
COLORS = colormaps["viridis"]
PLATE = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}  # keeps lines out of the letters
SHOWN_BINS = 50  # bars of a drawn histogram, if the recorded bins can be merged to that many
Groups = Sequence[tuple[str, str, str, GateSummary]]
"""Domain, depth third and block ("all" included), and the figures of those gates."""


def groups_of(record: GateRecord) -> Groups:
    """Summarize every domain, depth third and block that has gates, "all" included."""
    return [
        (domain, depth, block, summarize(chosen))
        for domain, layers in record.domains.items()
        for depth in (ALL, *WHERE)
        for block in (ALL, *BLOCKS)
        if (chosen := select(layers, depth, block))
    ]


def _projections(record: GateRecord) -> Iterator[tuple[str, str, GateSummary]]:
    for domain, layers in record.domains.items():
        for projection in projections_of(layers):
            yield domain, projection, summarize([each for each in layers if each.position.projection == projection])


def _figures(summary: GateSummary) -> dict[str, float]:
    shares = {f"share_below_{CLOSED:g}": summary.closed, f"share_from_{OPEN:g}": summary.open}
    return {"values": summary.values, "mean": summary.mean, "deviation": summary.deviation, **shares}


def _cells(summary: GateSummary, digits: int = 1) -> list[str]:
    """Write mean, standard deviation, and the shares below 0.05 and from 0.5 up."""
    shares = [f"{100 * share:.{digits}f} %" for share in (summary.closed, summary.open)]
    return [f"{summary.mean:.4f}", f"{summary.deviation:.4f}", *shares]


def layer_table(record: GateRecord) -> pd.DataFrame:
    """Return a row for each domain, layer, projection and rank part; part "all" is all of them together."""
    rows = []
    for domain, layers in record.domains.items():
        for each in layers:
            at = each.position
            position = {"domain": domain, "layer": at.layer, "depth": at.depth, "block": at.block}
            for part in (None, *range(len(each.total))):
                named = {**position, "projection": at.projection, "part": ALL if part is None else part}
                rows.append({**named, **_figures(summarize([each], part)), "module": at.name})
    return pd.DataFrame(rows)


def apart_table(differences: Mapping[tuple[Group, Group], Interval]) -> pd.DataFrame:
    """Return a row for each of `compared`: two groups, and the mean gate of the first less that of the second."""
    columns = [f"{side}{name}" for side in ("", "less_") for name in Group._fields]
    rows = [[*one, *other, each.value, each.low, each.high] for (one, other), each in differences.items()]
    return pd.DataFrame(rows, columns=[*columns, "difference", "low", "high"])


def row_table(record: GateRecord) -> pd.DataFrame:
    """Return the mean gate of each row of text with a counted token, by domain, depth third and projection."""
    rows = []
    for domain, layers in record.domains.items():
        for depth, projection in dict.fromkeys((each.position.depth, each.position.projection) for each in layers):
            totals, values = row_sums(record, [Group(domain, depth, projection)])
            for row in np.flatnonzero(values[0]):
                rows.append([domain, int(row), depth, projection, int(values[0, row]), totals[0, row] / values[0, row]])
    return pd.DataFrame(rows, columns=["domain", "row", "depth", "projection", "values", "mean"])


def markdown(survey: GateSurvey, groups: Groups) -> str:
    """Return the summary as Markdown, with what was counted."""
    data, packages = survey.plan.data, survey.environment["packages"]
    named = [f"{name} {packages[name]}" for name in ("gaintune", "torch", "transformers", "peft") if name in packages]
    origin = (
        f"Adapter {survey.adapter} on {survey.plan.model.name} (fingerprint {survey.base_fingerprint[:12]}), up to "
        f"{data.validation_tokens:,} tokens a domain in blocks of {data.block_size}, template {data.template}, "
        f"data.seed {data.seed}; {', '.join(named)}; {survey.environment['processor']}, "
        f"{survey.environment['device']}, {plural(survey.environment['threads'], 'thread')}."
    )
    tokens, of = _tokens(survey.record), survey.counted
    counted = "\n".join(f"- {domain}: {count:,} tokens ({of[domain]} tokens)" for domain, count in tokens.items())
    rows = [[domain, depth, NAMES[block], *_cells(one, 2), f"{one.values:,}"] for domain, depth, block, one in groups]
    heads = ["domain", "depth", "block", "mean gate", "SD", *HEADS[-2:], "gate values"]
    return f"Gate values over validation text. {origin}\n\n{counted}\n\n{text_table(heads, rows)}"


def _tokens(record: GateRecord) -> dict[str, int]:
    """Return how many tokens counted in each domain."""
    return {domain: max((each.tokens for each in layers), default=0) for domain, layers in record.domains.items()}


def record_values(survey: GateSurvey, groups: Groups) -> dict[str, Any]:
    """Return everything as plain values for JSON: origin, and figures and histograms by group and by layer."""

    def plain(summary: GateSummary) -> dict[str, Any]:
        return {**_figures(summary), "histogram": summary.histogram.tolist()}

    named = [({"domain": domain, "depth": depth, "block": block}, one) for domain, depth, block, one in groups]
    layers = [(domain, layer) for domain, own in survey.record.domains.items() for layer in own]
    return {
        "adapter": str(survey.adapter),
        "base_fingerprint": survey.base_fingerprint,
        "plan": survey.plan.model_dump(mode="json", include={"model", "data", "evaluate"}),
        "environment": dict(survey.environment),
        "counted": survey.counted,
        "tokens": _tokens(survey.record),
        "groups": [{**names, **plain(one)} for names, one in named],
        "layers": [{"domain": domain, **asdict(one.position), **plain(summarize([one]))} for domain, one in layers],
    }


def _density(summary: GateSummary) -> np.ndarray:
    """Return the density over [0, 1] (area 1), with bins merged to about fifty."""
    histogram = summary.histogram
    merged = len(histogram) // SHOWN_BINS if len(histogram) % SHOWN_BINS == 0 else 1
    heights = histogram.reshape(-1, max(merged, 1)).sum(axis=1)
    return heights * len(heights) / heights.sum()


def _histogram(axes: Axes, summaries: Mapping[int, GateSummary], lowest: float) -> None:
    """Draw the density of gate values, a line for each domain, with its mean written beside."""
    for index, summary in summaries.items():
        style = line(index, marked=False)
        density = np.maximum(_density(summary), lowest)  # an empty bin sits on the floor of the log axis
        axes.stairs(density, np.linspace(0, 1, len(density) + 1), baseline=None, linewidth=1.4, **style)
        axes.annotate(
            f"mean {summary.mean:.3f}", (1, 1), (-3, -4 - 11 * index), "axes fraction", "offset points",
            ha="right", va="top", color=style["color"], fontsize=8, bbox=PLATE,
        )  # fmt: skip
    axes.set_yscale("log")
    axes.set_xlim(0, 1)
    ruled(axes, which="both")


@drawn
def histograms(survey: GateSurvey) -> Figure:
    """Draw densities of gate values: depth thirds across, attention and MLP down, domains as lines."""
    domains = survey.record.domains
    layers = [each for of_domain in domains.values() for each in of_domain]
    depths = [depth for depth in WHERE if select(layers, depth)]
    blocks = [block for block in BLOCKS if select(layers, part=block)]
    shown = {}
    for block, depth in itertools.product(blocks, depths):
        chosen = {index: select(of_domain, depth, block) for index, of_domain in enumerate(domains.values())}
        shown[block, depth] = {index: summarize(own) for index, own in chosen.items() if own}
    densities = np.concatenate([_density(one) for summaries in shown.values() for one in summaries.values()])
    lowest = 0.5 * float(densities[densities > 0].min())
    sheet = Figure(figsize=(1.2 + 2.6 * len(depths), 0.9 + 2.1 * len(blocks)), layout="constrained")
    grid = sheet.subplots(len(blocks), len(depths), squeeze=False, sharex=True, sharey=True)
    for axes, ((block, depth), summaries) in zip(grid.flat, shown.items(), strict=True):
        _histogram(axes, summaries, lowest)
        axes.set_title(f"{depth}, {NAMES[block]}", loc="left")
    grid[0, 0].set_ylim(lowest, 8 * grid[0, 0].get_ylim()[1])  # room for the means
    grid[0, 0].yaxis.set_major_formatter("{x:g}")  # mathematics is off in labels
    grid[0, 0].set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "", "0.5", "", "1"])
    legend(sheet, [f"{domain} ({survey.counted[domain]} tokens)" for domain in domains], 3, linewidth=1.4)
    sheet.supxlabel("gate value", fontsize=9, color=MUTED)
    sheet.supylabel("density (log scale)", fontsize=9, color=MUTED)
    return sheet


@drawn
def heatmap(survey: GateSurvey) -> Figure:
    """Draw the mean gate by layer (across) and projection (down), a panel for each domain, one color scale."""
    grids = {domain: _means(layers) for domain, layers in survey.record.domains.items()}
    projections, layers, _ = next(iter(grids.values()))
    size = (max(2.0 + 0.24 * len(layers), 5.5), 0.9 + len(grids) * (0.65 + 0.24 * len(projections)))
    sheet = Figure(figsize=size, layout="constrained")
    rows = sheet.subplots(len(grids), 1, squeeze=False, sharex=True)[:, 0]
    scale = Normalize(0, max(float(np.nanmax(values)) for _, _, values in grids.values()))
    for axes, (domain, (names, layers, values)) in zip(rows, grids.items(), strict=True):
        every = 1 if len(layers) <= 16 else 2 if len(layers) <= 40 else 5
        layer_cells(axes, values, names, layers, every, cmap=COLORS, norm=scale, linewidth=0.8)
        axes.set_title(f"{domain} ({survey.counted[domain]} tokens)", loc="left")
    rows[-1].set_xlabel("transformer layer")
    bar = color_bar(sheet, ScalarMappable(scale, COLORS), list(rows), "mean gate", shrink=0.9, aspect=25, pad=0.02)
    bar.locator = MaxNLocator(5)
    bar.update_ticks()
    return sheet


def _means(layers: Sequence[LayerGates]) -> tuple[list[str], list[int], np.ndarray]:
    """Return projections, layer indices, and mean gates `(projections, layers)`, NaN where there is none."""
    inside: dict[tuple[str, int], list[LayerGates]] = {}
    for each in layers:
        if each.position.layer is not None:
            inside.setdefault((each.position.projection, each.position.layer), []).append(each)
    means: Any = pd.Series({cell: summarize(chosen).mean for cell, chosen in inside.items()})
    means = means.unstack(sort=False).sort_index(axis=1)
    return list(means.index), list(means.columns), means.to_numpy(float)


def _numbers(
    record: GateRecord, settings: EvaluateConfig, groups: Groups, apart: Mapping[tuple[Group, Group], Interval]
) -> dict[str, Interval]:
    numbers: dict[str, Interval] = {}
    measured = levels(record, settings, [Group(domain, depth, block) for domain, depth, block, _ in groups])
    for domain, depth, block, one in groups:
        name = f"{domain}.{depth}" if block == ALL else f"{domain}.{depth}.{block}"
        numbers[f"{name}.mean"] = replace(measured[Group(domain, depth, block)], value=one.mean)
    for (one, other), share in compared(record, settings, _domains_apart(record), "open").items():
        numbers[f"{one.domain}-minus-{other.domain}.open"] = in_percent(share)
    for domain, projection, one in _projections(record):
        numbers[f"{domain}.{projection}.mean"] = bare(one.mean)
    for (one, other), difference in apart.items():
        if one.domain == other.domain:
            first, second = next(pair for pair in zip(one[1:], other[1:], strict=True) if pair[0] != pair[1])
            name = f"{one.domain}.{first}-minus-{second}"
        else:
            name = ".".join([f"{one.domain}-minus-{other.domain}", *(each for each in one[1:] if each != ALL)])
        numbers[f"{name}.mean"] = difference
    return numbers


def _domains_apart(record: GateRecord) -> list[tuple[Group, Group]]:
    return [(Group(one), Group(other)) for one, other in itertools.permutations(record.domains, 2)]


def result(survey: GateSurvey, subject: Subject, *_: Any) -> Result:
    """Make the result.

    Numbers: `DOMAIN.PROJECTION.mean`; with intervals over rows of text `DOMAIN.DEPTH.mean` and `.DEPTH.BLOCK.mean`;
    `A-minus-B.mean`, `.DEPTH.mean`, `.DEPTH.BLOCK.mean` and `.PROJECTION.mean` of two domains, and `A-minus-B.open`, of
    their shares of gates from 0.5 up, in points of %; on one domain `DOMAIN.PROJECTION-minus-PROJECTION.mean`,
    `DOMAIN.mlp-minus-attention.mean` and `DOMAIN.DEPTH-minus-DEPTH.mean`.
    """
    record, groups = survey.record, groups_of(survey.record)
    apart = compared(record, survey.plan.evaluate)
    summary = [
        {"domain": domain, "tokens": survey.counted[domain], "depth": depth, "block": block, **_figures(one)}
        for domain, depth, block, one in groups
    ]
    page = [[f"{domain}, {depth}, {block}", *_cells(one)[:3]] for domain, depth, block, one in groups]
    page += [[f"{domain}, {projection}", *_cells(one)[:3]] for domain, projection, one in _projections(record)]
    rows = [[domain, depth, block, *_cells(one)] for domain, depth, block, one in groups]
    return Result(
        headline=Headline(HEADS, rows, numeric=3),
        tables={
            "gates": pd.DataFrame(summary),
            "gates-layers": layer_table(record),
            "gates-apart": apart_table(apart),
            "gates-rows": row_table(record),
        },
        markdown=markdown(survey, groups),
        record=record_values(survey, groups),
        figures={"gate-histograms": histograms(survey), "gate-heatmap": heatmap(survey)},
        numbers=_numbers(record, survey.plan.evaluate, groups, apart),
        shown={
            f"Gates of {subject.title}, from 0 (shut) to 1 (open)": text_frame(["", "mean", "SD", "below 0.05"], page)
        },
    )
