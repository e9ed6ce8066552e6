"""Classifiers by method and rank as numbers, as tables, and as the figure of accuracy against perplexity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, ScalarFormatter

from gaintune.results.records import Interval
from gaintune.results.verdicts import replicated
from gaintune.recipes.outcome import bare
from gaintune.report.canvas import INK, MUTED, RULE, figure_files, styled
from gaintune.report.palette import look
from gaintune.report.words import NONE
from gaintune.storage.run import make_folder, write_bytes, write_text

Read = Callable[["Measured"], float]
TELLING = 1e9  # digits of a greater number tell nothing
WIDE = 2.0  # ratio of perplexities from which evenly spaced ticks would crowd one end of a log axis


@dataclass(frozen=True)
class Measured:
    """One classifier: accuracy on its task in %, and means over texts of perplexity and of its change in %."""

    task: str
    label: str
    rank: int | None
    seed: int
    accuracy: float
    perplexity: float
    change: float


FIGURES: dict[str, Read] = {
    "accuracy": lambda one: one.accuracy,
    "retention": lambda one: one.change,
    "perplexity": lambda one: one.perplexity,
}


def by_seed(rows: Sequence[Measured], read: Read) -> list[float]:
    """A figure of every seed, in order: its mean over the tasks and ranks of the rows."""
    seeds = sorted({one.seed for one in rows})
    return [mean(read(one) for one in rows if one.seed == seed) for seed in seeds]


def numbers(measured: Sequence[Measured], base: float, confidence: float) -> dict[str, Interval]:
    """Every number by the name that a claim uses; `base` is the perplexity of the untouched base."""
    found = {"base.perplexity": bare(base)}
    labels = {label: [one for one in measured if one.label == label] for label in _unique(measured, "label")}
    groups = dict(labels)
    for label, rows in labels.items():
        ranks = _unique(rows, "rank")
        if len(ranks) > 1:
            groups |= {f"{label}-r{rank}": [one for one in rows if one.rank == rank] for rank in ranks}
    for name, rows in groups.items():
        for figure, read in FIGURES.items():
            found[f"{name}.{figure}"] = replicated(by_seed(rows, read), confidence=confidence)
        for task in _unique(rows, "task"):
            own = [one for one in rows if one.task == task]
            found[f"{name}.{task}.accuracy"] = replicated(by_seed(own, FIGURES["accuracy"]), confidence=confidence)
    names = list(labels)
    for place, one in enumerate(names):
        for other in names[:place]:
            for figure, read in FIGURES.items():
                pairs = zip(by_seed(labels[one], read), by_seed(labels[other], read), strict=True)
                differences = [first - second for first, second in pairs]
                found[f"{one}-minus-{other}.{figure}"] = replicated(differences, confidence=confidence)
    return found


def _unique(rows: Sequence[Measured], attribute: str) -> list:
    return list(dict.fromkeys(getattr(one, attribute) for one in rows))


def _variants(measured: Sequence[Measured]) -> dict[str, list[Measured]]:
    """The rows of every method and rank, by its name in tables."""
    found: dict[str, list[Measured]] = {}
    for one in measured:
        found.setdefault(one.label if one.rank is None else f"{one.label}, rank {one.rank}", []).append(one)
    return found


def tables(measured: Sequence[Measured], base: float) -> dict[str, pd.DataFrame]:
    """A row for each method and rank: means over seeds with standard deviations, overall and task by task."""
    tasks = _unique(measured, "task")
    rows, each = {"base": [NONE, f"{base:.2f}", NONE]}, {}
    for name, own in _variants(measured).items():
        rows[name] = [
            _spread(by_seed(own, read), decimals)
            for read, decimals in ((FIGURES[key], 2) for key in ("accuracy", "perplexity", "retention"))
        ]
        each[name] = [
            _spread(by_seed([one for one in own if one.task == task], FIGURES["accuracy"]), 1) for task in tasks
        ]
    seeds = len(_unique(measured, "seed"))
    heads = ["Accuracy, %", "Perplexity", "Change of perplexity, %"]
    told = f"mean and standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    return {
        f"Mean over tasks; {told}": pd.DataFrame.from_dict(rows, orient="index", columns=heads),
        f"Accuracy of every task, %; {told}": pd.DataFrame.from_dict(each, orient="index", columns=tasks),
    }


def _spread(values: Sequence[float], decimals: int) -> str:
    middle, spread = mean(values), stdev(values) if len(values) > 1 else None
    form = f".{decimals}f" if abs(middle) < TELLING else ".2g"
    told = f"{round(middle, decimals) + 0.0:{form}}".replace("-", "−")
    return told if spread is None else f"{told} ± {spread:{form}}"


def write(measured: Sequence[Measured], base: float, folder: Path) -> None:
    """Write classifiers.csv, a row for each, and the figure as accuracy-perplexity.png and .svg."""
    make_folder(folder)
    frame = pd.DataFrame([asdict(one) for one in measured])
    write_text(folder / "classifiers.csv", frame.to_csv(index=False, lineterminator="\n"))
    for name, content in figure_files("accuracy-perplexity", figure(measured, base)).items():
        write_bytes(folder / name, content)


def figure(measured: Sequence[Measured], base: float) -> Figure:
    """Accuracy (up) against perplexity (across, log): a point for each method and rank, with standard deviations."""

    def draw() -> Figure:
        sheet = Figure(figsize=(5.6, 4.2), layout="constrained")
        axes = sheet.subplots()
        for index, label in enumerate(_unique(measured, "label")):
            _draw_method(axes, [one for one in measured if one.label == label], index)
        axes.axvline(base, color=INK, linewidth=0.9, zorder=1, label="pretrained")
        axes.set_xscale("log")
        perplexities = [base, *(one.perplexity for one in measured)]
        wide = max(perplexities) / min(perplexities) > WIDE
        few = MaxNLocator(6, steps=[1, 2, 2.5, 5, 10])
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)) if wide else few)
        axes.xaxis.set_major_formatter(ScalarFormatter(useOffset=False))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set(xlabel="perplexity of texts never learnt (log)", ylabel="accuracy, mean over tasks, %")
        axes.grid(color=RULE, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(length=0)
        axes.set_title("Left and up is better; numbers are ranks", loc="left")
        axes.legend(frameon=False, handlelength=3)
        return sheet

    return styled(draw)


def _draw_method(axes: Axes, rows: Sequence[Measured], index: int) -> None:
    style = look(index)
    ranks = _unique(rows, "rank")
    own = [[one for one in rows if one.rank == rank] for rank in ranks]
    across, up = ([by_seed(one, FIGURES[key]) for one in own] for key in ("perplexity", "accuracy"))
    x, y = [mean(values) for values in across], [mean(values) for values in up]
    spreads = [[stdev(values) if len(values) > 1 else 0.0 for values in side] for side in (across, up)]
    axes.plot(x, y, color=style.colour, linestyle=style.dashes, marker=style.marker, markersize=5, label=rows[0].label)
    axes.errorbar(
        x, y, xerr=spreads[0], yerr=spreads[1], ecolor=style.colour, elinewidth=0.9, alpha=0.5, fmt="none", zorder=2
    )
    for rank, place in zip(ranks, zip(x, y, strict=True), strict=True):
        if rank is not None:
            axes.annotate(str(rank), place, xytext=(5, 4), textcoords="offset points", color=MUTED, fontsize=7)
