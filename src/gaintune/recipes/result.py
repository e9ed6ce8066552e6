"""What a run of a recipe gave: the outcome of every step, and the verdict on every claim."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gaintune.results.records import Interval
from gaintune.results.verdicts import Verdict
from gaintune.recipes.outcome import Outcome
from gaintune.recipes.schema import Claim, Recipe, Scale


@dataclass(frozen=True)
class Finding:
    """What became of a claim: its number here (None where its step was left out), and the verdict."""

    claim: Claim
    number: Interval | None
    verdict: Verdict

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "says": self.claim.says,
            "number": self.claim.number,
            "expected": str(self.claim.expect),
            "found": None if self.number is None else asdict(self.number),
            "verdict": self.verdict,
        }


@dataclass(frozen=True)
class RecipeResult:
    """Everything a recipe gave, and where it lies."""

    recipe: Recipe
    scale: Scale
    folder: Path
    outcomes: Mapping[str, Outcome]
    findings: tuple[Finding, ...]

    def number(self, name: str) -> Interval:
        """A number by its full name, such as run.gain-ffn.backward_transfer; KeyError where there is none."""
        return numbers_of(self.outcomes)[name]


def numbers_of(outcomes: Mapping[str, Outcome]) -> dict[str, Interval]:
    """All numbers of all steps by their full names."""
    return {f"{step}.{name}": value for step, one in outcomes.items() for name, value in one.numbers.items()}
