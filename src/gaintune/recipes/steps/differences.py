"""Steps that subtract numbers of earlier steps, such as those of two budgets or of two sizes of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from gaintune.errors import ConfigError
from gaintune.recipes.outcome import Context, PreparedStep, StepOutcome
from gaintune.report import with_interval
from gaintune.results import Interval, difference_of_independent


def differences(settings: dict[str, Any], context: Context) -> PreparedStep:
    """Subtract numbers; the setting `differences` maps a name to the number and the one to subtract from it.

    The two are taken as independent, so that intervals over the same validation text come out too wide, never too
    narrow. A difference whose step is left out, or whose number is missing, is missing too.
    """
    pairs: Any = settings.pop("differences", None)
    context.refuse_unknown(settings)
    if not isinstance(pairs, Mapping) or any(not isinstance(two, list) or len(two) != 2 for two in pairs.values()):
        raise ConfigError(f"{context.origin}: `differences` has two numbers by a name, such as more: [a.x, b.x]")
    steps = {str(number).partition(".")[0] for pair in pairs.values() for number in pair}
    if unknown := [step for step in sorted(steps) if step not in context.earlier]:
        known = ", ".join(context.earlier) or "none"
        raise ConfigError(f"{context.origin}: no step {unknown[0]!r} before it; there are {known}")
    gone = [step for step in sorted(steps) if context.earlier[step].left_out]
    kept = {name: pair for name, pair in pairs.items() if not any(number.partition(".")[0] in gone for number in pair)}
    if not kept:
        return PreparedStep.left_out(f"left out: it compares steps that are left out ({', '.join(gone)})")

    def run() -> StepOutcome:
        numbers, without = {}, {name: "a step it compares is left out" for name in pairs if name not in kept}
        for name, pair in kept.items():
            first, second = (number_of(number, context) for number in pair)
            if first is None or second is None:
                without[name] = f"no number {pair[0] if first is None else pair[1]}"
            else:
                numbers[name] = difference_of_independent(first, second)
        rows = {
            name: [f"{kept[name][0]} less {kept[name][1]}", with_interval(value)] for name, value in numbers.items()
        }
        table = pd.DataFrame.from_dict(rows, orient="index", columns=["what", "difference"])
        return StepOutcome(numbers, {"Differences": table} if rows else {}, without=without)

    return PreparedStep(StepOutcome(), run, keep=False)


def number_of(name: str, context: Context) -> Interval | None:
    """Return an earlier step's number by its full name; None where there is none."""
    step, _, rest = name.partition(".")
    return context.earlier[step].numbers.get(rest)
