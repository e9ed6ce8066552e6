"""What a step of a recipe gives: numbers with intervals, tables, figures, and the adapters it trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pandas as pd

from gaintune.config import Plan
from gaintune.errors import ConfigError
from gaintune.progress import Progress
from gaintune.recipes.schema import Claim, Recipe, Scale
from gaintune.recipes.world import World
from gaintune.results import Interval, Verdict


@dataclass(frozen=True)
class Outcome:
    """What one step gave.

    Attributes:
        numbers: what claims may name, without the step's own name in front; an interval without ends is a bare value.
        tables: by title; the paper's table among them.
        figures: PNG files.
        adapters: folders, by `label/domain`: what a method was after it learnt that domain.
        plan: the plan behind the adapters; None where there is none.
        notes: what a reader must know, such as a domain that was left out.
        left_out: whether this scale has not what the step needs; its claims stay undecided.
        without: numbers that could not be had, each with the reason; claims about them stay undecided.
        runs: run directories behind the adapters.
        diverged: methods that diverged, of a sweep at some rate, each with what was not finite; claims may lack them.
        apart: whether adapters of one label were learnt apart from each other, so that none of them is the last.
    """

    numbers: Mapping[str, Interval] = field(default_factory=dict)
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    figures: tuple[Path, ...] = ()
    adapters: Mapping[str, Path] = field(default_factory=dict)
    plan: Plan | None = None
    notes: tuple[str, ...] = ()
    left_out: bool = False
    without: Mapping[str, str] = field(default_factory=dict)
    runs: tuple[Path, ...] = ()
    diverged: Mapping[str, str] = field(default_factory=dict)
    apart: bool = False

    @property
    def labels(self) -> tuple[str, ...]:
        """What the adapters are called, each once."""
        return tuple(dict.fromkeys(key.partition("/")[0] for key in self.adapters))


@dataclass(frozen=True)
class Context:
    """What a step may use, when it is checked and when it is run.

    Attributes:
        name: the step's name.
        folder: where it writes; made by the step.
        world: base, texts and budgets.
        earlier: outcomes of the steps before, by name; while steps are checked, what these will be, with neither
            numbers nor files.
        progress: where to show progress.
        allow_code_execution: whether generated programs may be run.
    """

    name: str
    folder: Path
    world: World
    earlier: Mapping[str, Outcome]
    progress: Progress
    allow_code_execution: bool = False

    @property
    def origin(self) -> str:
        """How errors name the step."""
        return f"step {self.name}"

    def of(self, settings: dict[str, Any]) -> Outcome:
        """Take `of`, the name of an earlier step, out of the settings and give that step's outcome.

        Raises:
            ConfigError: there is none, or no step of that name came before.
        """
        name = settings.pop("of", None)
        if name not in self.earlier:
            known = ", ".join(self.earlier) or "none"
            raise ConfigError(f"{self.origin}: `of` names the step it works on, got {name!r}; steps before it: {known}")
        return self.earlier[name]

    def trained(self, settings: dict[str, Any]) -> tuple[Outcome, Plan]:
        """The step `of`, as `of` takes it, and the plan behind its adapters; ConfigError where it leaves none."""
        outcome = self.of(settings)
        if outcome.plan is None or not outcome.adapters:
            raise ConfigError(f"{self.origin}: the step it is `of` leaves no adapters")
        return outcome, outcome.plan

    def refuse_unknown(self, settings: Mapping[str, Any]) -> None:
        """Refuse settings that no one took."""
        if settings:
            raise ConfigError(f"{self.origin}: unknown key {next(iter(settings))!r}")


class Work(Protocol):
    """Runs or checks a step with its settings, which it may take apart."""

    def __call__(self, settings: dict[str, Any], context: Context) -> Outcome: ...


@dataclass(frozen=True)
class Kind:
    """One kind of step.

    Attributes:
        run: does it.
        check: refuses what `run` would refuse, as far as that can be known before anything is trained, and gives the
            outcome that is to be expected: its adapters' keys, its plan, whether it is left out.
    """

    run: Work
    check: Work


def last_of_each(outcome: Outcome, labels: Sequence[str] | None = None, after: str | None = None) -> dict[str, Path]:
    """Of each method the adapter it ended with, or the one it had `after` a domain, by label; `labels` picks some.

    A label that diverged is passed over.

    Raises:
        ConfigError: no such label, none that learnt the domain, or domains learnt apart of which `after` names none.
    """
    if outcome.apart and after is None:
        domains = dict.fromkeys(key.partition("/")[2] for key in outcome.adapters)
        raise ConfigError(
            f"domains were learnt apart, so that none is the last: `after` names one of {', '.join(domains)}"
        )
    found: dict[str, Path] = {}
    for key, folder in outcome.adapters.items():
        label, _, domain = key.partition("/")
        if after in (None, domain):
            found[label] = folder
    if not found:
        raise ConfigError(f"no adapter learnt {after!r}; there are {', '.join(outcome.adapters) or 'none'}")
    wanted = [label for label in labels or found if label not in outcome.diverged]
    for label in wanted:
        if label not in found:
            raise ConfigError(f"no adapter is called {label!r}; there are {', '.join(found)}")
    return {label: found[label] for label in wanted}


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
