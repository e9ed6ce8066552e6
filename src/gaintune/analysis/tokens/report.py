"""Changes of the loss of single tokens as tables and a figure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, astuple
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gaintune.analysis.base import Headline, Result, Subject, numbers_of
from gaintune.analysis.drawing import drawn, legend, line, text_frame, text_table, with_ends
from gaintune.analysis.tokens.survey import QUANTILES, TokenChanges, TokenSurvey
from gaintune.report import INK, NONE, panels, ruled
from gaintune.results import Interval, bare

COLUMNS = (
    "domain", "adapter", "tokens", "blocks", "mean", "mean_low", "mean_high", "mean_absolute", "deviation", "skew",
    "coherence", "coherence_low", "coherence_high", "better", "worse", *(f"quantile_{q:g}" for q in QUANTILES),
)  # fmt: skip
HEADS = ("adapter", "mean change, nats", "mean size", "skew", "coherence", "better", "worse", "tokens")
INTRODUCTION = (
    "Change of the loss of every scored token, adapted minus base, in nats (negative is better). Coherence is "
    "|mean| / mean size: 0 where changes cancel, 1 where all go one way. Intervals are a bootstrap over "
    "blocks, widened for few blocks.\n"
)


def table(survey: TokenSurvey) -> pd.DataFrame:
    """Return a row for each domain and adapter; changes in nats, negative is better."""
    rows = []
    for domain, label, changes in survey:
        coherence = changes.coherence or Interval(float("nan"), None, None)
        counted = (domain, label, changes.tokens, changes.blocks, *astuple(changes.mean))
        spread = (changes.mean_absolute, changes.deviation, changes.skew, *astuple(coherence))
        rows.append((*counted, *spread, changes.better, changes.worse, *changes.quantiles))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def histogram_table(survey: TokenSurvey) -> pd.DataFrame:
    """Return a row for each domain, adapter and bin; the outermost bins also hold everything beyond."""
    rows = []
    for domain, label, changes in survey:
        edges = np.linspace(-changes.limit, changes.limit, len(changes.histogram) + 1)
        for low, high, count in zip(edges[:-1], edges[1:], changes.histogram, strict=True):
            rows.append({"domain": domain, "adapter": label, "from": low, "to": high, "tokens": count})
    return pd.DataFrame(rows)


def cells(label: str, changes: TokenChanges) -> list[str]:
    """Return an adapter's figures on a domain as text, for `HEADS`."""
    skew = NONE if changes.skew is None else f"{changes.skew:+.2f}"
    mean, coherence = with_ends(changes.mean, "+.4f"), with_ends(changes.coherence, ".3f")
    better, worse = f"{100 * changes.better:.1f} %", f"{100 * changes.worse:.1f} %"
    return [label, mean, f"{changes.mean_absolute:.4f}", skew, coherence, better, worse, f"{changes.tokens:,}"]


def markdown(survey: TokenSurvey) -> str:
    """Return a table for each domain."""
    parts = [INTRODUCTION]
    for domain, adapters in survey.changes.items():
        parts.append(f"{domain}:\n\n{text_table(HEADS, [cells(*named) for named in adapters.items()])}")
    return "\n".join(parts)


def _panel(axes: Axes, domain: str, adapters: Mapping[str, TokenChanges]) -> None:
    """Draw a domain's histograms: a line and its mean for each adapter, on a log scale down to one token."""
    for index, changes in enumerate(adapters.values()):
        style = line(index, marked=False)
        edges = np.linspace(-changes.limit, changes.limit, len(changes.histogram) + 1)
        counts = np.maximum(np.array(changes.histogram), 0.1)  # an empty bin is below what is shown
        shares = 100 * counts / changes.tokens
        axes.stairs(shares, edges, baseline=None, color=style["color"], linewidth=1.2, alpha=0.9)
        axes.axvline(changes.mean.value, linewidth=0.9, alpha=0.8, **style)
    axes.axvline(0, color=INK, linewidth=0.8, zorder=0)
    axes.set_yscale("log")
    axes.set_ylim(bottom=70 / max(changes.tokens for changes in adapters.values()))
    axes.yaxis.set_major_formatter("{x:g}")
    limit = max(changes.limit for changes in adapters.values())
    axes.set_xlim(-limit, limit)
    axes.set_title(domain, loc="left")
    ruled(axes, which="both")


@drawn
def figure(survey: TokenSurvey) -> Figure:
    """Draw histograms of the changes, a panel for each domain and a line for each adapter, with the means."""
    count = len(survey.changes)
    sheet, grid = panels(count, min(count, 3), lambda rows, columns: (max(3.6 * columns, 5.6), 0.9 + 2.7 * rows))
    for axes, (domain, adapters) in zip(grid, survey.changes.items(), strict=True):
        _panel(axes, domain, adapters)
    legend(sheet, list(next(iter(survey.changes.values()))), 3, linewidth=1.5)
    note = "left is better; upright lines are means; the outermost bins hold all beyond"
    sheet.supxlabel(f"change of a token's loss, nats ({note})", fontsize=9)
    sheet.supylabel("tokens in a bin, %", fontsize=9)
    return sheet


def result(survey: TokenSurvey, subject: Subject, *_: Any) -> Result:
    """Make the result.

    Numbers: `LABEL.DOMAIN.mean` in nats and `LABEL.DOMAIN.coherence`, with intervals over blocks; `.size`, the mean
    size of a change, and `.skew`, without.
    """
    figures: dict[str, Interval | None] = {}
    shown = {}
    for domain, adapters in survey.changes.items():
        named = dict(zip(subject.names or adapters, adapters.values(), strict=True))
        for label, changes in named.items():
            own = {"mean": changes.mean, "size": bare(changes.mean_absolute), "coherence": changes.coherence}
            own["skew"] = None if changes.skew is None else bare(changes.skew)
            figures |= {f"{label}.{domain}.{name}": value for name, value in own.items()}
        title = f"{domain}: change of every token's loss, intervals over blocks"
        shown[title] = text_frame(HEADS, [cells(*each) for each in named.items()])
    numbers, without = numbers_of(figures, "no loss changed")
    rows = [[domain, *cells(label, changes)] for domain, label, changes in survey]
    return Result(
        headline=Headline(["domain", *HEADS], rows, numeric=2),
        tables={"tokens": table(survey), "tokens-histogram": histogram_table(survey)},
        markdown=markdown(survey),
        record={"quantiles": list(QUANTILES), "changes": asdict(survey)["changes"]},
        provenance=survey.provenance.to_dict(),
        figures={"tokens": figure(survey)},
        numbers=numbers,
        without=without,
        shown=shown,
    )
