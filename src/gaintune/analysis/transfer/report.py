"""What gains share, and what is left of transfer with and without it, as tables and one figure."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, to_hex
from matplotlib.figure import Figure

from gaintune.analysis.base import Headline, Result
from gaintune.analysis.drawing import drawn, framed_by_nothing, ruled
from gaintune.analysis.transfer.statistics import Sharing
from gaintune.analysis.transfer.survey import PARTS, Ablation, Part, Transfer
from gaintune.report import (
    INK,
    MUTED,
    diverging,
    ink_on,
    look,
    markdown_table,
    with_interval,
)
from gaintune.results import Interval, exact

NAMES: dict[Part, str] = {"whole": "whole adapter", "shared": "shared part alone", "own": "shared part removed"}
MEANINGS = {
    "mean": "the mean vector of all adapters",
    "principal": "what each adapter has along their first principal direction",
    "held-out": "the mean vector of the adapters that did not learn the measured domain",
}


def table(found: Transfer) -> pd.DataFrame:
    """One row for each component, part, learnt and measured domain; changes in % of the base's perplexity."""
    rows = []
    for one in found.ablations:
        for (part, learnt, measured), loss in one.losses.items():
            change = one.change(part, learnt, measured)
            named = {"component": one.component, "part": part, "learnt": learnt, "measured": measured}
            interval = {"change": change.value, "low": change.low, "high": change.high}
            rows.append({**named, "perplexity": loss.perplexity, **interval})
    return pd.DataFrame(rows)


def correlation_table(sharing: Sharing) -> pd.DataFrame:
    """One row for each two adapters: Pearson correlation and cosine of their vectors v."""
    names = sharing.labels
    rows = [
        {
            "first": names[i],
            "second": names[j],
            "correlation": sharing.correlations[i, j],
            "cosine": sharing.cosines[i, j],
        }
        for i, j in zip(*np.triu_indices(len(names), 1), strict=True)
    ]
    return pd.DataFrame(rows)


def markdown(found: Transfer) -> str:
    """Correlations, shares and every ablation, with what the words mean."""
    sharing = found.sharing
    names, pairs = sharing.labels, sharing.pairs
    correlations = pd.DataFrame(
        [[f"{value:+.3f}" for value in row] for row in sharing.correlations], index=names, columns=names, dtype=object
    )
    share = {
        "Mean vector's share of the variance": f"{100 * sharing.mean_share:.1f} %",
        f"The same of {len(names)} vectors with nothing in common": f"{100 * sharing.chance_share:.1f} %",
        "Common share, less what chance gives": f"{100 * sharing.common_share:.1f} %",
        "First principal direction's share": f"{100 * sharing.principal_share:.1f} %",
        "Of each adapter, along the mean": _range(sharing.explained),
        "Of each adapter, along the mean of the others": _range(sharing.explained_by_others),
        "Features in which all signs agree": f"{100 * sharing.agreeing:.1f} %",
        "The same by chance": f"{200 / 2 ** len(names):.1f} %",
        "Variance in those features": f"{100 * sharing.agreeing_energy:.1f} %",
    }
    parts = [
        f"Gains of {len(names)} separately trained adapters: {', '.join(names)}. Variance is around a gain of 1.",
        f"Correlations of the gains, {min(pairs):+.3f} to {max(pairs):+.3f}:",
        markdown_table(correlations, "Learnt"),
        markdown_table(pd.DataFrame({"Share": share}, dtype=object), "What they share"),
    ]
    for one in found.ablations:
        parts += [
            f"Shared is {MEANINGS[one.component]}. Change of perplexity in %, mean over pairs of different domains, "
            "paired by blocks; negative is better:",
            markdown_table(_ablation_frame(one), "Gains"),
        ]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def _range(values: tuple[float, ...]) -> str:
    return f"{100 * min(values):.1f}–{100 * max(values):.1f} %"


def _ablation_frame(one: Ablation) -> pd.DataFrame:
    rows = []
    for part in PARTS:
        figures = [(one.transfer(part), ""), (one.left(part), "%"), (one.in_domain(part), "")]
        cells = [with_interval(figure, unit) for figure, unit in figures]
        rows.append([*cells, with_interval(one.unseen(part))] if one.watched else cells)
    heads = ["Transfer", "Left of it", "In-domain", f"Never learnt ({', '.join(one.watched)})"]
    columns = heads if one.watched else heads[:3]
    return pd.DataFrame(rows, index=[NAMES[part] for part in PARTS], columns=columns, dtype=object)


def _correlations(axes: Axes, sharing: Sharing) -> None:
    """Correlations of every two adapters, each cell with its number."""
    count, colours, scale = len(sharing.labels), diverging().reversed(), Normalize(-1, 1)
    values = np.where(np.eye(count, dtype=bool), np.nan, sharing.correlations)
    axes.pcolormesh(np.ma.masked_invalid(values), cmap=colours, norm=scale, edgecolors="white", linewidth=1)
    for row, column in zip(*np.nonzero(~np.eye(count, dtype=bool)), strict=True):
        value = float(values[row, column])
        ink = ink_on(to_hex(colours(scale(value))))
        axes.text(column + 0.5, row + 0.5, f"{value:+.2f}", ha="center", va="center", fontsize=8, color=ink)
    places = np.arange(count) + 0.5
    axes.set_xticks(places, sharing.labels, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_yticks(places, sharing.labels)
    axes.invert_yaxis()
    axes.set_aspect("equal")
    framed_by_nothing(axes)
    axes.set_title("Correlation of the gains", loc="left")


def _dots(axes: Axes, found: Transfer) -> None:
    """Transfer of the whole adapters and of their parts, with intervals; in-domain as hollow marks."""
    labels, height = [], 0
    whole, *parts = PARTS
    drawn: list[tuple[str, Part, Ablation]] = [("", whole, found.ablations[0])]
    for one in found.ablations:
        drawn.extend((one.component, part, one) for part in parts)
    for component, part, one in drawn:
        style = look(PARTS.index(part))
        _dot(axes, height - 0.12, one.transfer(part), style.colour, style.marker, filled=True)
        _dot(axes, height + 0.16, one.in_domain(part), style.colour, style.marker, filled=False)
        labels.append(f"{NAMES[part]}\n({component})" if component else NAMES[part])
        height += 1
    axes.axvline(0, color=INK, linewidth=0.9, zorder=0)
    axes.set_yticks(range(height), labels)
    axes.set_ylim(height - 0.5, -0.5)
    axes.set_xlabel("change of perplexity, %: other domains (filled), own domain (hollow)")
    ruled(axes, "x")
    axes.set_title("What is left of transfer", loc="left")


def _dot(axes: Axes, height: float, figure: Interval, colour: str, marker: str, *, filled: bool) -> None:
    if figure.low is not None and figure.high is not None:
        axes.plot([figure.low, figure.high], [height, height], color=colour, linewidth=1.4, alpha=1 if filled else 0.5)
    face = colour if filled else "white"
    axes.plot([figure.value], [height], marker, color=colour, markerfacecolor=face, markersize=6)


@drawn
def figure(found: Transfer) -> Figure:
    """Correlations of the gains, and transfer by whole adapters and by their parts."""
    count = len(found.sharing.labels)
    rows = 1 + 2 * len(found.ablations)
    size = (5.6 + 0.55 * count + 1.2, max(1.4 + 0.55 * count, 1.2 + 0.62 * rows, 3.0))
    sheet = Figure(figsize=size, layout="constrained")
    left, right = sheet.subplots(1, 2, width_ratios=[0.55 * count + 0.8, 4.4])
    _correlations(left, found.sharing)
    _dots(right, found)
    for axes in (left, right):
        axes.xaxis.label.set_color(MUTED)
    return sheet


def result(found: Transfer, *_: Any) -> Result:
    """Put the survey together.

    Numbers: `correlation.smallest`, `.largest` and `.mean`; `common_share` in %; `COMPONENT.PART.transfer`,
    `.in_domain` and `.left` in %, for the parts whole, shared and own.
    """
    sharing, pairs = found.sharing, found.sharing.pairs
    numbers = {
        "correlation.smallest": exact(min(pairs)),
        "correlation.largest": exact(max(pairs)),
        "correlation.mean": exact(sum(pairs) / len(pairs)),
        "common_share": exact(100 * sharing.common_share),
    }
    without, shown = {}, {}
    rows: list[list[str | Interval | None]] = []
    heads = ["Transfer to other domains, %", "Left of it", "Own domain, %"]
    for one in found.ablations:
        cells = {}
        for part in PARTS:
            name, whole, own, left = f"{one.component}.{part}", one.transfer(part), one.in_domain(part), one.left(part)
            numbers |= {f"{name}.transfer": whole, f"{name}.in_domain": own}
            if left is None:
                without[f"{name}.left"] = "the interval of the whole's transfer holds 0"
            else:
                numbers[f"{name}.left"] = left
            rows.append([one.component, NAMES[part], whole, left, own])
            cells[NAMES[part]] = [with_interval(whole), with_interval(left, "%"), with_interval(own)]
        title = f"Shared is {MEANINGS[one.component]}; intervals over validation blocks"
        shown[title] = pd.DataFrame.from_dict(cells, orient="index", columns=heads)
    shares = [100 * share for share in (sharing.common_share, sharing.mean_share, sharing.chance_share)]
    remark = (
        f"correlations {min(pairs):+.3f} to {max(pairs):+.3f}; common share of the variance {shares[0]:.1f} % (the "
        f"mean's {shares[1]:.1f} %, by chance {shares[2]:.1f} %)"
    )
    return Result(
        headline=Headline(
            ["shared is", "gains", "transfer to other domains", "left of it", "own domain"],
            rows,
            numeric=2,
            title="Change of perplexity (negative is better)",
        ),
        remarks=[remark],
        tables={"transfer": table(found), "transfer-correlations": correlation_table(sharing)},
        markdown=markdown(found),
        record=found.to_dict(),
        provenance=found.provenance.to_dict(),
        figures={"transfer": figure(found)},
        numbers=numbers,
        without=without,
        shown=shown,
    )
