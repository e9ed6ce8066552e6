"""Changes of the loss of single tokens as tables and a figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from gaintune.analysis.tokens.statistics import QUANTILES, TokenChanges
from gaintune.analysis.tokens.survey import TokenSurvey
from gaintune.report import INK, NONE, RULE, figure_files, look, markdown_table, styled
from gaintune.results import Interval
from gaintune.storage import write_bytes, write_json, write_text


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
        _with_ends(one.mean, "+.4f"),
        f"{one.mean_absolute:.4f}",
        NONE if one.skew is None else f"{one.skew:+.2f}",
        NONE if one.coherence is None else _with_ends(one.coherence, ".3f"),
        f"{100 * one.better:.1f} %",
        f"{100 * one.worse:.1f} %",
        f"{one.tokens:,}",
    ]


HEADS = ("mean change, nats", "mean size", "skew", "coherence", "better", "worse", "tokens")


def _with_ends(figure: Interval, form: str) -> str:
    if figure.low is None or figure.high is None:
        return f"{figure.value:{form}}"
    return f"{figure.value:{form}} [{figure.low:{form}}, {figure.high:{form}}]"


def markdown(survey: TokenSurvey) -> str:
    """A table for each domain."""
    parts = [
        "Change of the loss of every scored token, adapted minus base, in nats (negative is better). Coherence is "
        "|mean| / mean size: 0 where changes cancel, 1 where all go one way. Intervals are a bootstrap over "
        "blocks, widened for few blocks.\n"
    ]
    for domain, adapters in survey.changes.items():
        heads = [head[:1].upper() + head[1:] for head in HEADS]
        frame = pd.DataFrame(
            [cells(one) for one in adapters.values()], index=list(adapters), columns=heads, dtype=object
        )
        parts.append(f"{domain}:\n\n{markdown_table(frame, 'Adapter')}")
    return "\n".join(parts)


def record_values(survey: TokenSurvey) -> dict[str, Any]:
    """Everything as plain values for JSON."""
    return {
        "quantiles": list(QUANTILES),
        "changes": {
            domain: {label: one.to_dict() for label, one in adapters.items()}
            for domain, adapters in survey.changes.items()
        },
        "provenance": survey.provenance.to_dict(),
    }


def _panel(axes: Axes, domain: str, adapters: dict[str, TokenChanges]) -> None:
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
    axes.grid(axis="y", color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, which="both")


def figure(survey: TokenSurvey) -> Figure:
    """Histograms of the changes, a panel for each domain and a line for each adapter, with the means."""

    def draw() -> Figure:
        count = len(survey.changes)
        columns = min(count, 3)
        rows = -(-count // columns)
        sheet = Figure(figsize=(max(3.6 * columns, 5.6), 0.9 + 2.7 * rows), layout="constrained")
        grid = sheet.subplots(rows, columns, squeeze=False)
        for axes in list(grid.flat)[count:]:
            axes.set_axis_off()
        for axes, (domain, adapters) in zip(grid.flat, survey.changes.items(), strict=False):
            _panel(axes, domain, dict(adapters))
        labels = list(next(iter(survey.changes.values())))
        handles = [
            Line2D([], [], color=look(index).colour, linestyle=look(index).dashes, linewidth=1.5, label=label)
            for index, label in enumerate(labels)
        ]
        across = min(3, len(handles))
        sheet.legend(handles=handles, loc="outside upper center", ncols=across, frameon=False, handlelength=3)
        told = "left is better; upright lines are means; the outermost bins hold all beyond"
        sheet.supxlabel(f"change of a token's loss, nats ({told})", fontsize=9)
        sheet.supylabel("tokens in a bin, %", fontsize=9)
        return sheet

    return styled(draw)


def write(survey: TokenSurvey, folder: Path) -> None:
    """Write tokens.csv, .md and .json, tokens-histogram.csv, and the figure as PNG and SVG into a folder."""
    write_text(folder / "tokens.csv", table(survey).to_csv(index=False, lineterminator="\n"))
    write_text(folder / "tokens-histogram.csv", histogram_table(survey).to_csv(index=False, lineterminator="\n"))
    write_text(folder / "tokens.md", markdown(survey))
    write_json(folder / "tokens.json", record_values(survey))
    for name, content in figure_files("tokens", figure(survey)).items():
        write_bytes(folder / name, content)
