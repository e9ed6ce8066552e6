"""Input and outcome of a step of a recipe: numbers with intervals, tables, figures, adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from gaintune.config import Plan
from gaintune.errors import ConfigError
from gaintune.methods import check_method
from gaintune.progress import Progress
from gaintune.recipes.scales import ScaleSetup
from gaintune.results import Interval


@dataclass(frozen=True)
class StepOutcome:
    """Outcome of a step, or the expected one.

    Attributes:
        numbers: what claims may name, without the step's own name in front; an interval without ends is a bare value.
        tables: by title; the paper's table among them.
        figures: PNG files.
        adapters: folders, by `label/domain`: a method's adapter after that domain.
        plan: the plan behind the adapters; None where there is none.
        notes: what a reader must know, such as a domain that was left out.
        left_out: whether this scale lacks what the step needs, or the step it works on failed; its claims stay
            undecided.
        failed: why the step failed while it ran, in one line; its claims stay undecided. None where it did not.
        without: missing numbers, each with the reason; claims about them stay undecided.
        runs: run directories behind the adapters.
        diverged: methods that diverged (in a sweep: at some rate), each with the value that was not finite.
        apart: whether adapters of one label were trained independently, so that none of them is the last.
    """

    numbers: Mapping[str, Interval] = field(default_factory=dict)
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    figures: tuple[Path, ...] = ()
    adapters: Mapping[str, Path] = field(default_factory=dict)
    plan: Plan | None = None
    notes: tuple[str, ...] = ()
    left_out: bool = False
    failed: str | None = None
    without: Mapping[str, str] = field(default_factory=dict)
    runs: tuple[Path, ...] = ()
    diverged: Mapping[str, str] = field(default_factory=dict)
    apart: bool = False

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels of the adapters, once each."""
        return tuple(dict.fromkeys(key.partition("/")[0] for key in self.adapters))

    def to_dict(self, folder: Path) -> dict[str, Any]:
        """Return what a step that trains nothing leaves, as plain values in order; its tables as text."""
        tables = (
            [title, list(map(str, table.columns)), list(map(str, table.index)), table.astype(str).values.tolist()]
            for title, table in self.tables.items()
        )
        return {
            "numbers": [[name, number.value, number.low, number.high] for name, number in self.numbers.items()],
            "tables": list(tables),
            "figures": [figure.relative_to(folder).as_posix() for figure in self.figures],
            "notes": list(self.notes),
            "without": [list(item) for item in self.without.items()],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], folder: Path) -> StepOutcome:
        """Read the outcome that `to_dict` wrote of a step in this folder."""
        return cls(
            numbers={name: Interval(*number) for name, *number in values["numbers"]},
            tables={title: pd.DataFrame(rows, index, heads) for title, heads, index, rows in values["tables"]},
            figures=tuple(folder / figure for figure in values["figures"]),
            notes=tuple(values["notes"]),
            without=dict(values["without"]),
        )

    @classmethod
    def expected(cls, plan: Plan, **more: Any) -> StepOutcome:
        """Expect an adapter of every method after every domain of a plan; ConfigError for an impossible method."""
        for method in plan.methods:
            check_method(method)
        keys = [f"{method.label}/{domain.name}" for method in plan.methods for domain in plan.data.domains]
        return cls(adapters=dict.fromkeys(keys, Path()), plan=plan, **{"runs": (Path(),), **more})

    def last_adapters(self, labels: Sequence[str] | None = None, after: str | None = None) -> dict[str, Path]:
        """Return by label each method's last adapter, or its adapter `after` a domain; `labels` picks some.

        A label that diverged is passed over.

        Raises:
            ConfigError: there is no such label or domain, or domains were trained apart and `after` names none of them.
        """
        if self.apart and after is None:
            domains = ", ".join(dict.fromkeys(key.partition("/")[2] for key in self.adapters))
            raise ConfigError(f"domains were trained apart, so that none is the last: `after` names one of {domains}")
        split = [(*key.split("/", 1), folder) for key, folder in self.adapters.items()]
        last = {label: folder for label, domain, folder in split if after in (None, domain)}
        if not last:
            raise ConfigError(f"no adapter was trained on {after!r}; there are {', '.join(self.adapters) or 'none'}")
        wanted = [label for label in labels or last if label not in self.diverged]
        if unknown := [label for label in wanted if label not in last]:
            raise ConfigError(f"no adapter is called {unknown[0]!r}; there are {', '.join(last)}")
        return {label: last[label] for label in wanted}


@dataclass(frozen=True)
class PreparedStep:
    """A step whose settings have been read and accepted.

    Attributes:
        expected: the outcome as far as it is known beforehand: keys of adapters, plan, whether it is left out.
        run: does the step; None for a step that is left out.
        keep: whether an outcome without a plan is kept, so that the step is not done again.
    """

    expected: StepOutcome
    run: Callable[[], StepOutcome] | None = None
    keep: bool = True

    @classmethod
    def left_out(cls, *notes: str) -> PreparedStep:
        """Leave the step out, and say why."""
        return cls(StepOutcome(notes=notes, left_out=True))


@dataclass(frozen=True)
class Context:
    """Context of a step: what it may use when it is prepared and when it is run.

    Attributes:
        folder: where the step writes; made by the step.
        setup: base, texts and budgets.
        earlier: outcomes of the steps before, by name; while steps are only checked, the expected ones, which have
            neither numbers nor files.
        workers: engine and number of workers of the step's sweep, as `run_sweep` takes them.
    """

    name: str
    folder: Path
    setup: ScaleSetup
    earlier: Mapping[str, StepOutcome]
    progress: Progress
    allow_code_execution: bool = False
    workers: Mapping[str, Any] = field(default_factory=lambda: {"engine": "sequential"})

    @property
    def origin(self) -> str:
        """How errors name the step."""
        return f"step {self.name}"

    def trained(self, settings: dict[str, Any]) -> tuple[StepOutcome, Plan]:
        """Take `of` out of the settings, and return that earlier step's outcome and the plan behind its adapters.

        Raises:
            ConfigError: there is no `of`, no earlier step of that name, or it leaves no adapters.
        """
        name = settings.pop("of", None)
        if name not in self.earlier:
            known = ", ".join(self.earlier) or "none"
            raise ConfigError(f"{self.origin}: `of` names the step it works on, got {name!r}; steps before it: {known}")
        outcome = self.earlier[name]
        if outcome.plan is None or not outcome.adapters:
            raise ConfigError(f"{self.origin}: the step it is `of` leaves no adapters")
        return outcome, outcome.plan

    def refuse_unknown(self, settings: Mapping[str, Any]) -> None:
        """Refuse settings that are left after the step took its own."""
        if settings:
            raise ConfigError(f"{self.origin}: unknown key {next(iter(settings))!r}")

    def refuse_owned(self, owned: Mapping[str, str]) -> None:
        """Refuse values from the command line for keys of a plan that the step decides; `owned` has the reasons."""
        for key, why in owned.items():
            section, _, leaf = key.partition(".")
            held = self.setup.overrides.get(section)
            if leaf:
                held = held.get(leaf) if isinstance(held, Mapping) else None
            if held is not None:
                raise ConfigError(f"--set {key}: {self.origin} decides it itself ({why}); leave it out")


StepKind = Callable[[dict[str, Any], Context], PreparedStep]
"""A kind of step: reads and checks the settings, which it may take apart, and returns what runs it."""
