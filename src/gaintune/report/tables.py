"""Write a matrix as tables: tidy CSV, Markdown, and HTML through pandas Styler (everything escaped)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from typing import Any

import pandas as pd
from markupsafe import escape
from pandas.io.formats.style import Styler

from gaintune.progress import plural
from gaintune.report.palette import bin_of, limit_of
from gaintune.report.words import FIGURES, NONE, number, signed, with_interval
from gaintune.results import Interval, Matrix, MethodMatrix, Summary


def tidy(matrix: Matrix) -> pd.DataFrame:
    """Make a row for each cell of each method; changes in % of the base's perplexity."""
    columns = ["method", "stage", "learnt", "domain", "place", "base_perplexity", "perplexity", "bits_per_byte"]
    rows = []
    for method in matrix.methods:
        for stage, row in enumerate(method.stages, start=1):
            for domain in matrix.domains:
                if cell := row.cells.get(domain):
                    names = (method.label, stage, row.domain, domain, method.place(stage - 1, domain))
                    rows.append((*names, method.base[domain].perplexity, *astuple(cell)))
    return pd.DataFrame(rows, columns=[*columns, "change_percent", "low_percent", "high_percent"])


def setting(value: Any) -> str:
    """Write a setting or count of a method."""
    if value is None or value == "":
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def summary_frame(matrix: Matrix) -> pd.DataFrame:
    """Make a row for each method: what it is, and its figures with intervals, in %."""
    heads = ["Trained parameters", "LR", *(heading for heading, _ in FIGURES.values())]
    rows = {}
    for method in matrix.methods:
        settings = [setting(method.info.get(name)) for name in ("trainable_parameters", "lr")]
        rows[method.label] = [*settings, *_figures(method.summary)]
    return _frame(heads, rows)


def comparison_frame(matrix: Matrix) -> pd.DataFrame:
    """Make a row for each method but the first: paired differences to the first, in points of %."""
    heads = ["Stages", *(heading for heading, _ in FIGURES.values())]
    rows = {f"{one.label} minus {one.against}": [str(one.stages), *_figures(one.summary)] for one in matrix.comparisons}
    return _frame(heads, rows)


def stage_frame(method: MethodMatrix) -> pd.DataFrame:
    """Make a row for each finished stage: in-domain, and means over earlier and later domains, in %."""
    heads = ["In-domain", "Mean of earlier domains", "Mean of domains not yet trained"]
    rows = {
        f"{stage} {row.domain}": list(map(with_interval, (row.in_domain, row.earlier, row.later)))
        for stage, row in enumerate(method.per_stage, start=1)
    }
    return _frame(heads, rows)


def _figures(summary: Summary) -> list[str]:
    return [with_interval(getattr(summary, name)) for name in FIGURES]


def _frame(heads: Sequence[str], rows: Mapping[str, Sequence[Any]]) -> pd.DataFrame:
    return pd.DataFrame([*rows.values()], index=[*rows], columns=[*heads], dtype=object)


def cell_frame(matrix: Matrix, method: MethodMatrix) -> pd.DataFrame:
    """Make a table of stages by domains; each entry an `Interval` in %, or None where nothing was measured."""
    rows = {
        f"{stage} {row.domain}": [row.cells[name].interval if name in row.cells else None for name in matrix.domains]
        for stage, row in enumerate(method.stages, start=1)
    }
    return _frame(matrix.domains, rows)


def base_frames(matrix: Matrix) -> list[tuple[list[str], pd.DataFrame]]:
    """Make a table of each different base on the domains, with the labels of the methods that start from it."""
    heads = ["Perplexity", "Bits per byte", "Scored tokens", "Blocks"]
    groups: dict[str, tuple[list[str], pd.DataFrame]] = {}
    for method in matrix.methods:
        rows = {}
        for name in matrix.domains:
            if one := method.base.get(name):
                rows[name] = [number(one.perplexity), f"{one.bits_per_byte:.3f}", f"{one.tokens:,}", f"{one.blocks:,}"]
        frame = _frame(heads, rows)
        groups.setdefault(frame.to_csv(), ([], frame))[0].append(method.label)
    return list(groups.values())


def markdown_table(frame: pd.DataFrame, corner: str) -> str:
    """Write a table of text as Markdown, numbers to the right; `corner` heads the column of row names."""

    def line(cells: Sequence[Any]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |\n"

    head = line([corner, *frame.columns]) + "|---|" + "---:|" * len(frame.columns) + "\n"
    return head + "".join(line([name, *row]) for name, row in zip(frame.index, frame.values.tolist(), strict=True))


def to_markdown(matrix: Matrix) -> str:
    """Write summary, paired differences, a matrix for each method and the base as Markdown."""
    confidence = f"{100 * matrix.settings.confidence:g} %"
    parts = [
        "Change of validation perplexity against the base in %, lower is better, "
        f"with {confidence} paired bootstrap intervals over blocks, widened for few blocks.\n",
        markdown_table(summary_frame(matrix), "Method"),
    ]
    if matrix.comparisons:
        parts += ["Paired differences, in points of %:\n", markdown_table(comparison_frame(matrix), "Difference")]
    for method in matrix.methods:
        if not method.stages:
            continue
        frame = cell_frame(matrix, method).map(_change)
        for name, row in zip(frame.index, method.stages, strict=True):
            frame.loc[name, row.domain] = f"**{frame.loc[name, row.domain]}**"
        caption = "a row for each stage, a column for each domain measured then; just trained in bold."
        parts += [f"{method.label}: {caption}\n", markdown_table(frame, "After stage")]
    for labels, frame in base_frames(matrix):
        of = f" ({', '.join(labels)})" if len(labels) < len(matrix.methods) else ""
        parts += [f"The untouched base{of}:\n", markdown_table(frame, "Domain")]
    if matrix.partial:
        parts.append("The run is not finished; figures cover the finished stages.\n")
    return "\n".join(parts)


def _change(figure: object) -> str:
    return signed(figure.value) if isinstance(figure, Interval) else NONE


def _html(styler: Styler) -> str:
    """Return Styler's table without its ids, which repeat, and style block, with scopes on headings.

    Entries are escaped before, so the quotes in these patterns can only be Styler's own.
    """
    html = styler.to_html(table_uuid="")
    html = re.sub(r'(<t\w+)((?: \w+="[^"]*")*?) id="T_[^"]*"', r"\1\2", html[html.index("<table") :])
    html = html.replace('<th class="col_heading', '<th scope="col" class="col_heading')
    return html.replace('<th class="row_heading', '<th scope="row" class="row_heading')


def to_html(frame: pd.DataFrame, caption: str) -> str:
    """Write a table of text as HTML; values and names are escaped."""
    styler = frame.style.format(escape="html").format_index(escape="html").format_index(escape="html", axis=1)
    return _html(styler.set_table_attributes('class="numbers"').set_caption(str(escape(caption))))


def heatmap_html(matrix: Matrix, method: MethodMatrix) -> str:
    """Write the matrix of one method as a table whose cells carry color classes; see `palette.css`."""
    frame, limit = cell_frame(matrix, method), limit_of(matrix)
    shades = {}
    for stage, row in enumerate(method.stages):
        bins = {name: f"shade-{bin_of(cell.change, limit)}" for name, cell in row.cells.items()}
        classes = [f"{bins.get(name, 'missing')} {method.place(stage, name)}" for name in matrix.domains]
        shades[frame.index[stage]] = classes
    styler = frame.style.format(_change).format_index(escape="html").format_index(escape="html", axis=1)
    crowded = len(matrix.domains) > 6 or max(map(len, matrix.domains), default=0) > 10
    styler = styler.set_td_classes(_frame(matrix.domains, shades))
    return _html(styler.set_table_attributes(f'class="matrix{" crowded" if crowded else ""}"'))


def budget(matrix: Matrix) -> str:
    """Say how much text stands behind the figures."""
    blocks = {figures.blocks for method in matrix.methods for figures in method.base.values()}
    if not blocks:
        return "nothing measured yet"
    few, many = min(blocks), max(blocks)
    return f"{plural(few, 'block')} a domain" if few == many else f"{few} to {many} blocks a domain"
