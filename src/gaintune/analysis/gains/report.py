"""Factors as tables and figures: range and share near 1 after every stage, and heatmaps of layer by stage."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gaintune.analysis.base import Headline, Result
from gaintune.analysis.drawing import color_bar, drawn, framed_by_nothing, ruled
from gaintune.analysis.gains.survey import NEAR, FactorFigures, FactorSequence, FactorSurvey, StageFactors
from gaintune.report import INK, RULE, SHADE, diverging, look, markdown_table
from gaintune.results import Interval, exact
from gaintune.storage import describe_environment

EVERY = "all"
TIGHT = f"within [{NEAR[0]:g}, {NEAR[1]:g}]"
LARGEST_DISTANCE = 1.0  # a factor this far from 1 has the full colour


def stage_table(survey: FactorSurvey) -> pd.DataFrame:
    """One row for each sequence, stage and projection, "all" included; `near` is a share, stages count from 1."""
    return pd.DataFrame(
        [
            {
                "sequence": sequence.label,
                "stage": stage.index + 1,
                "domain": stage.domain,
                "projection": projection or EVERY,
                **asdict(stage.of(projection)),
            }
            for sequence in survey.sequences
            for stage in sequence.stages
            for projection in (None, *stage.projections)
        ]
    )


def layer_table(survey: FactorSurvey) -> pd.DataFrame:
    """One row for each sequence, stage and module."""
    return pd.DataFrame(
        [
            {
                "sequence": sequence.label,
                "stage": stage.index + 1,
                "domain": stage.domain,
                "layer": layer.position.layer,
                "projection": layer.position.projection,
                **asdict(layer.figures),
                "module": layer.position.name,
            }
            for sequence in survey.sequences
            for stage in sequence.stages
            for layer in stage.layers
        ]
    )


def stage_cells(stage: StageFactors) -> list[str]:
    """Smallest and largest factor, share within [0.95, 1.05], how many are at or below 0, and how many there are."""
    one = stage.figures
    return [
        f"{one.smallest:.3f}", f"{one.largest:.3f}", f"{100 * one.near:.1f} %", f"{one.flipped:,}", f"{one.count:,}"
    ]  # fmt: skip


def markdown(survey: FactorSurvey) -> str:
    """The table of appendix J for every sequence, with its regime."""
    parts = []
    for sequence in survey.sequences:
        rows, names = [], []
        for stage in sequence.stages:
            names.append(f"{stage.index + 1} {stage.domain}")
            rows.append(stage_cells(stage))
        heads = ["Smallest", "Largest", TIGHT.capitalize(), "At or below 0", "Factors"]
        frame = pd.DataFrame(rows, index=names, columns=heads, dtype=object)
        parts.append(f"{sequence.label}: {verdict(sequence)}.\n\n{markdown_table(frame, 'After stage')}")
    if survey.left_out:
        parts.append(f"Without factors, and left out: {', '.join(survey.left_out)}.\n")
    return "\n".join(parts)


def verdict(sequence: FactorSequence) -> str:
    """The regime in words, with what it rests on."""
    done, planned = len(sequence.stages), sequence.planned
    seen = f"{done} of {planned} stages" if done < planned else "one stage" if planned == 1 else f"all {planned} stages"
    flips = [(stage.index + 1, stage.domain) for stage in sequence.stages if stage.figures.flipped]
    regime = sequence.regime or "regime unknown, as not every stage before was looked at"
    if not flips:
        return f"{regime}, every factor is positive after {seen}"
    stage, domain = flips[0]
    first = "first" if sequence.regime else "seen"
    return f"{regime}, factors at or below 0, {first} after stage {stage} ({domain}), {seen} looked at"


def record_values(survey: FactorSurvey) -> dict[str, Any]:
    """Everything as plain values for JSON."""
    return {
        "near": list(NEAR),
        "left_out": list(survey.left_out),
        "sequences": [
            {
                "label": sequence.label,
                "planned": sequence.planned,
                "regime": sequence.regime,
                "stages": [
                    {
                        "stage": stage.index + 1,
                        "domain": stage.domain,
                        "figures": asdict(stage.figures),
                        "projections": {name: asdict(stage.of(name)) for name in stage.projections},
                        "layers": [{**asdict(each.position), **asdict(each.figures)} for each in stage.layers],
                    }
                    for stage in sequence.stages
                ],
            }
            for sequence in survey.sequences
        ],
    }


def _provenance(survey: FactorSurvey) -> dict[str, Any]:
    origins = [stage.origin for sequence in survey.sequences for stage in sequence.stages]
    environment = describe_environment(torch.device("cpu"))
    return {"adapters": [each.to_dict() for each in origins], "environment": environment}


def _grid(sequence: FactorSequence, projection: str, figure: Callable[[FactorFigures], float]) -> np.ndarray:
    """One figure of every layer's factors, `(stages, layers)`, NaN where a layer has none."""
    numbers = _layers(sequence)
    values = np.full((len(sequence.stages), len(numbers)), np.nan)
    for row, stage in enumerate(sequence.stages):
        for each in stage.layers:
            if each.position.layer is not None and each.position.projection == projection:
                values[row, numbers.index(each.position.layer)] = figure(each.figures)
    return values


def _layers(sequence: FactorSequence) -> list[int]:
    layers = [each.position.layer for stage in sequence.stages for each in stage.layers]
    return sorted({layer for layer in layers if layer is not None})


PANELS: tuple[tuple[str, Callable[[FactorFigures], float], bool], ...] = (
    ("smallest", lambda figures: figures.smallest, False),
    ("largest", lambda figures: figures.largest, False),
    (f"share {TIGHT}", lambda figures: figures.near, True),
)
"""Title, figure, and whether it is a share."""


@drawn
def heatmap(survey: FactorSurvey) -> Figure:
    """Layers across and stages down: smallest factor, largest factor and share near 1, a row for each projection.

    A dot marks the layers with a factor at or below 0.
    """
    shown = [(each, name) for each in survey.sequences if _layers(each) for name in _projections(each)]
    heights = [0.75 + 0.2 * len(sequence.stages) for sequence, _ in shown]
    width = max(len(_layers(sequence)) for sequence, _ in shown)
    longest = max(len(_first_title(sequence, name)) for sequence, name in shown)
    size = (3 * max(2.9, 1.3 + 0.09 * width, 0.9 + 0.08 * longest), 0.9 + sum(heights))
    sheet = Figure(figsize=size, layout="constrained")
    grid = sheet.subplots(len(shown), 3, squeeze=False, gridspec_kw={"height_ratios": heights})
    distance = Normalize(1 - LARGEST_DISTANCE, 1 + LARGEST_DISTANCE, clip=True)
    share = Normalize(0, 1)
    for row, (sequence, projection) in enumerate(shown):
        for column, (title, figure, is_share) in enumerate(PANELS):
            colours, scale = (colormaps["viridis"], share) if is_share else (diverging(), distance)
            axes = grid[row, column]
            _panel(axes, sequence, _grid(sequence, projection, figure), colours, scale, named=column == 0)
            if column == 0:
                _mark_flips(axes, sequence, projection)
            axes.set_title(_first_title(sequence, projection) if column == 0 else title, loc="left")
    for axes in grid[-1]:
        axes.set_xlabel("transformer layer")
    for columns, colours, scale, label in (
        (
            slice(0, 2),
            diverging(),
            distance,
            "factor (1 leaves the feature as it was; a dot marks a layer with one at or below 0)",
        ),
        (slice(2, 3), colormaps["viridis"], share, f"share {TIGHT}"),
    ):
        color_bar(
            sheet, ScalarMappable(scale, colours), list(grid[:, columns].flat), label, orientation="horizontal",
            fraction=0.05, aspect=30, pad=0.02, extend="both" if scale is distance else "neither",
        )  # fmt: skip
    return sheet


def _short(label: str, longest: int = 26) -> str:
    """The end of a long name, such as a folder's: the beginning tells folders apart least."""
    return label if len(label) <= longest else f"…{label[1 - longest :]}"


def _projections(sequence: FactorSequence) -> list[str]:
    found = [each.position for stage in sequence.stages for each in stage.layers if each.position.layer is not None]
    return list(dict.fromkeys(each.projection for each in found))


def _panel(
    axes: Axes, sequence: FactorSequence, values: np.ndarray, colours: Colormap, scale: Normalize, *, named: bool
) -> None:
    """One heatmap of `(stages, layers)`."""
    axes.set_facecolor(SHADE)
    axes.pcolormesh(values, cmap=colours, norm=scale, edgecolors="white", linewidth=0.4)
    numbers, stages = _layers(sequence), sequence.stages
    every = 1 if len(numbers) <= 8 else 5
    axes.set_xticks(np.arange(len(numbers))[::every] + 0.5, [str(number) for number in numbers[::every]])
    names = [f"{stage.index + 1} {stage.domain}" for stage in stages] if named else [""] * len(stages)
    axes.set_yticks(np.arange(len(stages)) + 0.5, names, color=INK)
    axes.invert_yaxis()
    framed_by_nothing(axes)


def _first_title(sequence: FactorSequence, projection: str) -> str:
    return f"{_short(sequence.label)}, {projection}: {PANELS[0][0]}"


def _mark_flips(axes: Axes, sequence: FactorSequence, projection: str) -> None:
    flipped = np.argwhere(_grid(sequence, projection, lambda figures: figures.flipped) > 0) + 0.5
    axes.plot(flipped[:, 1], flipped[:, 0], linestyle="none", marker=".", markersize=4, color="white")


@drawn
def trajectory(survey: FactorSurvey) -> Figure:
    """Smallest and largest factor, and the share near 1, after every stage: a line for each sequence."""
    sheet = Figure(figsize=(8.6, 3.2), layout="constrained")
    left, right = sheet.subplots(1, 2)
    for index, sequence in enumerate(survey.sequences):
        style, stages = look(index), [stage.index + 1 for stage in sequence.stages]
        line = {"color": style.colour, "linestyle": style.dashes, "marker": style.marker, "markersize": 4}
        figures = [stage.figures for stage in sequence.stages]
        left.plot(stages, [one.smallest for one in figures], linewidth=1.5, label=sequence.label, **line)
        left.plot(stages, [one.largest for one in figures], linewidth=1.5, **line)
        right.plot(stages, [100 * one.near for one in figures], linewidth=1.5, **line)
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
        axes.set_xlim(0.7, max(stage.index + 1.3 for sequence in survey.sequences for stage in sequence.stages))
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
    """Put the survey together.

    Numbers, counted and not sampled: `LABEL.smallest`, `.largest`, `.near` (share within [0.95, 1.05], in %) and
    `.flipped` after the last domain, `LABEL.after-DOMAIN.…` after each, `LABEL.smallest_ever` and `.flipped_ever` over
    all stages; `A-minus-B.near` after the last. Of several runs all begin with `RUN.`.
    """
    numbers: dict[str, Interval] = {}
    rows, shown = [], {}
    notes = [f"left out, a method without factors: {label}" for label in survey.left_out]
    heads = ["Smallest", "Largest", "Within [0.95, 1.05]", "At or below 0"]
    for sequence in survey.sequences:
        label = sequence.label.replace(": ", ".")  # of several runs the run stands in front
        stages = [stage.figures for stage in sequence.stages]
        numbers[f"{label}.smallest_ever"] = exact(min(stage.smallest for stage in stages))
        numbers[f"{label}.flipped_ever"] = exact(max(stage.flipped for stage in stages))
        cells = {}
        for stage, one in zip(sequence.stages, stages, strict=True):
            own = {"smallest": one.smallest, "largest": one.largest, "near": 100 * one.near, "flipped": one.flipped}
            numbers |= {f"{label}.after-{stage.domain}.{name}": exact(value) for name, value in own.items()}
            numbers |= {f"{label}.{name}": exact(value) for name, value in own.items()}  # the last stage stays
            rows.append([sequence.label, f"{stage.index + 1} {stage.domain}", *stage_cells(stage)])
            cells[f"+{stage.domain}"] = [*stage_cells(stage)[:3], str(one.flipped)]
        shown[f"Factors of {label}"] = pd.DataFrame.from_dict(cells, orient="index", columns=heads)
        notes.append(f"{label}: {verdict(sequence)}")
    differences, without = near_apart(survey)
    remarks = [f"{sequence.label}: {verdict(sequence)}" for sequence in survey.sequences]
    if survey.left_out:
        remarks.append(f"without factors, left out: {', '.join(survey.left_out)}")
    figures = {"gains-trajectory": trajectory(survey)}
    if any(_layers(sequence) for sequence in survey.sequences):
        figures["gains-heatmap"] = heatmap(survey)
    return Result(
        headline=Headline(
            ["method", "after stage", "smallest", "largest", TIGHT, "at or below 0", "factors"], rows, numeric=2
        ),
        remarks=remarks,
        tables={"gains": stage_table(survey), "gains-layers": layer_table(survey)},
        markdown=markdown(survey),
        record=record_values(survey),
        provenance=_provenance(survey),
        figures=figures,
        numbers=numbers | differences,
        without=without,
        shown=shown,
        notes=notes,
    )
