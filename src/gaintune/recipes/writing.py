"""What a recipe leaves: results.md to read, results.csv and results.json to compute with, figures beside them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from gaintune.recipes.outcome import RecipeResult
from gaintune.recipes.schema import Claim
from gaintune.report import NONE, markdown_table, number
from gaintune.results import Interval
from gaintune.storage import make_folder, write_json, write_text

SMOKE = (
    "Random weights, a few steps, and the standard library's functions as text under every name: the verdicts show "
    "that everything runs, and nothing else."
)


def write_results(result: RecipeResult, environment: Mapping[str, Any]) -> None:
    """Write results.md, results.csv (every number), results.json, environment.json, and figures/."""
    folder = result.folder
    make_folder(folder / "figures")
    for step, outcome in result.outcomes.items():
        for figure in outcome.figures:
            shutil.copyfile(figure, folder / "figures" / _figure_name(result, step, figure))
    rows = [
        {"step": step, "number": name, "value": one.value, "low": one.low, "high": one.high}
        for step, outcome in result.outcomes.items()
        for name, one in outcome.numbers.items()
    ]
    frame = pd.DataFrame(rows, columns=["step", "number", "value", "low", "high"])
    write_text(folder / "results.csv", frame.to_csv(index=False, lineterminator="\n"))
    write_json(
        folder / "results.json",
        {
            "recipe": result.recipe.id,
            "scale": result.scale,
            "numbers": {f"{row['step']}.{row['number']}": [row["value"], row["low"], row["high"]] for row in rows},
            "claims": [finding.to_dict() for finding in result.findings],
            "notes": {step: list(outcome.notes) for step, outcome in result.outcomes.items()},
            "without": {
                f"{step}.{name}": why for step, one in result.outcomes.items() for name, why in one.without.items()
            },
        },
    )
    write_json(folder / "environment.json", dict(environment))
    write_text(folder / "results.md", markdown(result))


def _figure_name(result: RecipeResult, step: str, figure: Path) -> str:
    """What a step's figure is called beside those of other steps."""
    part = figure.parent.relative_to(result.folder / step).as_posix().replace("figures", "").strip("/.")
    return "-".join(filter(None, (step, part.replace("/", "-"), figure.name)))


def markdown(result: RecipeResult) -> str:
    """The page: what was asked, a verdict on every claim, and each step's tables."""
    recipe = result.recipe
    lines = [
        f"# {recipe.id}: {recipe.title}",
        "",
        f"{recipe.source}; scale {result.scale}.",
        "",
        recipe.asks.strip(),
        "",
    ]
    if result.scale == "smoke":
        lines += [SMOKE, ""]
    lines += _verdicts(result)
    for step, outcome in result.outcomes.items():
        lines += [f"## {step}", ""]
        notes = [*outcome.notes, *(f"no number {name}: {why}" for name, why in outcome.without.items())]
        lines += [f"- {note}" for note in notes]
        lines += [""] if notes else []
        for title, table in outcome.tables.items():
            lines += [f"{title}:", "", markdown_table(table, ""), ""]
        for figure in outcome.figures:
            lines += [f"![{figure.stem}](figures/{_figure_name(result, step, figure)})", ""]
    return "\n".join(lines)


def _verdicts(result: RecipeResult) -> Iterator[str]:
    if not result.findings:
        return
    rows = {
        finding.claim.says: [finding.verdict, shown(finding.number), expected(finding.claim), finding.claim.number]
        for finding in result.findings
    }
    frame = pd.DataFrame.from_dict(rows, orient="index", columns=["Verdict here", "Found", "Claimed", "Number"])
    yield markdown_table(frame, "Claim")
    yield ""
    yield (
        "What is found is in the unit of the step's tables, its interval over what they say; what is counted and not "
        "sampled is its own interval. A number without an interval decides nothing."
    )
    yield ""


def expected(claim: Claim) -> str:
    """Where a claim's number lies if the claim is true, and whether the paper says so or we chose the bound."""
    return f"{claim.expect}{', a bound of ours' if claim.bound == 'ours' else ''}"


def shown(one: Interval | None) -> str:
    """A number and its interval, the bare number, or a dash."""
    if one is None:
        return NONE
    ends = f" [{_digits(one.low)}, {_digits(one.high)}]" if one.low is not None and one.high is not None else ""
    return _digits(one.value) + ends


def _digits(value: float) -> str:
    return f"{'−' if value < 0 else ''}{number(abs(value))}" if abs(value) >= 1 else f"{value:.3g}".replace("-", "−")
