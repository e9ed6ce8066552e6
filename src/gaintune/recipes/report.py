"""What a recipe leaves: results.md to read, results.csv and results.json to compute with, figures beside them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from gaintune.recipes.outcome import StepOutcome
from gaintune.recipes.schema import Claim, Recipe, Scale
from gaintune.report import NONE, markdown_table, number
from gaintune.results import Interval, Verdict
from gaintune.storage import make_folder, write_json, write_text

SMOKE = (
    "Random weights, a few steps, and the standard library's functions as text under every name: the verdicts show "
    "that everything runs, and nothing else."
)
COLUMNS = ["step", "number", "value", "low", "high"]


@dataclass(frozen=True)
class Finding:
    """A claim with its number here (None where its step was left out) and the verdict."""

    claim: Claim
    number: Interval | None
    verdict: Verdict


@dataclass(frozen=True)
class RecipeResult:
    """Everything a recipe gave, and the folder that holds it."""

    recipe: Recipe
    scale: Scale
    folder: Path
    outcomes: Mapping[str, StepOutcome]
    findings: tuple[Finding, ...]

    def number(self, name: str) -> Interval:
        """Return a number by its full name, such as run.gain-ffn.backward_transfer; KeyError where there is none."""
        step, _, rest = name.partition(".")
        return self.outcomes[step].numbers[rest]


def write_results(result: RecipeResult, environment: Mapping[str, Any]) -> None:
    """Write results.md, results.csv (every number), results.json, environment.json, and figures/."""
    folder = result.folder
    make_folder(folder / "figures")
    for step, outcome in result.outcomes.items():
        for figure in outcome.figures:
            shutil.copyfile(figure, folder / "figures" / _figure_name(result, step, figure))
    numbers = [(step, *item) for step, outcome in result.outcomes.items() for item in outcome.numbers.items()]
    frame = pd.DataFrame([(step, name, n.value, n.low, n.high) for step, name, n in numbers], columns=COLUMNS)
    write_text(folder / "results.csv", frame.to_csv(index=False, lineterminator="\n"))
    claims = [
        {
            "says": finding.claim.says,
            "number": finding.claim.number,
            "expected": str(finding.claim.expect),
            "found": None if finding.number is None else asdict(finding.number),
            "verdict": finding.verdict,
        }
        for finding in result.findings
    ]
    record = {
        "recipe": result.recipe.id,
        "scale": result.scale,
        "numbers": {f"{step}.{name}": [n.value, n.low, n.high] for step, name, n in numbers},
        "claims": claims,
        "notes": {step: list(outcome.notes) for step, outcome in result.outcomes.items()},
        "without": {
            f"{step}.{name}": why for step, one in result.outcomes.items() for name, why in one.without.items()
        },
    }
    write_json(folder / "results.json", record)
    write_json(folder / "environment.json", dict(environment))
    write_text(folder / "results.md", "\n".join(_page(result)))


def _figure_name(result: RecipeResult, step: str, figure: Path) -> str:
    """Return a file name that no figure of another step has."""
    part = figure.parent.relative_to(result.folder / step).as_posix().replace("figures", "").strip("/.")
    return "-".join(filter(None, (step, part.replace("/", "-"), figure.name)))


def _page(result: RecipeResult) -> Iterator[str]:
    """Yield the lines of the page: the question, a verdict on every claim, and each step's notes and tables."""
    recipe = result.recipe
    yield from (f"# {recipe.id}: {recipe.title}", "", f"{recipe.source}; scale {result.scale}.", "")
    yield from (recipe.asks.strip(), "")
    if result.scale == "smoke":
        yield from (SMOKE, "")
    if result.findings:
        rows = {
            finding.claim.says: [finding.verdict, shown(finding.number), finding.claim.expected, finding.claim.number]
            for finding in result.findings
        }
        frame = pd.DataFrame.from_dict(rows, orient="index", columns=["Verdict here", "Found", "Claimed", "Number"])
        yield from (markdown_table(frame, "Claim"), "")
        yield from (
            "What is found is in the unit of the step's tables, its interval over what they say; what is counted and "
            "not sampled is its own interval. A number without an interval decides nothing.",
            "",
        )
    for step, outcome in result.outcomes.items():
        yield from (f"## {step}", "")
        notes = [*outcome.notes, *(f"no number {name}: {why}" for name, why in outcome.without.items())]
        yield from (f"- {note}" for note in notes)
        yield from [""] if notes else []
        for title, table in outcome.tables.items():
            yield from (f"{title}:", "", markdown_table(table, ""), "")
        for figure in outcome.figures:
            yield from (f"![{figure.stem}](figures/{_figure_name(result, step, figure)})", "")


def shown(value: Interval | None) -> str:
    """Format a number with its interval, the bare number, or a dash for none."""
    if value is None:
        return NONE
    ends = f" [{_digits(value.low)}, {_digits(value.high)}]" if value.low is not None and value.high is not None else ""
    return _digits(value.value) + ends


def _digits(value: float) -> str:
    return f"{'−' if value < 0 else ''}{number(abs(value))}" if abs(value) >= 1 else f"{value:.3g}".replace("-", "−")
