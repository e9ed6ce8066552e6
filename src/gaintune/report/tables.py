"""The numbers of a matrix as tables: tidy CSV, Markdown, and HTML through pandas Styler (everything escaped)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pandas as pd
from markupsafe import escape
from pandas.io.formats.style import Styler

from gaintune.progress import plural
from gaintune.report.palette import bin_of, limit_of
from gaintune.report.words import FIGURES, NONE, number, signed, with_interval
from gaintune.results import Interval, Matrix, MethodMatrix


def tidy(matrix: Matrix) -> pd.DataFrame:
    """One row for each cell of each method."""
    rows = [
        {
            "method": method.label,
            "stage": index + 1,
            "learnt": row.domain,
            "domain": domain,
            "place": method.place(index, domain),
            "base_perplexity": method.base[domain].perplexity,
            "perplexity": cell.perplexity,
            "bits_per_byte": cell.bits_per_byte,
            "change_percent": cell.change,
            "low_percent": cell.low,
            "high_percent": cell.high,
        }
        for method in matrix.methods
        for index, row in enumerate(method.stages)
        for domain in matrix.domains
        if (cell := row.cells.get(domain)) is not None
    ]
    columns = ["method", "stage", "learnt", "domain", "place", "base_perplexity", "perplexity", "bits_per_byte"]
    return pd.DataFrame(rows, columns=[*columns, "change_percent", "low_percent", "high_percent"])


def to_csv(matrix: Matrix) -> str:
    """The tidy table as CSV text; changes in % of the base's perplexity."""
    return tidy(matrix).to_csv(index=False, lineterminator="\n")


def setting(value: Any) -> str:
    """A setting or count of a method as it reads in a table."""
    if value is None or value == "":
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def summary_frame(matrix: Matrix) -> pd.DataFrame:
    """One row for each method: what it is, and its figures with intervals, in %."""
    return pd.DataFrame(
        [
            [
                setting(method.info.get("trainable_parameters")),
                setting(method.info.get("lr")),
                *(with_interval(getattr(method.summary, name)) for name in FIGURES),
            ]
            for method in matrix.methods
        ],
        index=[method.label for method in matrix.methods],
        columns=["Trained parameters", "LR", *(heading for heading, _ in FIGURES.values())],
        dtype=object,
    )


def comparison_frame(matrix: Matrix) -> pd.DataFrame:
    """One row for each method but the first: paired differences to the first, in points of %."""
    return pd.DataFrame(
        [
            [str(one.stages), *(with_interval(getattr(one.summary, name)) for name in FIGURES)]
            for one in matrix.comparisons
        ],
        index=[f"{one.label} minus {one.against}" for one in matrix.comparisons],
        columns=["Stages", *(heading for heading, _ in FIGURES.values())],
        dtype=object,
    )


def stage_frame(method: MethodMatrix) -> pd.DataFrame:
    """One row for each finished stage: in-domain, and means over earlier and later domains, in %."""
    return pd.DataFrame(
        [
            [with_interval(row.in_domain), with_interval(row.earlier), with_interval(row.later)]
            for row in method.per_stage
        ],
        index=[f"{index + 1} {row.domain}" for index, row in enumerate(method.per_stage)],
        columns=["In-domain", "Mean of earlier domains", "Mean of domains not yet learnt"],
        dtype=object,
    )


def cell_frame(matrix: Matrix, method: MethodMatrix) -> pd.DataFrame:
    """Stages by domains; each entry an `Interval` in %, or None where nothing was measured."""
    return pd.DataFrame(
        [[row.cells[name].interval if name in row.cells else None for name in matrix.domains] for row in method.stages],
        index=[f"{index + 1} {row.domain}" for index, row in enumerate(method.stages)],
        columns=list(matrix.domains),
        dtype=object,
    )


def base_frames(matrix: Matrix) -> list[tuple[list[str], pd.DataFrame]]:
    """Perplexity of the base on each domain, with the methods it is the base of; bases that agree are shown once."""
    groups: list[tuple[list[str], pd.DataFrame]] = []
    for method in matrix.methods:
        names = [name for name in matrix.domains if name in method.base]
        figures = [method.base[name] for name in names]
        frame = pd.DataFrame(
            [
                [number(one.perplexity), f"{one.bits_per_byte:.3f}", f"{one.tokens:,}", f"{one.blocks:,}"]
                for one in figures
            ],
            index=names,
            columns=["Perplexity", "Bits per byte", "Scored tokens", "Blocks"],
            dtype=object,
        )
        for labels, known in groups:
            if known.equals(frame):
                labels.append(method.label)
                break
        else:
            groups.append(([method.label], frame))
    return groups


def markdown_table(frame: pd.DataFrame, corner: str) -> str:
    """A table of text as Markdown, numbers to the right; `corner` heads the column of row names."""

    def line(cells: Sequence[Any]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |\n"

    head = line([corner, *frame.columns]) + "|---|" + "---:|" * len(frame.columns) + "\n"
    return head + "".join(line([name, *row]) for name, row in zip(frame.index, frame.values.tolist(), strict=True))


def to_markdown(matrix: Matrix) -> str:
    """Summary, paired differences, a matrix for each method and the base, as Markdown."""
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
        frame = cell_frame(matrix, method)
        for index, row in enumerate(method.stages):
            for name in matrix.domains:
                cell = row.cells.get(name)
                text = NONE if cell is None else signed(cell.change)
                frame.loc[frame.index[index], name] = f"**{text}**" if name == row.domain else text
        heading = (
            f"{method.label}: a row for each stage, a column for each domain measured then; just learnt in bold.\n"
        )
        parts += [heading, markdown_table(frame, "After stage")]
    for labels, frame in base_frames(matrix):
        of = f" ({', '.join(labels)})" if len(labels) < len(matrix.methods) else ""
        parts += [f"The untouched base{of}:\n", markdown_table(frame, "Domain")]
    if matrix.partial:
        parts.append("The run is not finished; figures cover the finished stages.\n")
    return "\n".join(parts)


def _html(styler: Styler) -> str:
    """Styler's table without its ids, which repeat, and style block, with scopes on headings.

    Entries are escaped before, so the quotes in these patterns can only be Styler's own.
    """
    html = styler.to_html(table_uuid="")
    html = re.sub(r'(<t\w+)((?: \w+="[^"]*")*?) id="T_[^"]*"', r"\1\2", html[html.index("<table") :])
    html = html.replace('<th class="col_heading', '<th scope="col" class="col_heading')
    return html.replace('<th class="row_heading', '<th scope="row" class="row_heading')


def to_html(frame: pd.DataFrame, caption: str, css: str = "numbers") -> str:
    """A table of text as HTML; values and names are escaped."""
    styler = frame.style.format(escape="html").format_index(escape="html").format_index(escape="html", axis=1)
    styler = styler.set_table_attributes(f'class="{css}"').set_caption(str(escape(caption)))
    return _html(styler)


def heatmap_html(matrix: Matrix, method: MethodMatrix) -> str:
    """The matrix of one method as a table whose cells carry colour classes; see `palette.css`."""
    frame = cell_frame(matrix, method)
    limit = limit_of(matrix)
    classes = frame.copy()
    for index, row in enumerate(method.stages):
        for name in matrix.domains:
            cell = row.cells.get(name)
            shade = "missing" if cell is None else f"shade-{bin_of(cell.change, limit)}"
            classes.loc[frame.index[index], name] = f"{shade} {method.place(index, name)}"

    def text(value: object) -> str:
        return signed(value.value) if isinstance(value, Interval) else NONE

    styler = frame.style.format(text).format_index(escape="html").format_index(escape="html", axis=1)
    styler = styler.set_td_classes(classes)
    crowded = len(matrix.domains) > 6 or max(map(len, matrix.domains), default=0) > 10
    styler = styler.set_table_attributes(f'class="matrix{" crowded" if crowded else ""}"')
    return _html(styler)


def budget(matrix: Matrix) -> str:
    """How much text stands behind the figures."""
    blocks = {figures.blocks for method in matrix.methods for figures in method.base.values()}
    if not blocks:
        return "nothing measured yet"
    few, many = min(blocks), max(blocks)
    return f"{plural(few, 'block')} a domain" if few == many else f"{few} to {many} blocks a domain"
