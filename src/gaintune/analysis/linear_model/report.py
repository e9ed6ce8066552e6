"""Show the linear model as a table and a figure: what was trained, beside the two closed forms."""

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
from gaintune.analysis.drawing import drawn
from gaintune.analysis.linear_model import LinearModelOptions
from gaintune.analysis.linear_model.survey import METHODS, POSITIONS, Losses, SeedResult, Trained
from gaintune.report import INK, MUTED, RULE, SHADE, markdown_table, ruled, style_of
from gaintune.results import Interval
from gaintune.storage import describe_environment

LABELS = {"full": "full", "lora": "LoRA", "disel": "DISeL"}
FIXED, BAYES = "best fixed correction", "Bayes-optimal correction"
HEADS = ["Loss", "In-domain", "Retention", "Loss / best fixed", "Loss / Bayes"]
DEFAULT_STEPS = LinearModelOptions.model_fields["steps"].default
FIXED_TOLERANCE, BAYES_TOLERANCE, FLOOR_SHARE = 1.01, 1.05, 0.5


@dataclass(frozen=True)
class SummaryRow:
    """One line of the summary: mean losses over seeds, and mean and range of the total over the two closed forms."""

    name: str
    losses: Losses
    to_fixed: tuple[float, float, float]
    to_bayes: tuple[float, float, float]


@dataclass(frozen=True)
class Check:
    """One thing the theory says, the worst figure of all seeds, and whether it holds on every seed."""

    claim: str
    worst: float
    holds: bool


def table(results: Sequence[SeedResult]) -> pd.DataFrame:
    """Make a row of losses for each seed and correction."""
    rows = []
    for result in results:
        fixed, bayes = result.best_fixed.total, result.bayes.total
        trained = {LABELS[each.method]: each.losses for each in result.trained}
        for name, losses in {FIXED: result.best_fixed, **trained, BAYES: result.bayes}.items():
            figures = (losses.total, losses.in_domain, losses.retention, losses.total / fixed, losses.total / bayes)
            rows.append((result.seed, name, *figures))
    columns = ["seed", "correction", "loss", "in_domain", "retention", "loss_over_best_fixed", "loss_over_bayes"]
    return pd.DataFrame(rows, columns=columns)


def summary(results: Sequence[SeedResult]) -> tuple[SummaryRow, ...]:
    """Average the closed forms and the methods over seeds."""
    rows = []
    for name, seeds in table(results).groupby("correction", sort=False):
        figures = {column: seeds[column].to_numpy() for column in seeds.columns[3:]}
        in_domain, retention, *_ = (float(values.mean()) for values in figures.values())
        ratios = [figures["loss_over_best_fixed"], figures["loss_over_bayes"]]
        spread = [(float(ratio.mean()), float(ratio.min()), float(ratio.max())) for ratio in ratios]
        rows.append(SummaryRow(str(name), Losses(in_domain, retention), *spread))
    return tuple(rows)


def checks(results: Sequence[SeedResult]) -> tuple[Check, ...]:
    """Check what has to hold on every seed."""
    rows = {row.name: row for row in summary(results)}
    full, lora, disel = (rows[LABELS[method]] for method in METHODS)
    figures = [
        ("full reaches the best fixed correction's loss within 1 %", full.to_fixed[2], FIXED_TOLERANCE),
        ("LoRA reaches the best fixed correction's loss within 1 %", lora.to_fixed[2], FIXED_TOLERANCE),
        ("DISeL reaches the Bayes loss within 5 %", disel.to_bayes[2], BAYES_TOLERANCE),
        ("DISeL stays under half of the best fixed correction's loss", disel.to_fixed[2], FLOOR_SHARE),
    ]
    return tuple(Check(claim, worst, worst <= bound) for claim, worst, bound in figures)


def too_short(options: LinearModelOptions, results: Sequence[SeedResult]) -> str | None:
    """Return a remark where a check failed and training was shorter than the checks presuppose; None otherwise."""
    if options.steps >= DEFAULT_STEPS or all(check.holds for check in checks(results)):
        return None
    return (
        f"The claims presuppose {DEFAULT_STEPS} training steps, the default; after {options.steps}, a NO may say "
        "no more than that they were too few."
    )


def _cells(row: SummaryRow) -> list[str]:
    return [f"{value:.4f}" for value in (row.losses.total, row.losses.in_domain, row.losses.retention)]


def _range(ratio: tuple[float, float, float]) -> str:
    mean, low, high = ratio
    return f"{mean:.4f}" if low == high else f"{mean:.4f} ({low:.4f}–{high:.4f})"


def markdown(options: LinearModelOptions, results: Sequence[SeedResult]) -> str:
    """Write settings, summary and checks."""
    rows = {row.name: [*_cells(row), _range(row.to_fixed), _range(row.to_bayes)] for row in summary(results)}
    frame = pd.DataFrame.from_dict(rows, orient="index", columns=HEADS)
    settings = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in options.model_dump().items())
    lines = [
        f"Linear model of the DISeL paper: {settings}.\n",
        markdown_table(frame, "Correction"),
        "Losses are mean squared errors per output coordinate, means over seeds: in-domain on the population that",
        "asks for the update, retention on the one that does not, loss over the equal mixture of both. Ratios are",
        "taken seed by seed: mean (smallest–largest).\n",
    ]
    for check in checks(results):
        lines.append(f"- {check.claim}: {'yes' if check.holds else 'NO'} (worst seed: {check.worst:.4f} times)")
    if short := too_short(options, results):
        lines += ["", short]
    return "\n".join([*lines, ""])


def record(options: LinearModelOptions, results: Sequence[SeedResult]) -> dict[str, Any]:
    """Return everything that was measured, as plain values for JSON."""
    return {
        "settings": options.model_dump(),
        "environment": describe_environment(torch.device("cpu")),
        "checks": [asdict(check) for check in checks(results)],
        "gate_positions": POSITIONS.tolist(),
        "seeds": [_plain(result) for result in results],
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Losses):
        return {"loss": value.total, **asdict(value)}
    if isinstance(value, SeedResult | Trained):
        return {name: _plain(part) for name, part in vars(value).items()}
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    return value.tolist() if isinstance(value, np.ndarray) else value


def _curves(axes: Axes, results: Sequence[SeedResult]) -> None:
    """Draw loss over steps, in units of each seed's best fixed correction: a thin line a seed, a thick one the mean."""
    steps = results[0].trained[0].steps
    for index, method in enumerate(METHODS):
        style = style_of(index)
        lines = np.array([[loss.total / r.best_fixed.total for loss in r.trained[index].curve] for r in results])
        axes.plot(steps, lines.T, color=style.color, linewidth=0.5, alpha=0.35)
        axes.plot(steps, lines.mean(0), color=style.color, linestyle=style.dashes, linewidth=1.8, label=LABELS[method])
    bayes = [result.bayes.total / result.best_fixed.total for result in results]
    axes.axhspan(min(bayes), max(bayes), color=SHADE, zorder=0)
    for height, text in ((1.0, FIXED), (float(np.mean(bayes)), BAYES)):
        axes.axhline(height, color=INK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        offset: Any = {"xytext": (0, -4), "textcoords": "offset points"}
        axes.annotate(text, (steps[-1], height), ha="right", va="top", color=INK, fontsize=8, **offset)
    axes.set(yscale="log", xlabel="training step", ylabel="loss / loss of the best fixed correction")
    ticks = [0.1, 0.2, 0.5, 1.0, 2.0, 5.0]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_yticks([], minor=True)
    highest = max(trained.curve[0].total / r.best_fixed.total for r in results for trained in r.trained)
    axes.set_ylim(0.75 * min(bayes), 1.15 * highest)
    axes.set_xlim(0, steps[-1])
    axes.set_title("Loss of what was trained", loc="left")
    axes.legend(frameon=False, loc="upper right", handlelength=3)


def _gates(axes: Axes, results: Sequence[SeedResult]) -> None:
    """Draw trained gates against the Bayes gate, between and around the two means."""
    style = style_of(METHODS.index("disel"))
    gates = np.concatenate([each.gates for r in results for each in r.trained if each.gates is not None], axis=1)
    thick: Any = {"color": style.color, "linestyle": style.dashes, "linewidth": 1.8}
    for mean, text in ((-1, "keep"), (1, "adapt")):
        axes.axvline(mean, color=RULE, linewidth=0.9, zorder=0)
        axes.annotate(f"mean of\n“{text}”", (mean, 1.03), ha="center", va="bottom", color=MUTED, fontsize=8)
    axes.plot(POSITIONS, gates, color=style.color, linewidth=0.5, alpha=0.35)
    axes.plot(POSITIONS, gates.mean(1), **thick, label="DISeL, trained")
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
    rows, held, short = summary(results), checks(results), too_short(options, results)
    cells = {row.name: [*_cells(row), f"{row.to_fixed[0]:.4f}", f"{row.to_bayes[0]:.4f}"] for row in rows}
    heads = ["correction", "loss", "in-domain", "retention", "loss / best fixed", "loss / Bayes"]
    lines = [[name, *values] for name, values in cells.items()]
    remarks = [f"{'yes' if each.holds else 'NO '}  {each.claim} (worst seed: {each.worst:.4f} times)" for each in held]
    return Result(
        headline=Headline(heads, lines, numeric=1, title=f"Linear model, mean of {options.seeds} seeds"),
        remarks=[*remarks, *([short] if short else [])],
        tables={"linear-model": table(results)},
        markdown=markdown(options, results),
        record=record(options, results),
        figures={"linear-model": figure(results)},
        numbers={
            f"{row.name.replace(' ', '-')}.{name}": Interval(*getattr(row, name))
            for row in rows
            for name in ("to_fixed", "to_bayes")
        },
        shown={f"Mean of {options.seeds} seeds": pd.DataFrame.from_dict(cells, orient="index", columns=HEADS)},
        notes=[f"{'holds' if check.holds else 'does not hold'} on every seed: {check.claim}" for check in held],
    )
