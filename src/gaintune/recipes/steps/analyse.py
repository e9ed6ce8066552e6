"""Steps that look into what others trained: one for each analysis, made from what the analysis says of itself.

A step's settings are the analysis's options; `of`, the step whose adapters it looks at; `label`, or `labels` and
`after`, which of them; domains and sections of a plan, where it measures texts of its own; and settings of benchmarks,
where it measures those. Each analysis's `report.result` says which numbers it gives.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from gaintune.analysis import ANALYSES, Analysis, Options, Subject, write_result
from gaintune.config import Plan
from gaintune.errors import ConfigError
from gaintune.evaluate.benchmarks import BenchmarkConfig
from gaintune.methods import METHODS
from gaintune.recipes.outcome import Context, Kind, Outcome, last_of_each
from gaintune.recipes.steps.benchmarks import asked_config
from gaintune.recipes.steps.train import left_out, nothing_to_learn
from gaintune.results import Interval


@dataclass(frozen=True)
class _Part:
    """One run of an analysis: what titles call it, its adapters by what numbers call them, and where it writes.

    `fronts` stand before the names of its numbers, each in its turn.
    """

    title: str
    adapters: Mapping[str, Path]
    folder: Path
    fronts: tuple[str, ...] = ("",)


@dataclass(frozen=True)
class _Work:
    """What a step is to do: parts with their options, on what plan; none where it is left out."""

    parts: tuple[tuple[_Part, Options], ...] = ()
    plan: Plan | None = None
    benchmarks: BenchmarkConfig | None = None
    notes: tuple[str, ...] = ()


def _read(analysis: Analysis, settings: dict[str, Any], context: Context) -> _Work:
    """Read a step's settings, before or after what it works on is there; ConfigError for what is wrong in them."""
    given = {name: settings.pop(name) for name in analysis.Options.model_fields if name in settings}
    trained, plan = (Outcome(), None) if analysis.takes == "nothing" else context.trained(settings)
    parts = tuple(_parts(analysis, settings, trained, context))
    if plan is not None:
        _check_methods(analysis, plan, parts, context.origin)
    options = [
        analysis.Options.read({**analysis.recipe_defaults([*part.adapters.values()]), **given}, context.origin)
        for part in parts
    ]
    notes: tuple[str, ...] = ()
    if analysis.texts == "named":
        settings["domains"] = [*analysis.domains(settings.get("domains", ()), options[0])]
        if why := nothing_to_learn(settings, context):
            return _Work(notes=(why,))
        plan, notes = context.world.plan(settings, origin=context.origin), left_out(settings, context)
    benchmarks = None
    if analysis.measures_benchmarks and plan is not None:
        asked: Any = options[0]
        benchmarks, missing = asked_config(settings, [*asked.target, *asked.tasks], plan, context)
        notes += tuple(f"left out, {name}: {why}" for name, why in missing.items())
    elif analysis.texts != "named":
        context.refuse_unknown(settings)
    return _Work(tuple(zip(parts, options, strict=True)), plan, benchmarks, notes)


def _parts(analysis: Analysis, settings: dict[str, Any], trained: Outcome, context: Context) -> Iterator[_Part]:
    """Yield every run of the analysis that the step takes."""
    folder, origin = context.folder, context.origin
    if analysis.takes == "nothing":
        yield _Part("", {}, folder)
    elif analysis.takes == "runs":
        if not trained.runs:
            raise ConfigError(f"{origin}: the step it is `of` is no run of domains")
        yield _Part("", {str(run): run for run in trained.runs}, folder)
    elif analysis.together == "all":
        yield _Part("", last_of_each(trained, settings.pop("labels", None), settings.pop("after", None)), folder)
    else:
        label = settings.pop("label", analysis.label) if analysis.label else None
        if label is not None and label not in trained.labels:
            raise ConfigError(f"{origin}: no adapter is called {label!r}; there are {', '.join(trained.labels)}")
        for own in trained.labels if label is None else [label]:
            keys = {key.partition("/")[2]: path for key, path in trained.adapters.items() if key.startswith(f"{own}/")}
            if label is None:
                yield _Part(own, keys, folder / own, (f"{own}.",))
            elif analysis.together == "label":
                yield _Part(own, keys, folder)
            else:
                for domain, adapter in keys.items():
                    after = (f"{own}.after-{domain}.",) if len(keys) > 1 else ()
                    last = () if after and trained.apart else (f"{own}.",)  # the last one's numbers stay
                    yield _Part(f"{own}/{domain}", {own: adapter}, folder / f"{own}-{domain}", after + last)


def _check_methods(analysis: Analysis, plan: Plan, parts: tuple[_Part, ...], origin: str) -> None:
    """Refuse a step `of` one whose methods have nothing of what the analysis looks at."""
    if analysis.takes == "snapshots" and plan.train.snapshot_steps is None:
        raise ConfigError(f"{origin}: the step it is `of` keeps no snapshots; give it train.snapshot_steps")
    if not analysis.needs:
        return
    able = [name for name, method in METHODS.items() if getattr(method, analysis.needs)]
    named, of = ", ".join(able), {method.label: method.name for method in plan.methods}
    if analysis.takes == "runs" and not set(of.values()) & set(able):
        raise ConfigError(f"{origin}: the step it is `of` has no method of {named}")
    for label in () if analysis.takes == "runs" else (part.title.partition("/")[0] for part in parts):
        if of.get(label, able[0]) not in able:
            raise ConfigError(f"{origin}: {label} has no {analysis.needs}; name one of method {named}")


def _run(analysis: Analysis, settings: dict[str, Any], context: Context) -> Outcome:
    work = _read(analysis, settings, context)
    numbers: dict[str, Interval] = {}
    without: dict[str, str] = {}
    tables, figures, notes, results = {}, [], [*work.notes], {}
    for part, options in work.parts:
        adapters = [*part.adapters.values()]
        subject = Subject(adapters, work.plan, [*part.adapters], part.title, part.folder, work.benchmarks)
        result = results[part.title] = analysis.run(subject, options, context.progress)
        write_result(analysis.name, result, part.folder)
        for front in part.fronts:
            numbers |= {f"{front}{name}": value for name, value in result.numbers.items()}
            without |= {f"{front}{name}": why for name, why in result.without.items()}
        tables |= result.shown
        notes += result.notes
        figures += sorted(part.folder.glob("*.png"))
    more, lacking = analysis.across(results) if results else ({}, {})
    return Outcome(
        {**numbers, **more},
        tables,
        tuple(figures),
        notes=tuple(notes),
        left_out=not work.parts,
        without={**without, **lacking},
    )


def _check(analysis: Analysis, settings: dict[str, Any], context: Context) -> Outcome:
    work = _read(analysis, settings, context)
    if not work.parts:
        return Outcome(notes=work.notes, left_out=True)
    return Outcome(plan=work.plan if analysis.texts == "named" else None)


STEPS = {name: Kind(partial(_run, analysis), partial(_check, analysis)) for name, analysis in ANALYSES.items()}
