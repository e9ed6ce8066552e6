"""The linear model's table and figure: what was trained, beside the two closed forms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gaintune.analysis.base import Headline, Result, Subject
from gaintune.analysis.drawing import drawn, ruled
from gaintune.analysis.linear_model import LinearModelOptions
from gaintune.analysis.linear_model.model import Losses
from gaintune.analysis.linear_model.survey import METHODS, POSITIONS, SeedResult
from gaintune.report import INK, MUTED, RULE, SHADE, look, markdown_table
from gaintune.results import Interval
from gaintune.storage import describe_environment

LABELS = {"full": "full", "lora": "LoRA", "disel": "DISeL"}
FIXED, BAYES = "best fixed correction", "Bayes-optimal correction"
HEADS = ["Loss", "In-domain", "Retention", "Loss / best fixed", "Loss / Bayes"]
DEFAULT_STEPS = LinearModelOptions.model_fields["steps"].default
FIXED_TOLERANCE, BAYES_TOLERANCE, FLOOR_SHARE = 1.01, 1.05, 0.5


@dataclass(frozen=True)
class Row:
    """One line of the summary: mean losses over seeds, and the range of the total over two closed forms."""

    name: str
    losses: Losses
    to_fixed: tuple[float, float, float]
    to_bayes: tuple[float, float, float]


@dataclass(frozen=True)
class Check:
    """One thing the theory says, whether it held on every seed, and the worst figure."""

    claim: str
    worst: float
    holds: bool


def _losses(result: SeedResult) -> dict[str, Losses]:
    """Everything measured or computed on one seed, by its name in the table."""
    trained = {LABELS[one.method]: one.losses for one in result.trained}
    return {FIXED: result.fixed, **trained, BAYES: result.bayes}


def _spread(values: Sequence[float]) -> tuple[float, float, float]:
    return float(np.mean(values)), min(values), max(values)


def summary(results: Sequence[SeedResult]) -> tuple[Row, ...]:
    """The closed forms and the methods: mean losses, and each total over the two closed forms (mean, min, max)."""
    seeds = [_losses(result) for result in results]
    rows = []
    for name in seeds[0]:
        mine = [seed[name] for seed in seeds]
        mean = Losses(float(np.mean([m.in_domain for m in mine])), float(np.mean([m.retention for m in mine])))
        to_fixed, to_bayes = (
            _spread([seed[name].total / seed[against].total for seed in seeds]) for against in (FIXED, BAYES)
        )
        rows.append(Row(name, mean, to_fixed, to_bayes))
    return tuple(rows)


def checks(results: Sequence[SeedResult]) -> tuple[Check, ...]:
    """What has to hold on every seed."""
    rows = {row.name: row for row in summary(results)}
    full, lora, disel = (rows[LABELS[method]] for method in METHODS)
    figures = [
        ("full reaches the best fixed correction's loss within 1 %", full.to_fixed[2], FIXED_TOLERANCE),
        ("LoRA reaches the best fixed correction's loss within 1 %", lora.to_fixed[2], FIXED_TOLERANCE),
        ("DISeL reaches the Bayes loss within 5 %", disel.to_bayes[2], BAYES_TOLERANCE),
        ("DISeL stays under half of the best fixed correction's loss", disel.to_fixed[2], FLOOR_SHARE),
    ]
    return tuple(Check(claim, worst, bool(worst <= bound)) for claim, worst, bound in figures)


def too_short(options: LinearModelOptions, results: Sequence[SeedResult]) -> str | None:
    """One line where a check failed and training was shorter than the checks presuppose; None otherwise."""
    if options.steps >= DEFAULT_STEPS or all(check.holds for check in checks(results)):
        return None
    return (
        f"The claims presuppose {DEFAULT_STEPS} training steps, the default; after {options.steps}, a NO may say "
        "no more than that they were too few."
    )


def _cells(row: Row) -> list[str]:
    return [f"{value:.4f}" for value in (row.losses.total, row.losses.in_domain, row.losses.retention)]


def _range(values: tuple[float, float, float]) -> str:
    mean, low, high = values
    return f"{mean:.4f}" if low == high else f"{mean:.4f} ({low:.4f}–{high:.4f})"


def markdown(options: LinearModelOptions, results: Sequence[SeedResult]) -> str:
    """Settings, summary and checks as Markdown."""
    rows = summary(results)
    frame = pd.DataFrame(
        [[*_cells(row), _range(row.to_fixed), _range(row.to_bayes)] for row in rows],
        index=[row.name for row in rows],
        columns=HEADS,
        dtype=object,
    )
    told = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in options.model_dump().items())
    lines = [
        f"- {check.claim}: {'yes' if check.holds else 'NO'} (worst seed: {check.worst:.4f} times)"
        for check in checks(results)
    ]
    short = too_short(options, results)
    return "\n".join(
        [
            f"Linear model of the DISeL paper: {told}.\n",
            markdown_table(frame, "Correction"),
            "Losses are mean squared errors per output coordinate, means over seeds: in-domain on the population that",
            "asks for the update, retention on the one that does not, loss over the equal mixture of both. Ratios are",
            "taken seed by seed: mean (smallest–largest).\n",
            *lines,
            *([] if short is None else ["", short]),
            "",
        ]
    )


def table(results: Sequence[SeedResult]) -> pd.DataFrame:
    """Every seed's losses, a row for each correction."""
    return pd.DataFrame(
        [
            {
                "seed": result.seed,
                "correction": name,
                "loss": losses.total,
                "in_domain": losses.in_domain,
                "retention": losses.retention,
                "loss_over_best_fixed": losses.total / result.fixed.total,
                "loss_over_bayes": losses.total / result.bayes.total,
            }
            for result in results
            for name, losses in _losses(result).items()
        ]
    )


def record(options: LinearModelOptions, results: Sequence[SeedResult]) -> dict[str, Any]:
    """Everything that was measured, as plain values for JSON."""

    def plain(losses: Losses) -> dict[str, float]:
        return {"loss": losses.total, "in_domain": losses.in_domain, "retention": losses.retention}

    return {
        "settings": options.model_dump(),
        "environment": describe_environment(torch.device("cpu")),
        "checks": [asdict(check) for check in checks(results)],
        "gate_positions": POSITIONS.tolist(),
        "seeds": [
            {
                "seed": result.seed,
                "best_fixed": plain(result.fixed),
                "bayes": plain(result.bayes),
                "bayes_gate": result.bayes_gate.tolist(),
                "trained": [
                    {
                        "method": one.method,
                        "steps": list(one.steps),
                        "curve": [plain(losses) for losses in one.curve],
                        "gates": None if one.gates is None else one.gates.tolist(),
                    }
                    for one in result.trained
                ],
            }
            for result in results
        ],
    }


def _curves(axes: Axes, results: Sequence[SeedResult]) -> None:
    """Loss over steps, in units of each seed's best fixed correction: a thin line a seed, a thick one the mean."""
    steps = results[0].trained[0].steps
    for index, method in enumerate(METHODS):
        style = look(index)
        lines = np.array(
            [
                [loss.total / r.fixed.total for loss in one.curve]
                for r in results
                for one in r.trained
                if one.method == method
            ]
        )
        axes.plot(steps, lines.T, color=style.colour, linewidth=0.5, alpha=0.35)
        axes.plot(steps, lines.mean(0), color=style.colour, linestyle=style.dashes, linewidth=1.8, label=LABELS[method])
    bayes = [result.bayes.total / result.fixed.total for result in results]
    axes.axhspan(min(bayes), max(bayes), color=SHADE, zorder=0)
    for height, text in ((1.0, FIXED), (float(np.mean(bayes)), BAYES)):
        axes.axhline(height, color=INK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        place = (steps[-1], height)
        axes.annotate(
            text, place, xytext=(0, -4), textcoords="offset points", ha="right", va="top", color=INK, fontsize=8
        )
    axes.set(yscale="log", xlabel="training step", ylabel="loss / loss of the best fixed correction")
    ticks = [0.1, 0.2, 0.5, 1.0, 2.0, 5.0]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_yticks([], minor=True)
    axes.set_ylim(
        0.75 * min(bayes), 1.15 * max(one.curve[0].total / r.fixed.total for r in results for one in r.trained)
    )
    axes.set_xlim(0, steps[-1])
    axes.set_title("Loss of what was trained", loc="left")
    axes.legend(frameon=False, loc="upper right", handlelength=3)


def _gates(axes: Axes, results: Sequence[SeedResult]) -> None:
    """Learnt gates against the Bayes gate, between and around the two means."""
    style = look(METHODS.index("disel"))
    gates = np.concatenate([one.gates for r in results for one in r.trained if one.gates is not None], axis=1)
    for mean, text in ((-1, "keep"), (1, "adapt")):
        axes.axvline(mean, color=RULE, linewidth=0.9, zorder=0)
        axes.annotate(f"mean of\n“{text}”", (mean, 1.03), ha="center", va="bottom", color=MUTED, fontsize=8)
    axes.plot(POSITIONS, gates, color=style.colour, linewidth=0.5, alpha=0.35)
    axes.plot(
        POSITIONS, gates.mean(1), color=style.colour, linestyle=style.dashes, linewidth=1.8, label="DISeL, learnt"
    )
    axes.plot(POSITIONS, results[0].bayes_gate, color=INK, linewidth=1.1, linestyle=(0, (4, 3)), label="Bayes gate")
    axes.set(xlabel="position on the line through both means", ylabel="gate", ylim=(-0.02, 1.2))
    axes.set_xlim(POSITIONS[0], POSITIONS[-1])
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.set_title("Gates, a thin line for each rank part and seed", loc="left")
    axes.legend(frameon=False, loc="center right", bbox_to_anchor=(1.0, 0.35), handlelength=3)


@drawn
def figure(results: Sequence[SeedResult]) -> Figure:
    """Draw the paper's Figure 1: losses over training against the two closed forms, and the gates."""
    sheet = Figure(figsize=(9.2, 3.5), layout="constrained")
    left, right = sheet.subplots(1, 2)
    _curves(left, results)
    _gates(right, results)
    ruled(left)
    ruled(right)
    return sheet


def result(results: Sequence[SeedResult], subject: Subject, options: LinearModelOptions) -> Result:
    """Put the results together; numbers `METHOD.to_fixed` and `METHOD.to_bayes`: mean and range over seeds."""
    rows, held = summary(results), checks(results)
    cells = {row.name: [*_cells(row), f"{row.to_fixed[0]:.4f}", f"{row.to_bayes[0]:.4f}"] for row in rows}
    title, short = f"ean of {options.seeds} seeds", too_short(options, results)
    said = [f"{'yes' if one.holds else 'NO '}  {one.claim} (worst seed: {one.worst:.4f} times)" for one in held]
    return Result(
        headline=Headline(
            ["correction", "loss", "in-domain", "retention", "loss / best fixed", "loss / Bayes"],
            [[name, *values] for name, values in cells.items()],
            numeric=1,
            title=f"Linear model, m{title}",
        ),
        remarks=[*said, *([] if short is None else [short])],
        tables={"linear-model": table(results)},
        markdown=markdown(options, results),
        record=record(options, results),
        figures={"linear-model": figure(results)},
        numbers={
            f"{row.name.replace(' ', '-')}.{name}": Interval(*ratio)
            for row in rows
            for name, ratio in (("to_fixed", row.to_fixed), ("to_bayes", row.to_bayes))
        },
        shown={f"M{title}": pd.DataFrame.from_dict(cells, orient="index", columns=HEADS)},
        notes=[f"{'holds' if one.holds else 'does not hold'} on every seed: {one.claim}" for one in held],
    )
