"""Steps that analyze trained adapters: one for each analysis, made from the analysis's own description.

A step's settings are the analysis's options; `of`, the step whose adapters it takes; `label`, or `labels` and `after`,
which of them; domains and sections of a plan, where it measures texts of its own; and settings of benchmarks, where it
measures those. Each analysis's `report.result` gives the numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from gaintune.analysis import ANALYSES, Analysis, Subject, write_result
from gaintune.config import Plan
from gaintune.errors import ConfigError
from gaintune.methods import METHODS
from gaintune.recipes.outcome import Context, PreparedStep, StepKind, StepOutcome
from gaintune.recipes.steps.benchmarks import benchmark_config
from gaintune.results import Interval


@dataclass(frozen=True)
class _Part:
    """One run of an analysis: its title, its adapters by name, its folder, and the prefixes of its numbers' names."""

    title: str
    adapters: Mapping[str, Path]
    folder: Path
    prefixes: tuple[str, ...] = ("",)


def analyze(analysis: Analysis, settings: dict[str, Any], context: Context) -> PreparedStep:
    """Run an analysis on the adapters of an earlier step."""
    given = {name: settings.pop(name) for name in analysis.Options.model_fields if name in settings}
    trained, plan = (StepOutcome(), None) if analysis.takes == "nothing" else context.trained(settings)
    parts = list(_parts(analysis, settings, trained, context))
    if plan is not None:
        _check_methods(analysis, plan, parts, context.origin)
    options = [
        analysis.Options.read({**analysis.recipe_defaults([*part.adapters.values()]), **given}, context.origin)
        for part in parts
    ]
    notes: list[str] = []
    if analysis.texts == "named":
        settings["domains"] = [*analysis.domains(settings.get("domains", ()), options[0])]
        if why := context.setup.why_not(settings):
            return PreparedStep.left_out(why)
        own, notes = context.setup.plan(settings, origin=context.origin), [*context.setup.text_notes(settings)]
        if plan is not None and "base" not in settings:
            given = context.setup.overrides.get("model", {})
            base = {key: getattr(plan.model, key) for key in ("name", "revision", "quantization") if key not in given}
            own = own.model_copy(update={"model": own.model.model_copy(update=base)})
        plan = own
    benchmarks = None
    if analysis.measures_benchmarks and plan is not None:
        first: Any = options[0]
        benchmarks, missing = benchmark_config(settings, [*first.target, *first.tasks], plan, context)
        notes += [f"left out, {name}: {why}" for name, why in missing.items()]
    elif analysis.texts != "named":
        context.refuse_unknown(settings)

    def run() -> StepOutcome:
        numbers: dict[str, Interval] = {}
        without: dict[str, str] = {}
        tables, figures, lines, results = {}, [], [*notes], {}
        for part, own in zip(parts, options, strict=True):
            adapters = [*part.adapters.values()]
            subject = Subject(adapters, plan, [*part.adapters], part.title, part.folder, benchmarks)
            result = results[part.title] = analysis.run(subject, own, context.progress)
            write_result(analysis.name, result, part.folder)
            for prefix in part.prefixes:
                numbers |= {f"{prefix}{name}": value for name, value in result.numbers.items()}
                without |= {f"{prefix}{name}": why for name, why in result.without.items()}
            tables |= result.shown
            lines += result.notes
            figures += [part.folder / f"{name}.png" for name, figure in result.figures.items() if figure is not None]
        more, lacking = analysis.across(results)
        numbers, without = numbers | dict(more), without | dict(lacking)
        return StepOutcome(numbers, tables, tuple(figures), notes=tuple(lines), without=without)

    return PreparedStep(StepOutcome(plan=plan if analysis.texts == "named" else None), run)


def _parts(analysis: Analysis, settings: dict[str, Any], trained: StepOutcome, context: Context) -> Iterator[_Part]:
    """Yield every run of the analysis that the step takes."""
    folder, origin = context.folder, context.origin
    if analysis.takes == "nothing":
        yield _Part("", {}, folder)
    elif analysis.takes == "runs":
        if not trained.runs:
            raise ConfigError(f"{origin}: the step it is `of` is no run of domains")
        yield _Part("", {str(run): run for run in trained.runs}, folder)
    elif analysis.together == "all":
        yield _Part("", trained.last_adapters(settings.pop("labels", None), settings.pop("after", None)), folder)
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


def _check_methods(analysis: Analysis, plan: Plan, parts: list[_Part], origin: str) -> None:
    """Refuse a step `of` another whose methods lack what the analysis examines."""
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


KINDS: dict[str, StepKind] = {name: partial(analyze, analysis) for name, analysis in ANALYSES.items()}
