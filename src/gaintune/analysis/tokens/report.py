"""Changes of the loss of single tokens as tables and a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gaintune.analysis.base import Headline, Result, Subject
from gaintune.analysis.drawing import drawn, legend, panels, ruled, with_ends
from gaintune.analysis.tokens.statistics import QUANTILES, TokenChanges
from gaintune.analysis.tokens.survey import TokenSurvey
from gaintune.report import INK, NONE, look, markdown_table
from gaintune.results import Interval, bare


def table(survey: TokenSurvey) -> pd.DataFrame:
    """One row for each domain and adapter; changes in nats, negative is better."""
    rows = []
    for domain, adapters in survey.changes.items():
        for label, one in adapters.items():
            coherence = one.coherence or Interval(float("nan"), None, None)
            rows.append(
                {
                    "domain": domain,
                    "adapter": label,
                    "tokens": one.tokens,
                    "blocks": one.blocks,
                    "mean": one.mean.value,
                    "mean_low": one.mean.low,
                    "mean_high": one.mean.high,
                    "mean_absolute": one.mean_absolute,
                    "deviation": one.deviation,
                    "skew": one.skew,
                    "coherence": coherence.value,
                    "coherence_low": coherence.low,
                    "coherence_high": coherence.high,
                    "better": one.better,
                    "worse": one.worse,
                    **{f"quantile_{q:g}": value for q, value in zip(QUANTILES, one.quantiles, strict=True)},
                }
            )
    return pd.DataFrame(rows)


def histogram_table(survey: TokenSurvey) -> pd.DataFrame:
    """One row for each domain, adapter and bin; the outermost bins hold everything beyond as well."""
    rows = []
    for domain, adapters in survey.changes.items():
        for label, one in adapters.items():
            edges = np.linspace(-one.limit, one.limit, len(one.histogram) + 1)
            for low, high, count in zip(edges[:-1], edges[1:], one.histogram, strict=True):
                rows.append({"domain": domain, "adapter": label, "from": low, "to": high, "tokens": count})
    return pd.DataFrame(rows)


def cells(one: TokenChanges) -> list[str]:
    """The figures of one adapter on one domain as text, for `HEADS`."""
    return [
        with_ends(one.mean, "+.4f"),
        f"{one.mean_absolute:.4f}",
        NONE if one.skew is None else f"{one.skew:+.2f}",
        with_ends(one.coherence, ".3f"),
        f"{100 * one.better:.1f} %",
        f"{100 * one.worse:.1f} %",
        f"{one.tokens:,}",
    ]


def _frame(names: Sequence[str], adapters: Mapping[str, TokenChanges]) -> pd.DataFrame:
    """A row for each adapter on one domain, by the names it is to have."""
    heads = [head[:1].upper() + head[1:] for head in HEADS]
    return pd.DataFrame([cells(one) for one in adapters.values()], index=list(names), columns=heads, dtype=object)


HEADS = ("mean change, nats", "mean size", "skew", "coherence", "better", "worse", "tokens")


def markdown(survey: TokenSurvey) -> str:
    """A table for each domain."""
    parts = [
        "Change of the loss of every scored token, adapted minus base, in nats (negative is better). Coherence is "
        "|mean| / mean size: 0 where changes cancel, 1 where all go one way. Intervals are a bootstrap over "
        "blocks, widened for few blocks.\n"
    ]
    for domain, adapters in survey.changes.items():
        parts.append(f"{domain}:\n\n{markdown_table(_frame(list(adapters), adapters), 'Adapter')}")
    return "\n".join(parts)


def record_values(survey: TokenSurvey) -> dict[str, Any]:
    """Everything as plain values for JSON."""
    return {
        "quantiles": list(QUANTILES),
        "changes": {
            domain: {label: one.to_dict() for label, one in adapters.items()}
            for domain, adapters in survey.changes.items()
        },
    }


def _panel(axes: Axes, domain: str, adapters: Mapping[str, TokenChanges]) -> None:
    """Histograms of one domain: a line for each adapter, an upright one at its mean, log scale down to one token."""
    for index, one in enumerate(adapters.values()):
        style = look(index)
        edges = np.linspace(-one.limit, one.limit, len(one.histogram) + 1)
        shares = 100 * np.maximum(np.array(one.histogram), 0.1) / one.tokens  # an empty bin is below what is shown
        axes.stairs(shares, edges, baseline=None, color=style.colour, linewidth=1.2, alpha=0.9)
        axes.axvline(one.mean.value, color=style.colour, linestyle=style.dashes, linewidth=0.9, alpha=0.8)
    axes.axvline(0, color=INK, linewidth=0.8, zorder=0)
    axes.set_yscale("log")
    axes.set_ylim(bottom=70 / max(one.tokens for one in adapters.values()))
    axes.yaxis.set_major_formatter("{x:g}")
    limit = max(one.limit for one in adapters.values())
    axes.set_xlim(-limit, limit)
    axes.set_title(domain, loc="left")
    ruled(axes, which="both")


@drawn
def figure(survey: TokenSurvey) -> Figure:
    """Histograms of the changes, a panel for each domain and a line for each adapter, with the means."""
    count = len(survey.changes)
    sheet, grid = panels(count, min(count, 3), lambda rows, columns: (max(3.6 * columns, 5.6), 0.9 + 2.7 * rows))
    for axes, (domain, adapters) in zip(grid, survey.changes.items(), strict=True):
        _panel(axes, domain, adapters)
    legend(sheet, list(next(iter(survey.changes.values()))), 3, linewidth=1.5)
    told = "left is better; upright lines are means; the outermost bins hold all beyond"
    sheet.supxlabel(f"change of a token's loss, nats ({told})", fontsize=9)
    sheet.supylabel("tokens in a bin, %", fontsize=9)
    return sheet


def result(survey: TokenSurvey, subject: Subject, *_: Any) -> Result:
    """Put the survey together.

    Numbers: `LABEL.DOMAIN.mean` in nats and `LABEL.DOMAIN.coherence`, with intervals over blocks; `.size`, the mean
    size of a change, and `.skew`, without.
    """
    numbers: dict[str, Interval] = {}
    without: dict[str, str] = {}
    shown: dict[str, pd.DataFrame] = {}
    for domain, found in survey.changes.items():
        for label, one in zip(subject.names or found, found.values(), strict=True):
            name = f"{label}.{domain}"
            numbers |= {f"{name}.mean": one.mean, f"{name}.size": bare(one.mean_absolute)}
            for figure_name, value in (
                ("coherence", one.coherence),
                ("skew", None if one.skew is None else bare(one.skew)),
            ):
                if value is None:
                    without[f"{name}.{figure_name}"] = "no loss changed"
                else:
                    numbers[f"{name}.{figure_name}"] = value
        title = f"{domain}: change of every token's loss, intervals over blocks"
        shown[title] = _frame(subject.names or list(found), found)
    rows = [[text, label, *cells(one)] for text, found in survey.changes.items() for label, one in found.items()]
    return Result(
        headline=Headline(["domain", "adapter", *HEADS], rows, numeric=2),
        tables={"tokens": table(survey), "tokens-histogram": histogram_table(survey)},
        markdown=markdown(survey),
        record=record_values(survey),
        provenance=survey.provenance.to_dict(),
        figures={"tokens": figure(survey)},
        numbers=numbers,
        without=without,
        shown=shown,
    )
