"""Factors as tables and figures: range and share near 1 after every stage, and heatmaps of layer by stage."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gaintune.analysis.base import Headline, Result
from gaintune.analysis.drawing import drawn, layer_cells, line, text_frame, text_table
from gaintune.analysis.gains.survey import NEAR, FactorSequence, FactorSurvey, StageFactors
from gaintune.report import INK, RULE, color_bar, diverging, ruled
from gaintune.results import Interval, exact
from gaintune.storage import describe_environment

TIGHT = f"within [{NEAR[0]:g}, {NEAR[1]:g}]"
HEADS = ("after stage", "smallest", "largest", TIGHT, "at or below 0", "factors")
LARGEST_DISTANCE = 1.0  # a factor this far from 1 has the full color
LONGEST_LABEL = 26  # letters of a sequence's label in a heatmap's title
TITLES = {"smallest": "smallest", "largest": "largest", "near": f"share {TIGHT}"}  # of a heatmap's panels


def _stages(survey: FactorSurvey) -> Iterator[tuple[dict[str, Any], StageFactors]]:
    """Yield every stage with the columns that name it in tables."""
    for sequence in survey.sequences:
        for stage in sequence.stages:
            yield {"sequence": sequence.label, "stage": stage.index + 1, "domain": stage.domain}, stage


def stage_table(survey: FactorSurvey) -> pd.DataFrame:
    """Return a row for each sequence, stage and projection, and "all"; `near` is a share, stages count from 1."""
    return pd.DataFrame(
        [
            {**named, "projection": projection or "all", **asdict(stage.of(projection))}
            for named, stage in _stages(survey)
            for projection in (None, *stage.projections)
        ]
    )


def layer_table(survey: FactorSurvey) -> pd.DataFrame:
    """Return a row for each sequence, stage and module."""
    rows = []
    for named, stage in _stages(survey):
        for layer in stage.layers:
            at = layer.position
            position = {"layer": at.layer, "projection": at.projection}
            rows.append({**named, **position, **asdict(layer.figures), "module": at.name})
    return pd.DataFrame(rows)


def stage_cells(stage: StageFactors) -> list[str]:
    """Return a stage's figures as text, for `HEADS`."""
    one = stage.figures
    ends, near = [f"{one.smallest:.3f}", f"{one.largest:.3f}"], f"{100 * one.near:.1f} %"
    return [stage.name, *ends, near, f"{one.flipped:,}", f"{one.count:,}"]


def markdown(survey: FactorSurvey) -> str:
    """Return the table of appendix J for every sequence, with its regime."""
    parts = []
    for sequence in survey.sequences:
        stages = text_table(HEADS, [stage_cells(stage) for stage in sequence.stages])
        parts.append(f"{sequence.label}: {verdict(sequence)}.\n\n{stages}")
    if survey.left_out:
        parts.append(f"Without factors, and left out: {', '.join(survey.left_out)}.\n")
    return "\n".join(parts)


def verdict(sequence: FactorSequence) -> str:
    """Describe the regime, with what it rests on."""
    done, planned = len(sequence.stages), sequence.planned
    seen = f"{done} of {planned} stages" if done < planned else "one stage" if planned == 1 else f"all {planned} stages"
    regime = sequence.regime or "regime unknown, as not every stage before was looked at"
    stage = next((stage for stage in sequence.stages if stage.figures.flipped), None)
    if stage is None:
        return f"{regime}, every factor is positive after {seen}"
    first = "first" if sequence.regime else "seen"
    return f"{regime}, factors at or below 0, {first} after stage {stage.index + 1} ({stage.domain}), {seen} looked at"


def record_values(survey: FactorSurvey) -> dict[str, Any]:
    """Return everything as plain values for JSON."""

    def plain(stage: StageFactors) -> dict[str, Any]:
        return {
            "stage": stage.index + 1,
            "domain": stage.domain,
            "figures": asdict(stage.figures),
            "projections": {name: asdict(stage.of(name)) for name in stage.projections},
            "layers": [{**asdict(each.position), **asdict(each.figures)} for each in stage.layers],
        }

    sequences = [
        {"label": each.label, "planned": each.planned, "regime": each.regime, "stages": [*map(plain, each.stages)]}
        for each in survey.sequences
    ]
    return {"near": list(NEAR), "left_out": list(survey.left_out), "sequences": sequences}


@drawn
def heatmap(table: pd.DataFrame) -> Figure:
    """Draw smallest factor, largest factor and share near 1: layers across, stages down, a row for each projection.

    A dot marks the layers with a factor at or below 0. The table has the rows of `layer_table` inside layers.
    """
    shown = []
    for label, sequence in table.groupby("sequence", sort=False):
        stages, layers = sequence.drop_duplicates("stage"), sorted(set(sequence["layer"].astype(int)))
        name = str(label)
        name = name if len(name) <= LONGEST_LABEL else f"…{name[1 - LONGEST_LABEL :]}"  # a folder's end tells most
        for projection, own in sequence.groupby("projection", sort=False):
            shown.append((f"{name}, {projection}: smallest", stages, layers, own))
    heights = [0.75 + 0.2 * len(stages) for _, stages, _, _ in shown]
    width, longest = max(len(layers) for _, _, layers, _ in shown), max(len(title) for title, *_ in shown)
    size = (3 * max(2.9, 1.3 + 0.09 * width, 0.9 + 0.08 * longest), 0.9 + sum(heights))
    sheet = Figure(figsize=size, layout="constrained")
    grid = sheet.subplots(len(shown), 3, squeeze=False, gridspec_kw={"height_ratios": heights})
    factors = ScalarMappable(Normalize(1 - LARGEST_DISTANCE, 1 + LARGEST_DISTANCE, clip=True), diverging())
    shares = ScalarMappable(Normalize(0, 1), colormaps["viridis"])
    for row, (title, stages, layers, own) in zip(grid, shown, strict=True):
        names = [f"{number} {domain}" for number, domain in zip(stages["stage"], stages["domain"], strict=True)]
        every = 1 if len(layers) <= 8 else 5
        cells = own.pivot_table(index="stage", columns="layer", aggfunc="last").reindex(stages["stage"])
        for axes, (figure, other) in zip(row, TITLES.items(), strict=True):
            first, scale = figure == "smallest", shares if figure == "near" else factors
            values = cells[figure].reindex(columns=layers).to_numpy(float)
            style = {"cmap": scale.cmap, "norm": scale.norm, "linewidth": 0.4}
            layer_cells(axes, values, names if first else [""] * len(names), layers, every, **style)
            axes.tick_params(axis="y", labelcolor=INK)
            if first:
                flipped = np.argwhere(cells["flipped"].reindex(columns=layers).to_numpy(float) > 0) + 0.5
                axes.plot(flipped[:, 1], flipped[:, 0], linestyle="none", marker=".", markersize=4, color="white")
            axes.set_title(title if first else other, loc="left")
    for axes in grid[-1]:
        axes.set_xlabel("transformer layer")
    across: dict[str, Any] = {"orientation": "horizontal", "fraction": 0.05, "aspect": 30, "pad": 0.02}
    label = "factor (1 leaves the feature as it was; a dot marks a layer with one at or below 0)"
    color_bar(sheet, factors, list(grid[:, :2].flat), label, extend="both", **across)
    color_bar(sheet, shares, list(grid[:, 2].flat), f"share {TIGHT}", extend="neither", **across)
    return sheet


@drawn
def trajectory(survey: FactorSurvey) -> Figure:
    """Draw smallest and largest factor, and the share near 1, after every stage: a line for each sequence."""
    sheet = Figure(figsize=(8.6, 3.2), layout="constrained")
    left, right = sheet.subplots(1, 2)
    for index, sequence in enumerate(survey.sequences):
        stages, figures = [stage.index + 1 for stage in sequence.stages], [stage.figures for stage in sequence.stages]
        style = line(index, markersize=4, linewidth=1.5)
        left.plot(stages, [one.smallest for one in figures], label=sequence.label, **style)
        left.plot(stages, [one.largest for one in figures], **style)
        right.plot(stages, [100 * one.near for one in figures], **style)
    left.axhline(1, color=RULE, linewidth=0.9, zorder=0)
    left.axhline(0, color=INK, linewidth=0.9, zorder=0)
    low, high = left.get_ylim()
    left.set_ylim(min(low, -0.05), high)
    left.set_title("Smallest and largest factor", loc="left")
    right.set_title(f"Factors {TIGHT}, %", loc="left")
    right.set_ylim(0, 102)
    for axes in (left, right):
        axes.set_xlabel("after stage")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_xlim(0.7, max(stage.index + 1.3 for _, stage in _stages(survey)))
        ruled(axes)
    sheet.legend(loc="outside upper center", ncols=min(4, len(survey.sequences)), frameon=False, handlelength=3)
    return sheet


def near_apart(survey: FactorSurvey) -> tuple[dict[str, Interval], dict[str, str]]:
    """Return the differences of `near` within each run, and those that methods with unequally many stages lack."""
    runs: dict[str, dict[str, StageFactors]] = {}
    for sequence in survey.sequences:
        run, _, label = sequence.label.rpartition(": ")
        runs.setdefault(f"{run}." if run else "", {})[label] = sequence.stages[-1]
    numbers, without = {}, {}
    for run, last in runs.items():
        for (one, first), (other, second) in itertools.permutations(last.items(), 2):
            name = f"{run}{one}-minus-{other}.near"
            if first.index == second.index:
                numbers[name] = exact(100 * (first.figures.near - second.figures.near))
            else:
                without[name] = f"{one} ends with {first.domain}, {other} with {second.domain}"
    return numbers, without


def result(survey: FactorSurvey, *_: Any) -> Result:
    """Make the result.

    Numbers, counted and not sampled: `LABEL.smallest`, `.largest`, `.near` (share within [0.95, 1.05], in %) and
    `.flipped` after the last domain, `LABEL.after-DOMAIN.…` after each, `LABEL.smallest_ever` and `.flipped_ever` over
    all stages; `A-minus-B.near` after the last. With several runs every name begins with `RUN.`.
    """
    numbers: dict[str, Interval] = {}
    rows, shown = [], {}
    notes = [f"left out, a method without factors: {label}" for label in survey.left_out]
    for sequence in survey.sequences:
        label = sequence.label.replace(": ", ".")  # of several runs the run stands in front
        numbers[f"{label}.smallest_ever"] = exact(min(stage.figures.smallest for stage in sequence.stages))
        numbers[f"{label}.flipped_ever"] = exact(max(stage.figures.flipped for stage in sequence.stages))
        page = []
        for stage in sequence.stages:
            one, cells = stage.figures, stage_cells(stage)
            own = {"smallest": one.smallest, "largest": one.largest, "near": 100 * one.near, "flipped": one.flipped}
            for front in (f"{label}.after-{stage.domain}", label):  # the last stage's numbers stay
                numbers |= {f"{front}.{name}": exact(value) for name, value in own.items()}
            rows.append([sequence.label, *cells])
            page.append([f"+{stage.domain}", *cells[1:5]])
        shown[f"Factors of {label}"] = text_frame(HEADS[:5], page)
        notes.append(f"{label}: {verdict(sequence)}")
    differences, without = near_apart(survey)
    remarks = [f"{sequence.label}: {verdict(sequence)}" for sequence in survey.sequences]
    if survey.left_out:
        remarks.append(f"without factors, left out: {', '.join(survey.left_out)}")
    figures, by_layer = {"gains-trajectory": trajectory(survey)}, layer_table(survey)
    if not (inside := by_layer.dropna(subset="layer")).empty:
        figures["gains-heatmap"] = heatmap(inside)
    adapters = [asdict(stage.origin) for _, stage in _stages(survey)]
    return Result(
        headline=Headline(["method", *HEADS], rows, numeric=2),
        remarks=remarks,
        tables={"gains": stage_table(survey), "gains-layers": by_layer},
        markdown=markdown(survey),
        record=record_values(survey),
        provenance={"adapters": adapters, "environment": describe_environment(torch.device("cpu"))},
        figures=figures,
        numbers=numbers | differences,
        without=without,
        shown=shown,
        notes=notes,
    )
