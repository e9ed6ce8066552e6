"""A sweep's comparison as Markdown, JSON and the trade-off figure: in-domain against earlier domains, over rates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from gaintune.progress import plural
from gaintune.report import (
    FIGURES,
    INK,
    PAGE,
    RULE,
    figure_files,
    look,
    markdown_table,
    setting,
    signed,
    styled,
    with_interval,
)
from gaintune.results import Interval
from gaintune.storage import describe_environment, write_bytes, write_json, write_text
from gaintune.workflows.sweep.records import CurvePair, Pair, Point, SweepComparison

LABELS = (((5, 4), "left"), ((5, -10), "left"), ((-5, 4), "right"), ((-5, -10), "right"))
"""Where a variant's rates stand beside its points, in points, so that those of neighbours do not cover each other."""


def heading(figure: str) -> str:
    """What a figure is called in tables."""
    return FIGURES[figure][0]


def point_frame(points: tuple[Point, ...], comparison: SweepComparison) -> pd.DataFrame:
    """A row for each variant and rate: its figures with intervals over replicates, in %."""
    return pd.DataFrame(
        [
            [setting(one.lr), with_interval(one.in_domain), with_interval(one.figure), str(one.replicates)]
            for one in points
        ],
        index=[one.variant for one in points],
        columns=["LR", "In-domain", heading(comparison.figure), comparison.over.capitalize()],
        dtype=object,
    )


def pair_sentence(pair: Pair, comparison: SweepComparison) -> str:
    """Two variants at matched in-domain change, and no winner that the interval does not name or that is no match."""
    names = f"{pair.first} minus {pair.second}"
    if pair.difference is None or pair.in_domain is None:
        return f"{names}: not compared at {pair.first_lr:g} and {pair.second_lr:g} ({pair.unmatched})"
    told = pair.unmatched or (f"{pair.better} is better" if pair.better else "no difference shown")
    return (
        f"{names}: {with_interval(pair.difference, 'points')} on {_lower(comparison)}, with "
        f"{with_interval(pair.in_domain, 'points')} left in-domain ({_counted(pair.replicates, comparison)}, sign-flip "
        f"p = {pair.p:.3g}): {told}"
    )


def curve_sentence(pair: CurvePair, comparison: SweepComparison) -> str:
    """Two variants by their curves over all rates."""
    names = f"{pair.first} minus {pair.second}"
    if pair.curve is None:
        return f"{names}: not compared by curve ({pair.reason})"
    curve = pair.curve
    told = f"{pair.better} is better" if pair.better else "no difference shown"
    left = [
        f"{name}'s {', '.join(f'{rate:g}' for rate in rates)}"
        for name, rates in zip((pair.first, pair.second), curve.left_out, strict=True)
        if rates
    ]
    beyond = f"; beyond the best in-domain change, so not on the curve: {', '.join(left)}" if left else ""
    return (
        f"{names}: {with_interval(curve.difference, 'points')} on {_lower(comparison)}, mean over in-domain changes "
        f"from {signed(curve.high)} to {signed(curve.low)} % ({_counted(curve.replicates, comparison)}{beyond}): {told}"
    )


def target_title(comparison: SweepComparison) -> str:
    """What the rates were chosen by, budget by budget where there are several."""
    several = len(comparison.targets) > 1
    told = [
        f"{'no change, as nothing improves' if one.in_domain is None else f'{signed(one.in_domain)} %'}"
        f"{f' ({one.budget:,} tokens)' if several else ''}"
        for one in comparison.targets
    ]
    return f"Rates whose in-domain change is nearest {', '.join(told)}"


def remarks(comparison: SweepComparison) -> list[str]:
    """What a reader of the comparison must know: who is matched with nothing, and what has no numbers."""
    told = [
        f"{name} improves in-domain at no rate: it has no part in the target, and is matched with nothing."
        for target in comparison.targets
        for name in target.never
    ]
    told += [f"{note[0].upper()}{note[1:]}." for note in comparison.notes]
    if comparison.unfinished:
        told.append(f"{plural(comparison.unfinished, 'run')} of the grid did not finish and count nowhere here:")
    return told + [
        f"{one.variant} at {one.lr:g}: {plural(one.runs, 'run')} ({one.error})" for one in comparison.missing
    ]


def _counted(count: int, comparison: SweepComparison) -> str:
    return plural(count, comparison.over.removesuffix("s"))


def _lower(comparison: SweepComparison) -> str:
    name = heading(comparison.figure)
    return name[0].lower() + name[1:]


def markdown(comparison: SweepComparison) -> str:
    """All comparisons as Markdown."""
    parts = [
        f"Change of validation perplexity against the base in %, lower is better; {100 * comparison.confidence:g} % "
        f"intervals over {comparison.over} and validation blocks.\n",
        markdown_table(point_frame(comparison.points, comparison), "Method"),
        f"{target_title(comparison)}:\n",
        markdown_table(point_frame(comparison.matched, comparison), "Method"),
        *(f"- {pair_sentence(pair, comparison)}" for pair in comparison.pairs),
    ]
    if comparison.curves:
        parts += [
            "\nBy curves over all rates:\n",
            *(f"- {curve_sentence(one, comparison)}" for one in comparison.curves),
        ]
    if told := remarks(comparison):
        parts += ["\nRemarks:\n", *(f"- {each}" for each in told)]
    return "\n".join([*parts, ""])


def tradeoff(comparison: SweepComparison) -> Figure:
    """Earlier domains (up) against in-domain change (across): a line through each variant's rates, with intervals."""

    def draw() -> Figure:
        sheet = Figure(figsize=(6.4, 4.6), layout="constrained")
        axes = sheet.subplots()
        for index, variant in enumerate(dict.fromkeys(point.variant for point in comparison.points)):
            _draw_variant(axes, [point for point in comparison.points if point.variant == variant], index)
        axes.axhline(0, color=INK, linewidth=0.9, zorder=1)
        axes.set(xlabel="in-domain change, %", ylabel=f"{_lower(comparison)}, %")
        axes.grid(color=RULE, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(length=0)
        beyond = _frame(axes, comparison.points)
        title = "Left and down is better; numbers are learning rates, faint dots runs"
        if beyond:
            title += f"\n(the intervals of {plural(beyond, 'point')} reach beyond the frame)"
        axes.set_title(title, loc="left")
        sheet.legend(loc="outside lower center", ncols=3, frameon=False, handlelength=3)
        return sheet

    return styled(draw)


def _frame(axes: Axes, points: Sequence[Point]) -> int:
    """Fit the axes to values and runs, since few replicates make intervals that would leave no room for curves.

    Where no variant has several rates there are no curves, and intervals are in the frame.

    Returns:
        How many points have an interval that does not end inside.
    """
    runs = [run for point in points for run in point.runs]
    curves = len(points) > len({point.variant for point in points})
    across = _side([x for x, _ in runs], [point.in_domain for point in points], fit=not curves)
    low, high = _side([y for _, y in runs], [point.figure for point in points], fit=not curves)
    up = (min(low, 0.0), max(high, 0.0))  # the base's line stays in
    axes.set(xlim=across, ylim=up)
    return sum(not (_ends_in(point.in_domain, across) and _ends_in(point.figure, up)) for point in points)


def _side(runs: Sequence[float], intervals: Sequence[Interval], *, fit: bool) -> tuple[float, float]:
    """The ends of an axis with room for the rates at its edges; `fit` keeps the intervals' ends in."""
    values = [*runs, *(one.value for one in intervals)]
    if fit:
        values += [end for one in intervals for end in (one.low, one.high) if end is not None]
    low, high = min(values), max(values)
    room = 0.15 * (high - low or 1.0)
    return low - room, high + room


def _ends_in(one: Interval, side: tuple[float, float]) -> bool:
    return one.low is None or one.high is None or side[0] <= one.low <= one.high <= side[1]


def _draw_variant(axes: Axes, points: list[Point], index: int) -> None:
    style = look(index)
    x, y = [point.in_domain.value for point in points], [point.figure.value for point in points]
    axes.plot(
        x, y, color=style.colour, linestyle=style.dashes, marker=style.marker, markersize=5, label=points[0].variant
    )
    across, up = zip(*((_reach(point.in_domain), _reach(point.figure)) for point in points), strict=True)
    bars = {"ecolor": style.colour, "elinewidth": 0.9, "alpha": 0.5, "fmt": "none", "zorder": 2}
    axes.errorbar(x, y, xerr=list(zip(*across, strict=True)), yerr=list(zip(*up, strict=True)), **bars)
    each = [run for point in points if len(point.runs) > 1 for run in point.runs]
    if each:
        axes.scatter(*zip(*each, strict=True), s=9, color=style.colour, alpha=0.35, linewidths=0, zorder=1.5)
    away, side = LABELS[index % len(LABELS)]
    text = {"textcoords": "offset points", "ha": side, "color": style.colour, "fontsize": 7, "zorder": 4}
    for point in points:
        place = (point.in_domain.value, point.figure.value)
        label = axes.annotate(f"{point.lr:g}", place, xytext=away, **text)
        label.set_path_effects([withStroke(linewidth=2.0, foreground=PAGE)])


def _reach(interval: Interval) -> tuple[float, float]:
    """How far an interval's ends are from its value; 0 where it has none."""
    if interval.low is None or interval.high is None:
        return 0.0, 0.0
    return max(interval.value - interval.low, 0.0), max(interval.high - interval.value, 0.0)


def discard(folder: Path) -> None:
    """Remove the comparison of an earlier call from a folder, which would be of another table of runs."""
    for name in ("comparison.md", "comparison.json", "tradeoff.png", "tradeoff.svg"):
        (folder / name).unlink(missing_ok=True)


def write(comparison: SweepComparison, folder: Path) -> None:
    """Write comparison.md, comparison.json, and the figure as tradeoff.png and tradeoff.svg into a folder."""
    write_text(folder / "comparison.md", markdown(comparison))
    environment = describe_environment(torch.device("cpu"))
    write_json(folder / "comparison.json", {**comparison.to_dict(), "environment": environment})
    for name, content in figure_files("tradeoff", tradeoff(comparison)).items():
        write_bytes(folder / name, content)
