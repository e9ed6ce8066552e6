"""Show what gains share, and what is left of transfer with and without it, as tables and a figure."""

from __future__ import annotations

from dataclasses import astuple
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, to_hex
from matplotlib.figure import Figure

from gaintune.analysis.base import Headline, Result
from gaintune.analysis.drawing import drawn
from gaintune.analysis.transfer.survey import Ablation, Part, Sharing, Transfer
from gaintune.report import (
    INK,
    LineStyle,
    diverging,
    ink_on,
    markdown_table,
    ruled,
    style_of,
    with_interval,
    without_frame,
)
from gaintune.results import Interval, exact

NAMES: dict[Part, str] = {
    "whole": "whole adapter",
    "shared": "shared part alone",
    "own": "shared part removed",
    "signs": "shared part, random signs",
    "norm": "whole adapter at the shared part's norm",
}
MEANINGS = {
    "mean": "the mean vector of all adapters",
    "principal": "what each adapter has along their first principal direction",
    "held-out": "the mean vector of the adapters that were not trained on the measured domain",
    "cross-fitted": "the projection of each adapter on the mean vector of the others that were not trained on the "
    "measured domain",
}


def table(transfer: Transfer) -> pd.DataFrame:
    """Make a row for each component, part, trained and measured domain; changes in % of the base's perplexity."""
    rows = []
    for ablation in transfer.ablations:
        for key, loss in ablation.losses.items():
            rows.append([ablation.component, *key, loss.perplexity, *astuple(ablation.change(*key))])
    columns = ["component", "part", "learnt", "measured", "perplexity", "change", "low", "high"]
    return pd.DataFrame(rows, columns=columns)


def correlation_table(sharing: Sharing) -> pd.DataFrame:
    """Make a row for each two adapters: Pearson correlation and cosine of their vectors v."""
    first, second = np.triu_indices(len(sharing.labels), 1)
    names = np.array(sharing.labels, dtype=object)
    values = {"correlation": sharing.correlations[first, second], "cosine": sharing.cosines[first, second]}
    return pd.DataFrame({"first": names[first], "second": names[second], **values})


def markdown(transfer: Transfer) -> str:
    """Write correlations, shares and every ablation, with what the words mean."""
    sharing = transfer.sharing
    names, pairs = sharing.labels, sharing.pairs
    correlations = pd.DataFrame(sharing.correlations, index=names, columns=names).map("{:+.3f}".format)
    share = {
        "Mean vector's share of the variance": _percent(sharing.mean_share),
        f"The same of {len(names)} vectors with nothing in common": _percent(sharing.chance_share),
        "Common share, less what chance gives": _percent(sharing.common_share),
        "First principal direction's share": _percent(sharing.principal_share),
        "Of each adapter, along the mean": _percent(*sharing.explained),
        "Of each adapter, along the mean of the others": _percent(*sharing.explained_by_others),
        "Features in which all signs agree": _percent(sharing.agreeing),
        "The same by chance": _percent(2 / 2 ** len(names)),
        "Variance in those features": _percent(sharing.agreeing_energy),
    }
    parts = [
        f"Gains of {len(names)} separately trained adapters: {', '.join(names)}. Variance is around a gain of 1.",
        f"Correlations of the gains, {min(pairs):+.3f} to {max(pairs):+.3f}:",
        markdown_table(correlations, "Trained on"),
        markdown_table(pd.DataFrame({"Share": share}, dtype=object), "What they share"),
    ]
    for ablation in transfer.ablations:
        rows = []
        for part in ablation.parts:
            left = with_interval(ablation.left(part), "%")
            cells = [with_interval(ablation.transfer(part)), left, with_interval(ablation.in_domain(part))]
            rows.append([*cells, with_interval(ablation.unseen(part))] if ablation.watched else cells)
        heads = ["Transfer", "Left of it", "In-domain", f"Never trained ({', '.join(ablation.watched)})"]
        frame = pd.DataFrame(
            rows, index=[NAMES[part] for part in ablation.parts], columns=heads[: len(rows[0])], dtype=object
        )
        parts += [
            f"Shared is {MEANINGS[ablation.component]}. Change of perplexity in %, mean over pairs of different "
            "domains, paired by blocks; negative is better:",
            markdown_table(frame, "Gains"),
        ]
        if ablation.reports_sizes:
            parts.append(f"Norm of the shared part: {_percent(*ablation.sizes.values())} of the whole adapter's.")
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def _percent(*shares: float) -> str:
    low, high = f"{100 * min(shares):.1f}", f"{100 * max(shares):.1f}"
    return f"{low} %" if len(shares) == 1 else f"{low}–{high} %"


def _correlations(axes: Axes, sharing: Sharing) -> None:
    """Draw the correlation of every two adapters, each cell with its number."""
    count, colors, scale = len(sharing.labels), diverging().reversed(), Normalize(-1, 1)
    values = np.where(np.eye(count, dtype=bool), np.nan, sharing.correlations)
    axes.pcolormesh(np.ma.masked_invalid(values), cmap=colors, norm=scale, edgecolors="white", linewidth=1)
    for row, column in zip(*np.nonzero(~np.eye(count, dtype=bool)), strict=True):
        value = float(values[row, column])
        ink = ink_on(to_hex(colors(scale(value))))
        axes.text(column + 0.5, row + 0.5, f"{value:+.2f}", ha="center", va="center", fontsize=8, color=ink)
    middles = np.arange(count) + 0.5
    axes.set_xticks(middles, sharing.labels, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_yticks(middles, sharing.labels)
    axes.invert_yaxis()
    axes.set_aspect("equal")
    without_frame(axes)
    axes.set_title("Correlation of the gains", loc="left")


def _dots(axes: Axes, transfer: Transfer) -> None:
    """Draw transfer of the whole adapters and of their parts, with intervals; in-domain as hollow marks."""
    labels = []
    rows: list[tuple[str, Part, Ablation]] = [("", "whole", transfer.ablations[0])]
    rows.extend((ablation.component, part, ablation) for ablation in transfer.ablations for part in ablation.parts[1:])
    for height, (component, part, ablation) in enumerate(rows):
        style = style_of(list(NAMES).index(part))
        _dot(axes, height - 0.12, ablation.transfer(part), style, filled=True)
        _dot(axes, height + 0.16, ablation.in_domain(part), style, filled=False)
        labels.append(f"{NAMES[part]}\n({component})" if component else NAMES[part])
    axes.axvline(0, color=INK, linewidth=0.9, zorder=0)
    axes.set_yticks(range(len(rows)), labels)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("change of perplexity, %: other domains (filled), own domain (hollow)")
    ruled(axes, "x")
    axes.set_title("What is left of transfer", loc="left")


def _dot(axes: Axes, height: float, figure: Interval, style: LineStyle, *, filled: bool) -> None:
    if figure.low is not None and figure.high is not None:
        alpha = 1 if filled else 0.5
        axes.plot([figure.low, figure.high], [height, height], color=style.color, linewidth=1.4, alpha=alpha)
    face = style.color if filled else "white"
    axes.plot([figure.value], [height], style.marker, color=style.color, markerfacecolor=face, markersize=6)


@drawn
def figure(transfer: Transfer) -> Figure:
    """Draw correlations of the gains, and transfer by whole adapters and by their parts."""
    count, rows = len(transfer.sharing.labels), 1 + sum(len(ablation.parts) - 1 for ablation in transfer.ablations)
    size = (5.6 + 0.55 * count + 1.2, max(1.4 + 0.55 * count, 1.2 + 0.62 * rows, 3.0))
    sheet = Figure(figsize=size, layout="constrained")
    left, right = sheet.subplots(1, 2, width_ratios=[0.55 * count + 0.8, 4.4])
    _correlations(left, transfer.sharing)
    _dots(right, transfer)
    return sheet


def result(transfer: Transfer, *_: Any) -> Result:
    """Put the survey together.

    Numbers: `correlation.smallest`, `.largest` and `.mean`; `common_share` in %; `COMPONENT.PART.transfer`,
    `.in_domain` and `.left` in %, for the parts whole, shared and own, and for the controls signs and norm if asked.
    """
    sharing, pairs = transfer.sharing, transfer.sharing.pairs
    numbers = {
        "correlation.smallest": exact(min(pairs)),
        "correlation.largest": exact(max(pairs)),
        "correlation.mean": exact(sum(pairs) / len(pairs)),
        "common_share": exact(100 * sharing.common_share),
    }
    without, shown = {}, {}
    rows: list[list[str | Interval | None]] = []
    for ablation in transfer.ablations:
        cells = {}
        for part in ablation.parts:
            name, whole, own = f"{ablation.component}.{part}", ablation.transfer(part), ablation.in_domain(part)
            numbers |= {f"{name}.transfer": whole, f"{name}.in_domain": own}
            if (left := ablation.left(part)) is None:
                without[f"{name}.left"] = "the interval of the whole's transfer holds 0"
            else:
                numbers[f"{name}.left"] = left
            rows.append([ablation.component, NAMES[part], whole, left, own])
            cells[NAMES[part]] = [with_interval(whole), with_interval(left, "%"), with_interval(own)]
        shown[f"Shared is {MEANINGS[ablation.component]}; intervals over validation blocks"] = pd.DataFrame.from_dict(
            cells, orient="index", columns=["Transfer to other domains, %", "Left of it", "Own domain, %"]
        )
    heads = ["shared is", "gains", "transfer to other domains", "left of it", "own domain"]
    common, mean, chance = map(_percent, (sharing.common_share, sharing.mean_share, sharing.chance_share))
    return Result(
        headline=Headline(heads, rows, numeric=2, title="Change of perplexity (negative is better)"),
        remarks=[
            f"correlations {min(pairs):+.3f} to {max(pairs):+.3f}; common share of the variance {common} (the mean's "
            f"{mean}, by chance {chance})"
        ],
        tables={"transfer": table(transfer), "transfer-correlations": correlation_table(sharing)},
        markdown=markdown(transfer),
        record=transfer.to_dict(),
        provenance=transfer.provenance.to_dict(),
        figures={"transfer": figure(transfer)},
        numbers=numbers,
        without=without,
        shown=shown,
    )
