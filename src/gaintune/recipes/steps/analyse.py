"""Steps that look into what others trained: one for each analysis, made from what the analysis says of itself.

A step's settings are the analysis's options; `of`, the step whose adapters it looks at; `label` or `labels` and
`after`, which of them; domains and sections of a plan, where it measures texts of its own; `tasks`, `target` and
settings of benchmarks, where it measures those. `result` in each analysis's `report.py` lists the numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gaintune.analysis import ANALYSES, Analysis, Options, Result, Subject, write_result
from gaintune.config import Plan
from gaintune.errors import ConfigError
from gaintune.evaluate.benchmarks import BenchmarkConfig
from gaintune.recipes.outcome import Context, Kind, Outcome, last_of_each
from gaintune.recipes.steps.benchmarks import asked_config
from gaintune.recipes.steps.train import left_out, nothing_to_learn
from gaintune.results import Interval


@dataclass(frozen=True)
class _Part:
    """One run of an analysis: its adapters by what numbers call them, its options, and where it writes.

    `fronts` stand in front of the names of its numbers, each in its turn.
    """

    title: str
    adapters: Mapping[str, Path]
    options: Options
    folder: Path
    fronts: tuple[str, ...] = ("",)


@dataclass(frozen=True)
class _Work:
    """What a step is to do; `outcome` says why it does nothing, or gives the notes that it begins with."""

    parts: tuple[_Part, ...]
    plan: Plan | None
    outcome: Outcome
    benchmarks: BenchmarkConfig | None = None


def _read(analysis: Analysis, settings: dict[str, Any], context: Context) -> _Work:
    """Read a step's settings, before or after what it works on is there.

    Raises:
        ConfigError: a setting that is wrong, or nothing of what the analysis looks at.
    """
    given = {name: settings.pop(name) for name in analysis.Options.model_fields if name in settings}
    trained = Outcome() if analysis.takes == "nothing" else context.of(settings)
    if analysis.takes != "nothing" and (trained.plan is None or not trained.adapters):
        raise ConfigError(f"{context.origin}: the step it is `of` leaves no adapters")
    picked = _picked(analysis, settings, trained, context)
    plan = trained.plan
    if plan is not None:
        _check_methods(analysis, plan, trained, picked, context)
    notes: tuple[str, ...] = ()
    if analysis.texts == "named":
        if why := nothing_to_learn(settings, context):
            return _Work((), None, Outcome(notes=(why,), left_out=True))
        plan, notes = context.world.plan(settings, origin=context.origin), left_out(settings, context)
    parts = []
    for title, (adapters, folder, fronts) in picked.items():
        values = {**analysis.recipe_defaults(list(adapters.values())), **given}
        parts.append(_Part(title, adapters, analysis.Options.read(values, context.origin), folder, fronts))
    benchmarks = None
    if analysis.measures_benchmarks and plan is not None:
        options: Any = parts[0].options
        benchmarks, missing = asked_config(settings, [*options.target, *options.tasks], plan, context)
        notes += tuple(f"left out, {name}: {why}" for name, why in missing.items())
    elif analysis.texts != "named":
        context.refuse_unknown(settings)
    return _Work(tuple(parts), plan, Outcome(notes=notes), benchmarks)


_Picked = dict[str, tuple[Mapping[str, Path], Path, tuple[str, ...]]]


def _picked(analysis: Analysis, settings: dict[str, Any], trained: Outcome, context: Context) -> _Picked:
    """Pick the adapters of each run of the analysis: by their title, with the folder and what numbers begin with."""
    folder = context.folder
    if analysis.takes == "nothing":
        return {"": ({}, folder, ("",))}
    if analysis.takes == "runs":
        if not trained.runs:
            raise ConfigError(f"{context.origin}: the step it is `of` is no run of domains")
        return {"": ({str(run): run for run in trained.runs}, folder, ("",))}
    if analysis.together == "all":
        return {"": (last_of_each(trained, settings.pop("labels", None), settings.pop("after", None)), folder, ("",))}
    label = settings.pop("label", analysis.label) if analysis.label else None
    labels: dict[str, dict[str, Path]] = {}
    for key, adapter in trained.adapters.items():
        own, _, domain = key.partition("/")
        if label in (None, own):
            labels.setdefault(own, {})[domain] = adapter
    if not labels:
        raise ConfigError(f"{context.origin}: no adapter is called {label!r}; there are {', '.join(trained.labels)}")
    if label is None:
        return {own: (adapters, folder / own, (f"{own}.",)) for own, adapters in labels.items()}
    if analysis.together == "label":
        return {label: (labels[label], folder, ("",))}
    several = len(labels[label]) > 1
    whole = () if several and trained.apart else (f"{label}.",)  # without a stage's name, the last one
    return {
        f"{label}/{domain}": (
            {label: adapter},
            folder / f"{label}-{domain}",
            (*((f"{label}.after-{domain}.",) if several else ()), *whole),
        )
        for domain, adapter in labels[label].items()
    }


def _check_methods(analysis: Analysis, plan: Plan, trained: Outcome, picked: _Picked, context: Context) -> None:
    """Refuse what no method of the step `of` can give."""
    if analysis.takes == "snapshots" and plan.train.snapshot_steps is None:
        raise ConfigError(f"{context.origin}: the step it is `of` keeps no snapshots; give it train.snapshot_steps")
    if not analysis.methods:
        return
    if analysis.takes == "runs":
        if not {method.name for method in plan.methods} & set(analysis.methods):
            raise ConfigError(f"{context.origin}: the step it is `of` has no method of {', '.join(analysis.methods)}")
        return
    for label in {title.partition("/")[0] for title in picked}:
        if any(each.label == label and each.name not in analysis.methods for each in plan.methods):
            named = ", ".join(analysis.methods)
            raise ConfigError(f"{context.origin}: {label} has no {analysis.lacks}; name one of method {named}")


def _run(analysis: Analysis, settings: dict[str, Any], context: Context) -> Outcome:
    work = _read(analysis, settings, context)
    numbers: dict[str, Interval] = {}
    without: dict[str, str] = {}
    tables, figures, notes = {}, [], []
    results: dict[str, Result] = {}
    for part in work.parts:
        subject = Subject(
            adapters=list(part.adapters.values()),
            plan=work.plan,
            names=list(part.adapters),
            title=part.title,
            folder=part.folder,
            benchmarks=work.benchmarks,
        )
        result = results[part.title] = analysis.run(subject, part.options, context.progress)
        write_result(analysis.name, result, part.folder)
        for front in part.fronts:
            numbers |= {f"{front}{name}": value for name, value in result.numbers.items()}
            without |= {f"{front}{name}": why for name, why in result.without.items()}
        tables |= result.shown
        notes += result.notes
        figures += sorted(part.folder.glob("*.png"))
    if results:
        more, lacking = analysis.across(results)
        numbers, without = {**numbers, **more}, {**without, **lacking}
    return Outcome(
        numbers,
        tables,
        tuple(figures),
        notes=(*work.outcome.notes, *notes),
        left_out=work.outcome.left_out,
        without=without,
    )


def _check(analysis: Analysis, settings: dict[str, Any], context: Context) -> Outcome:
    work = _read(analysis, settings, context)
    return Outcome(
        notes=work.outcome.notes if work.outcome.left_out else (),
        left_out=work.outcome.left_out,
        plan=work.plan if analysis.texts == "named" else None,
    )


def _kind(analysis: Analysis) -> Kind:
    return Kind(
        lambda settings, context: _run(analysis, settings, context),
        lambda settings, context: _check(analysis, settings, context),
    )


STEPS = {name: _kind(analysis) for name, analysis in ANALYSES.items()}
