"""A sweep's comparison as Markdown, JSON and the trade-off figure: earlier domains against in-domain, over rates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
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
    figure_files,
    markdown_table,
    ruled,
    signed,
    style_of,
    styled,
    with_interval,
)
from gaintune.results import Interval
from gaintune.storage import describe_environment, write_bytes, write_json, write_text
from gaintune.workflows.sweep.compare import CurvePair, Pair, Point, SweepComparison

FILES = ("comparison.md", "comparison.json", "tradeoff.png", "tradeoff.svg")
# offsets and alignment of rates beside a variant's points, so that those of neighbors do not cover each other
LABELS = (((5, 4), "left"), ((5, -10), "left"), ((-5, 4), "right"), ((-5, -10), "right"))


def heading(figure: str) -> str:
    """Return a figure's name in tables."""
    return FIGURES[figure][0]


def point_frame(points: tuple[Point, ...], comparison: SweepComparison) -> pd.DataFrame:
    """Make a row for each variant and rate: its figures with intervals over replicates, in %."""
    columns = ["LR", "In-domain", heading(comparison.figure), comparison.over.capitalize()]
    rows = [
        [f"{point.lr:g}", with_interval(point.in_domain), with_interval(point.figure), str(point.replicates)]
        for point in points
    ]
    return pd.DataFrame(rows, index=[point.variant for point in points], columns=columns, dtype=object)


def pair_sentence(pair: Pair, comparison: SweepComparison) -> str:
    """Compare two variants in a sentence; the better one is named only if matched and if the interval shows it."""
    names = f"{pair.first} minus {pair.second}"
    if pair.difference is None or pair.in_domain is None:
        return f"{names}: not compared at {pair.first_lr:g} and {pair.second_lr:g} ({pair.unmatched})"
    verdict = pair.unmatched or (f"{pair.better} is better" if pair.better else "no difference shown")
    return (
        f"{names}: {with_interval(pair.difference, 'points')} on {_lower(comparison)}, with "
        f"{with_interval(pair.in_domain, 'points')} left in-domain ({_counted(pair.replicates, comparison)}, sign-flip "
        f"p = {pair.p:.3g}): {verdict}"
    )


def curve_sentence(pair: CurvePair, comparison: SweepComparison) -> str:
    """Compare two variants in a sentence by their curves over all rates."""
    names = f"{pair.first} minus {pair.second}"
    if pair.curve is None:
        return f"{names}: not compared by curve ({pair.reason})"
    curve = pair.curve
    verdict = f"{pair.better} is better" if pair.better else "no difference shown"
    left = [
        f"{name}'s {', '.join(f'{rate:g}' for rate in rates)}"
        for name, rates in zip((pair.first, pair.second), curve.left_out, strict=True)
        if rates
    ]
    beyond = f"; beyond the best in-domain change, so not on the curve: {', '.join(left)}" if left else ""
    return (
        f"{names}: {with_interval(curve.difference, 'points')} on {_lower(comparison)}, mean over in-domain changes "
        f"from {signed(curve.high)} to {signed(curve.low)} % ({_counted(curve.replicates, comparison)}{beyond}): "
        f"{verdict}"
    )


def target_title(comparison: SweepComparison) -> str:
    """Return a title that says how the rates were chosen, for each budget if there are several."""
    parts = []
    for target in comparison.targets:
        change = "no change, as nothing improves" if target.in_domain is None else f"{signed(target.in_domain)} %"
        parts.append(change + (f" ({target.budget:,} tokens)" if len(comparison.targets) > 1 else ""))
    return f"Rates whose in-domain change is nearest {', '.join(parts)}"


def remarks(comparison: SweepComparison) -> list[str]:
    """List what a reader of the comparison must know: variants matched with nothing, and runs without numbers."""
    lines = [
        f"{name} improves in-domain at no rate: it has no part in the target, and is matched with nothing."
        for target in comparison.targets
        for name in target.never
    ]
    lines += [f"{note[0].upper()}{note[1:]}." for note in comparison.notes]
    if comparison.unfinished:
        lines.append(f"{plural(comparison.unfinished, 'run')} of the grid did not finish and count nowhere here:")
    return lines + [
        f"{one.variant} at {one.lr:g}: {plural(one.runs, 'run')} ({one.error})" for one in comparison.missing
    ]


def _counted(count: int, comparison: SweepComparison) -> str:
    return plural(count, comparison.over.removesuffix("s"))


def _lower(comparison: SweepComparison) -> str:
    name = heading(comparison.figure)
    return name[0].lower() + name[1:]


def markdown(comparison: SweepComparison) -> str:
    """Write all comparisons as Markdown."""
    parts = [
        f"Change of validation perplexity against the base in %, lower is better; {100 * comparison.confidence:g} % "
        f"intervals over {comparison.over} and validation blocks.\n",
        markdown_table(point_frame(comparison.points, comparison), "Method"),
        f"{target_title(comparison)}:\n",
        markdown_table(point_frame(comparison.matched, comparison), "Method"),
        *(f"- {pair_sentence(pair, comparison)}" for pair in comparison.pairs),
    ]
    if comparison.curves:
        parts += ["\nBy curves over all rates:\n", *(f"- {curve_sentence(c, comparison)}" for c in comparison.curves)]
    if lines := remarks(comparison):
        parts += ["\nRemarks:\n", *(f"- {line}" for line in lines)]
    return "\n".join([*parts, ""])


def tradeoff(comparison: SweepComparison) -> Figure:
    """Draw earlier domains (up) against in-domain change (across): a line through each variant's rates."""

    def draw() -> Figure:
        sheet = Figure(figsize=(6.4, 4.6), layout="constrained")
        axes = sheet.subplots()
        for index, variant in enumerate(dict.fromkeys(point.variant for point in comparison.points)):
            _draw_variant(axes, [point for point in comparison.points if point.variant == variant], index)
        axes.axhline(0, color=INK, linewidth=0.9, zorder=1)
        axes.set(xlabel="in-domain change, %", ylabel=f"{_lower(comparison)}, %")
        ruled(axes, "both")
        beyond = _frame(axes, comparison.points)
        title = "Left and down is better; numbers are learning rates, faint dots runs"
        if beyond:
            title += f"\n(the intervals of {plural(beyond, 'point')} reach beyond the frame)"
        axes.set_title(title, loc="left")
        sheet.legend(loc="outside lower center", ncols=3, frameon=False, handlelength=3)
        return sheet

    return styled(draw)


def _frame(axes: Axes, points: Sequence[Point]) -> int:
    """Fit the axes and return how many points have an interval that ends outside.

    Curves are fitted to values and runs, since intervals of few replicates would leave no room for them. Where no
    variant has several rates there are no curves, and intervals are in the frame.
    """
    runs = [run for point in points for run in point.runs]
    curves = len(points) > len({point.variant for point in points})
    across = _side([x for x, _ in runs], [point.in_domain for point in points], fit=not curves)
    low, high = _side([y for _, y in runs], [point.figure for point in points], fit=not curves)
    up = (min(low, 0.0), max(high, 0.0))  # includes the base's line
    axes.set(xlim=across, ylim=up)
    return sum(not (_ends_in(point.in_domain, across) and _ends_in(point.figure, up)) for point in points)


def _side(runs: Sequence[float], intervals: Sequence[Interval], *, fit: bool) -> tuple[float, float]:
    """Return the ends of an axis, with room for the rates at its edges; `fit` includes the intervals' ends."""
    values = [*runs, *(interval.value for interval in intervals)]
    if fit:
        values += [end for interval in intervals for end in (interval.low, interval.high) if end is not None]
    low, high = min(values), max(values)
    room = 0.15 * (high - low or 1.0)
    return low - room, high + room


def _ends_in(interval: Interval, side: tuple[float, float]) -> bool:
    return interval.low is None or interval.high is None or side[0] <= interval.low <= interval.high <= side[1]


def _draw_variant(axes: Axes, points: list[Point], index: int) -> None:
    style = style_of(index)
    x, y = [point.in_domain.value for point in points], [point.figure.value for point in points]
    axes.plot(
        x, y, color=style.color, linestyle=style.dashes, marker=style.marker, markersize=5, label=points[0].variant
    )
    across, up = zip(*((_reach(point.in_domain), _reach(point.figure)) for point in points), strict=True)
    bars = {"ecolor": style.color, "elinewidth": 0.9, "alpha": 0.5, "fmt": "none", "zorder": 2}
    axes.errorbar(x, y, xerr=list(zip(*across, strict=True)), yerr=list(zip(*up, strict=True)), **bars)
    runs = [run for point in points if len(point.runs) > 1 for run in point.runs]
    if runs:
        axes.scatter(*zip(*runs, strict=True), s=9, color=style.color, alpha=0.35, linewidths=0, zorder=1.5)
    away, side = LABELS[index % len(LABELS)]
    text = {"textcoords": "offset points", "ha": side, "color": style.color, "fontsize": 7, "zorder": 4}
    for point in points:
        position = (point.in_domain.value, point.figure.value)
        label = axes.annotate(f"{point.lr:g}", position, xytext=away, **text)
        label.set_path_effects([withStroke(linewidth=2.0, foreground=PAGE)])


def _reach(interval: Interval) -> tuple[float, float]:
    """Return the distances of an interval's ends from its value; 0 where it has none."""
    if interval.low is None or interval.high is None:
        return 0.0, 0.0
    return max(interval.value - interval.low, 0.0), max(interval.high - interval.value, 0.0)


def discard(folder: Path) -> None:
    """Delete the comparison of an earlier call from a folder, which would be of another table of runs."""
    for name in FILES:
        (folder / name).unlink(missing_ok=True)


def write(comparison: SweepComparison, folder: Path) -> None:
    """Write comparison.md, comparison.json, and the figure as tradeoff.png and tradeoff.svg into a folder."""
    write_text(folder / "comparison.md", markdown(comparison))
    environment = describe_environment(torch.device("cpu"))
    write_json(folder / "comparison.json", {**asdict(comparison), "environment": environment})
    for name, content in figure_files("tradeoff", tradeoff(comparison)).items():
        write_bytes(folder / name, content)
