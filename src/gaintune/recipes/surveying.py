"""Steps that measure what others trained elsewhere than training left it: landscapes, parts of gains, snapshots."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from gaintune.analysis.landscape import report as landscape_report
from gaintune.analysis.retention import report as retention_report
from gaintune.analysis.transfer import report as transfer_report
from gaintune.analysis.landscape.survey import GRID, LINE, survey_landscape
from gaintune.analysis.retention.survey import Course, Retention, survey_retention
from gaintune.analysis.landscape.surface import Surface, range_apart
from gaintune.analysis.transfer.survey import PARTS, survey_transfer
from gaintune.storage.assets import cache_dir
from gaintune.errors import ConfigError
from gaintune.evaluate.benchmarks.config import as_task
from gaintune.results.records import Interval
from gaintune.recipes.steps.benchmarks import asked_config
from gaintune.recipes.outcome import Context, Outcome, exact, highest, last_of_each, lowest
from gaintune.report.words import NONE, with_interval

NO_LENGTH = "a direction has no length"


def landscape(settings: dict[str, Any], context: Context) -> Outcome:
    """`gaintune landscape` for every label of the step `of`, on all domains it measured.

    Adapters of two domains span a plane too. Settings: `of`, `line` and `grid`. Numbers: `LABEL.cosine` of the two
    directions; `LABEL.DOMAIN.at-LEARNT`, change of perplexity in % at the adapter of LEARNT; `LABEL.DOMAIN.both` where
    both directions are added; `LABEL.LEARNT.barrier` and, on the plane, `LABEL.DOMAIN.range`, nats. Of two labels with
    planes: `A-minus-B.cosine`, of the cosines without their signs, and `A-minus-B.DOMAIN.range`.
    """
    trained, plan = context.trained(settings)
    line, grid = settings.pop("line", LINE), settings.pop("grid", GRID)
    context.refuse_unknown(settings)
    numbers: dict[str, Interval] = {}
    tables, figures, notes = {}, [], []
    planes: dict[str, Surface | str] = {}
    for label, adapters in _by_label(trained).items():
        folder = context.folder / label
        found = survey_landscape(
            plan, list(adapters.values()), plane=len(adapters) == 2, line=line, grid=grid, progress=context.progress
        )
        landscape_report.write(found, folder)
        rows = {}
        for learnt, one in zip(adapters, found.lines, strict=True):
            for domain in one.domains:
                figure = one.figures(domain)
                numbers[f"{label}.{domain}.at-{learnt}"] = figure.at_adapted[0]
                if domain == learnt and figure.barrier is not None:
                    numbers[f"{label}.{learnt}.barrier"] = figure.barrier
                lowest = f"{figure.best[0]:g}"
                spread = [landscape_report.in_nats(figure.range), landscape_report.in_nats(figure.barrier)]
                rows[f"{learnt}, {domain}"] = [with_interval(figure.at_adapted[0]), lowest, *spread]
        planes[label] = found.plane or f"two adapters span a plane, and {label} has {len(adapters)}"
        if found.plane is not None:
            for domain in found.plane.domains:
                figure = found.plane.figures(domain)
                cells = [with_interval(figure.at_adapted[2]), NONE, landscape_report.in_nats(figure.range), NONE]
                rows[f"both (range of the plane), {domain}"] = cells
        heads = ["At the adapted model, %", "Lowest at", "Range, nats", "Barrier, nats"]
        for _, surface in landscape_report.surfaces(found):
            notes += [f"{label}: {sentence}" for sentence in landscape_report.geometry(surface)]
        title = f"{label}: learnt, measured; intervals over validation blocks"
        tables[title] = pd.DataFrame.from_dict(rows, orient="index", columns=heads)
        figures += sorted(folder.glob("*.png"))
    on_planes, without = _plane_numbers(planes, [domain.name for domain in plan.data.measured])
    return Outcome(numbers | on_planes, tables, tuple(figures), notes=tuple(notes), without=without)


def _plane_numbers(
    planes: Mapping[str, Surface | str], domains: Sequence[str]
) -> tuple[dict[str, Interval], dict[str, str]]:
    """The numbers of every label's plane and of every two, and those that are not to be had, each with the reason.

    Args:
        planes: by label; a string says why it has none.
        domains: what was measured on them.
    """
    numbers: dict[str, Interval] = {}
    without: dict[str, str] = {}
    ranges = [f"{domain}.range" for domain in domains]
    for label, plane in planes.items():
        if isinstance(plane, str):
            without |= {f"{label}.{name}": plane for name in ("cosine", *ranges, *(f"{each}.both" for each in domains))}
            continue
        if plane.geometry.cosine is None:
            without[f"{label}.cosine"] = NO_LENGTH
        else:
            numbers[f"{label}.cosine"] = exact(plane.geometry.cosine)
        for domain in domains:
            figure = plane.figures(domain)
            numbers |= {f"{label}.{domain}.both": figure.at_adapted[2], f"{label}.{domain}.range": figure.range}
    for (one, first), (other, second) in itertools.permutations(planes.items(), 2):
        name = f"{one}-minus-{other}"
        if isinstance(first, str) or isinstance(second, str):
            why = first if isinstance(first, str) else str(second)
            without |= {f"{name}.{figure}": why for figure in ("cosine", *ranges)}
            continue
        here, there = first.geometry.cosine, second.geometry.cosine
        if here is None or there is None:
            without[f"{name}.cosine"] = NO_LENGTH
        else:
            numbers[f"{name}.cosine"] = exact(abs(here) - abs(there))
        numbers |= {f"{name}.{domain}.range": range_apart(first, second, domain) for domain in domains}
    return numbers, without


def transfer(settings: dict[str, Any], context: Context) -> Outcome:
    """`gaintune transfer` over the gains that the step `of` trained separately.

    Settings: `of`, `label` (gain-ffn) and `components`. Numbers: `correlation.smallest`, `.largest` and `.mean`;
    `common_share` in %; `COMPONENT.PART.transfer`, `.in_domain` and `.left` in %, for the parts whole, shared and own.
    """
    trained, plan = context.trained(settings)
    label, components = settings.pop("label", "gain-ffn"), settings.pop("components", ["mean", "held-out"])
    context.refuse_unknown(settings)
    found = survey_transfer(plan, _of_label(trained, label, context), components=components, progress=context.progress)
    transfer_report.write(found, context.folder)
    pairs = found.sharing.pairs
    numbers = {
        "correlation.smallest": exact(min(pairs)),
        "correlation.largest": exact(max(pairs)),
        "correlation.mean": exact(sum(pairs) / len(pairs)),
        "common_share": exact(100 * found.sharing.common_share),
    }
    without, tables = {}, {}
    for one in found.ablations:
        rows = {}
        for part in PARTS:
            name, left = f"{one.component}.{part}", one.left(part)
            numbers |= {f"{name}.transfer": one.transfer(part), f"{name}.in_domain": one.in_domain(part)}
            if left is None:
                without[f"{name}.left"] = "the interval of the whole's transfer holds 0"
            else:
                numbers[f"{name}.left"] = left
            shown = NONE if left is None else with_interval(left, "%")
            rows[transfer_report.NAMES[part]] = [
                with_interval(one.transfer(part)),
                shown,
                with_interval(one.in_domain(part)),
            ]
        heads = ["Transfer to other domains, %", "Left of it", "Own domain, %"]
        tables[f"Shared is {transfer_report.MEANINGS[one.component]}; intervals over validation blocks"] = (
            pd.DataFrame.from_dict(rows, orient="index", columns=heads)
        )
    return Outcome(numbers, tables, tuple(sorted(context.folder.glob("*.png"))), without=without)


def retention(settings: dict[str, Any], context: Context) -> Outcome:
    """`gaintune retention` over the snapshots of the step `of` (`train.snapshot_steps`): its domains are the target.

    Settings: `of`, `labels`, `every`; `tasks` and `target` as in a step of benchmarks. Numbers: `LABEL.target` and
    `LABEL.texts`, change of perplexity in % at the last snapshot; `LABEL.texts.worst` at the worst one;
    `A-minus-B.texts` and `A-minus-B.target` at the last; in points against the base `LABEL.target_benchmarks` and, of
    all other benchmarks, `LABEL.kept` at the last, and `LABEL.kept.worst`.
    """
    trained, plan = context.trained(settings)
    adapters = last_of_each(trained, settings.pop("labels", None))
    every, tasks, target = (
        settings.pop(key, default) for key, default in (("every", 1), ("tasks", []), ("target", []))
    )
    config, missing = asked_config(settings, [*target, *tasks], plan, context)
    there = [] if config is None else [task.name for task in config.tasks]
    found = survey_retention(
        plan,
        list(adapters.values()),
        benchmarks=config,
        target_tasks=[name for name in (as_task(each)["name"] for each in target) if name in there],
        every=every,
        cache=context.folder / "measured",
        benchmark_cache=cache_dir() / "benchmarks",
        progress=context.progress,
    )
    retention_report.write(found, context.folder)
    courses = dict(zip(adapters, found.courses, strict=True))
    numbers: dict[str, Interval] = {}
    rows: dict[str, list[str]] = {}
    for label, course in courses.items():
        own = _course_numbers(found, course)
        numbers |= {f"{label}.{name}": value for name, value in own.items()}
        rows[label] = [with_interval(own[name]) if name in own else NONE for name in COURSE]
    for one in courses:
        for other in courses:
            if one != other:
                for name, domains in (("target", found.target), ("texts", found.texts)):
                    if domains:
                        numbers[f"{one}-minus-{other}.{name}"] = found.apart(courses[one], courses[other], domains)
    asked = (("target_benchmarks",) if target else ()) + (("kept", "kept.worst") if tasks else ())
    without = {f"{label}.{name}": "its benchmarks are left out, see the notes" for label in courses for name in asked}
    without |= dict.fromkeys(_text_names(courses), "no text is watched, or none of those is to be had")
    return Outcome(
        numbers,
        {LAST_SNAPSHOT: pd.DataFrame.from_dict(rows, orient="index", columns=list(COURSE.values()))},
        tuple(sorted(context.folder.glob("*.png"))),
        notes=tuple(f"left out, {name}: {why}" for name, why in missing.items()),
        without={name: why for name, why in without.items() if name not in numbers},
    )


def _text_names(labels: Collection[str]) -> list[str]:
    alone = [f"{label}.{name}" for label in labels for name in ("texts", "texts.worst")]
    return [*alone, *(f"{one}-minus-{other}.texts" for one in labels for other in labels if one != other)]


LAST_SNAPSHOT = "At the last snapshot; intervals over validation blocks, of benchmarks over their rows"
COURSE = {
    "target": "Target, % of perplexity",
    "texts": "Other texts, %",
    "texts.worst": "Other texts at their worst, %",
    "target_benchmarks": "Target's benchmarks, points",
    "kept": "Other benchmarks, points",
    "kept.worst": "Other benchmarks at their worst, points",
}
"""The numbers of a course, and how tables call them."""


def _course_numbers(found: Retention, course: Course) -> dict[str, Interval]:
    """The numbers of one adaptation over time, by their names."""
    last = course.moments[-1]
    numbers = {"target": found.change(course, last, found.target), "texts": found.change(course, last, found.texts)}
    over_time = [found.change(course, moment, found.texts) for moment in course.moments if moment.step]
    texts = [one for one in over_time if one is not None]
    numbers["texts.worst"] = highest(texts) if texts else None
    numbers["target_benchmarks"] = last.scores.target_change if last.scores else None
    kept = [moment.scores.retention_change for moment in course.moments if moment.step and moment.scores]
    numbers["kept"] = kept[-1] if kept else None
    benchmarks = [one for one in kept if one is not None]
    numbers["kept.worst"] = lowest(benchmarks) if benchmarks else None
    return {name: value for name, value in numbers.items() if value is not None}


def _by_label(trained: Outcome) -> dict[str, dict[str, Path]]:
    """Adapters by label and the domain they learnt last."""
    found: dict[str, dict[str, Path]] = {}
    for key, folder in trained.adapters.items():
        label, _, domain = key.partition("/")
        found.setdefault(label, {})[domain] = folder
    return found


def _of_label(trained: Outcome, label: str, context: Context) -> Sequence[Path]:
    own = _by_label(trained)
    if label not in own:
        raise ConfigError(f"{context.origin}: no adapter is called {label!r}; there are {', '.join(own)}")
    return list(own[label].values())
