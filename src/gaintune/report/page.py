"""The report page: reads a run directory, gathers what the template shows, and writes every file of the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from gaintune.config import Plan, build_plan, plan_yaml, read_values
from gaintune.errors import RunDirectoryError
from gaintune.progress import plural
from gaintune.report import canvas, figures, palette, tables, words
from gaintune.results import Matrix, recomputed
from gaintune.storage import read_stored, write_bytes, write_json, write_text


def write_report(run: str | Path) -> Path:
    """Write report.html, figures/, matrix.csv and matrix.md into a run directory, from what it holds.

    Figures and intervals are made anew from the losses of every block, and matrix.json is written too where they
    differ from its own, as those of a run of an earlier version may.

    Returns:
        The path of the page.

    Raises:
        RunDirectoryError: not a run directory, or one with no matrix.json yet, or a damaged one.
        ConfigError: no plan.yaml, or one that is not a plan.
    """
    run = Path(run)
    source = run / "matrix.json"
    if not run.is_dir():
        raise RunDirectoryError(f"no such run directory: {run.absolute()}")
    if not source.is_file() and not (run / "plan.yaml").is_file():
        raise RunDirectoryError(
            f"{run} is not a run directory, it has neither plan.yaml nor matrix.json; name the folder that "
            "`gaintune sequence` or `gaintune demo` was given with --run"
        )
    if not source.is_file():
        raise RunDirectoryError(f"{source}: nothing measured yet; run `gaintune sequence` on this run directory first")
    stored = read_stored(source, Matrix.from_dict)
    plan = build_plan(read_values(run / "plan.yaml"), str(run / "plan.yaml"))
    matrix = recomputed(run, stored, plan.evaluate)
    if matrix != stored:
        write_json(source, matrix.to_dict())
    record = run / "environment.json"
    environment = read_stored(record, dict) if record.is_file() else {}
    page = render(matrix, plan, environment, run.resolve().name)
    write_text(run / "matrix.csv", tables.to_csv(matrix))
    write_text(run / "matrix.md", tables.to_markdown(matrix))
    for name, content in figures.files(matrix).items():
        write_bytes(run / "figures" / name, content)
    write_text(run / "report.html", page)
    return run / "report.html"


def render(matrix: Matrix, plan: Plan, environment: dict[str, Any], name: str) -> str:
    """The page as HTML text; it needs no other file and no network."""
    folder = FileSystemLoader(Path(__file__).parent)
    templates = Environment(
        loader=folder, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    light, dark = palette.css()
    return templates.get_template("page.html.j2").render(
        name=name,
        matrix=matrix,
        title=words.title(matrix),
        light=Markup(light),
        dark=Markup(dark),
        facts=_facts(matrix, plan),
        methods=_methods(matrix),
        comparisons=[words.compare(one, matrix.partial) for one in matrix.comparisons],
        unfinished=_unfinished(matrix, plan),
        limit=f"{palette.limit_of(matrix):g}",
        beyond=" or more" if palette.largest_change(matrix) > palette.limit_of(matrix) else "",
        summary=_table(tables.summary_frame(matrix), "Change of perplexity against the base in %, with intervals"),
        differences=_table(tables.comparison_frame(matrix), "Paired differences in points of %, with intervals"),
        summary_panels=[
            (words.FIGURES[key][0], _svg(figures.summary_panel(matrix, key), f"summary-{key}"))
            for key in figures.summary_names(matrix)
        ],
        curves=[
            (domain, _svg(figures.curve(matrix, domain), f"curve-{index}"))
            for index, domain in enumerate(matrix.domains)
        ],
        bases=[
            _table(
                frame, f"Base of {words.listed(labels)}" if len(labels) < len(matrix.methods) else "The untouched base"
            )
            for labels, frame in tables.base_frames(matrix)
        ],
        definitions=list(words.FIGURES.values()),
        cautions=words.cautions(matrix),
        plan_text=plan_yaml(plan),
        environment=_flat(environment),
        version=_flat(environment).get("packages.gaintune"),
    )


def _table(frame: Any, caption: str) -> Markup:
    """Styler's HTML, in which every value and name is already escaped; empty for a table without rows."""
    return Markup(tables.to_html(frame, caption)) if len(frame) else Markup()


def _svg(figure: Any, name: str) -> Markup:
    """matplotlib's SVG, in which every text is already escaped."""
    return Markup(canvas.inline_svg(figure, name))


def _methods(matrix: Matrix) -> list[dict[str, Any]]:
    """For each method: its sentence, its two large numbers, its matrix and tables, and how it was adapted."""
    return [
        {
            "label": method.label,
            "series": index % len(palette.LOOKS),
            "verdict": words.verdict(method),
            "numbers": [
                (heading, figure, words.signed(figure.value, "%"), words.bracket(figure), words.tone(figure))
                for heading, figure in (
                    ("in-domain", method.summary.in_domain),
                    ("earlier domains", method.summary.backward_transfer),
                )
                if figure is not None
            ],
            "stages": len(method.stages),
            "heatmap": Markup(tables.heatmap_html(matrix, method)) if method.stages else Markup(),
            "per_stage": _table(tables.stage_frame(method), f"{method.label}, right after each stage, in %"),
            "cells": _table(
                tables.cell_frame(matrix, method).map(words.with_interval),
                f"{method.label}: every cell with its interval, in %",
            ),
            "info": {key.replace("_", " "): tables.setting(value) for key, value in _flat(method.info).items()},
        }
        for index, method in enumerate(matrix.methods)
    ]


def _facts(matrix: Matrix, plan: Plan) -> list[tuple[str, str]]:
    """The run at a glance."""
    train, data = plan.train, plan.data
    return [
        ("Base model", plan.model.name),
        ("Domains, in order", " → ".join(domain.name for domain in data.domains)),
        *([("Measured, never learnt", ", ".join(domain.name for domain in data.watched))] if data.watched else []),
        ("Training text", f"{data.train_tokens:,} tokens a domain, {plural(train.epochs, 'epoch')}"),
        ("Validation text", f"{tables.budget(matrix)}, {data.block_size} tokens each"),
        ("Seeds", f"data {data.seed}, training {train.seed}, resampling {plan.evaluate.seed}"),
    ]


def _unfinished(matrix: Matrix, plan: Plan) -> list[str]:
    """What the plan asks for and the matrix does not hold yet."""
    total, known = len(plan.data.domains), {method.label: method for method in matrix.methods}
    missing = []
    for label in (method.label for method in plan.methods):
        finished = len(known[label].per_stage) if label in known else 0
        if finished < total:
            missing.append(f"{label}: {finished} of {total} stages")
    return missing


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values under dotted names, lists as text."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            result |= _flat(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
    return result
