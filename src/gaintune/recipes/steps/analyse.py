"""Steps that look into what others trained, or at the linear model: gates, factors, subspaces, tokens."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from gaintune.analysis.gains import report as gain_report
from gaintune.analysis.gains.survey import FactorFigures, FactorSurvey, StageFactors, survey_gains
from gaintune.analysis.gates.apart import compared
from gaintune.analysis.gates.report import groups
from gaintune.analysis.gates.report import write as write_gates
from gaintune.analysis.gates.statistics import EVERY, GateRecord, GateSummary, summarise
from gaintune.analysis.gates.survey import survey_gates
from gaintune.analysis.landscape import report as landscape_report
from gaintune.analysis.landscape.surface import Surface, range_apart
from gaintune.analysis.landscape.survey import GRID, LINE, survey_landscape
from gaintune.analysis.linear_model.experiment import Settings, run_experiment
from gaintune.analysis.linear_model.report import checks, summary
from gaintune.analysis.linear_model.report import write as write_linear
from gaintune.analysis.retention import report as retention_report
from gaintune.analysis.retention.survey import Course, Retention, survey_retention
from gaintune.analysis.subspace import report as subspace_report
from gaintune.analysis.subspace.compare import SubspaceSettings
from gaintune.analysis.subspace.survey import survey_subspace
from gaintune.analysis.tokens import report as tokens_report
from gaintune.analysis.tokens.survey import survey_tokens
from gaintune.analysis.transfer import report as transfer_report
from gaintune.analysis.transfer.survey import PARTS, survey_transfer
from gaintune.config import EvaluateConfig
from gaintune.errors import ConfigError
from gaintune.evaluate.benchmarks import as_task
from gaintune.methods import get_method
from gaintune.recipes.outcome import Context, Outcome, bare, exact, highest, last_of_each, lowest
from gaintune.recipes.steps.benchmarks import asked_config
from gaintune.recipes.steps.train import left_out, nothing_to_learn
from gaintune.report import NONE, with_interval
from gaintune.results import Interval
from gaintune.storage import cache_dir

LINEAR = {"dimension": 32, "rank": 4, "separation": 3.0, "steps": 1500, "seeds": 5}
"""What `gaintune linear-model` takes unless told otherwise."""


def linear_model(settings: dict[str, Any], context: Context) -> Outcome:
    """`gaintune linear-model`; numbers `METHOD.to_fixed` and `METHOD.to_bayes`: mean and range over seeds."""
    chosen = context.read(Settings, settings, LINEAR)
    results = run_experiment(chosen, context.progress)
    write_linear(chosen, results, context.folder)
    numbers = {}
    rows = {}
    for row in summary(results):
        name = row.name.replace(" ", "-")
        numbers[f"{name}.to_fixed"] = Interval(*row.to_fixed)
        numbers[f"{name}.to_bayes"] = Interval(*row.to_bayes)
        rows[row.name] = [
            f"{value:.4f}"
            for value in (
                row.losses.total,
                row.losses.in_domain,
                row.losses.retention,
                row.to_fixed[0],
                row.to_bayes[0],
            )
        ]
    heads = ["Loss", "In-domain", "Retention", "Loss / best fixed", "Loss / Bayes"]
    held = [f"{'holds' if check.holds else 'does not hold'} on every seed: {check.claim}" for check in checks(results)]
    return Outcome(
        numbers,
        {f"Mean of {chosen.seeds} seeds": pd.DataFrame.from_dict(rows, orient="index", columns=heads)},
        tuple(sorted(context.folder.glob("*.png"))),
        notes=tuple(held),
    )


def gates(settings: dict[str, Any], context: Context) -> Outcome:
    """`gaintune gates` on the DISeL adapters called `label` of the step `of`, on `domains`.

    Numbers: `LABEL.DOMAIN.DEPTH.mean` and `LABEL.DOMAIN.PROJECTION.mean`; with intervals over rows of text
    `LABEL.A-minus-B.mean`, `.DEPTH.mean`, `.DEPTH.BLOCK.mean` and `.PROJECTION.mean` of two domains, and on one
    `LABEL.DOMAIN.PROJECTION-minus-PROJECTION.mean` and `LABEL.DOMAIN.mlp-minus-attention.mean`.

    Several stages of a sequence have names of their own, `LABEL.after-STAGE.…`; without, it is the last one.
    """
    trained = context.of(settings)
    label, stages = gated(settings, trained, context)
    if why := nothing_to_learn(settings, context):
        return Outcome(notes=(why,), left_out=True)
    plan = context.world.plan(settings, origin=context.origin)
    found: dict[str, Interval] = {}
    tables, figures = {}, []
    for key in stages:
        adapter, numbers = trained.adapters[key], {}
        folder = context.folder / key.replace("/", "-")
        survey = survey_gates(plan, adapter, progress=context.progress)
        write_gates(survey, folder)
        rows = {}
        for domain, depth, block, one in groups(survey.record):
            name = f"{domain}.{depth}" if block == "all" else f"{domain}.{depth}.{block}"
            numbers[f"{label}.{name}.mean"] = bare(one.mean)
            rows[f"{domain}, {depth}, {block}"] = _gate_cells(one)
        for domain, layers in survey.record.domains.items():
            for projection in dict.fromkeys(layer.place.projection for layer in layers):
                one = summarise([layer for layer in layers if layer.place.projection == projection])
                numbers[f"{label}.{domain}.{projection}.mean"] = bare(one.mean)
                rows[f"{domain}, {projection}"] = _gate_cells(one)
        numbers |= _gates_apart(survey.record, label, plan.evaluate)
        tables[f"Gates of {key}, from 0 (shut) to 1 (open)"] = pd.DataFrame.from_dict(
            rows, orient="index", columns=["Mean", "SD", "Below 0.05"]
        )
        figures += sorted(folder.glob("*.png"))
        if len(stages) > 1:
            after = f"{label}.after-{key.partition('/')[2]}"
            found |= {f"{after}{name.removeprefix(label)}": value for name, value in numbers.items()}
        if not trained.apart or len(stages) == 1:
            found |= numbers
    return Outcome(found, tables, tuple(figures), notes=left_out(settings, context))


def gated(settings: dict[str, Any], trained: Outcome, context: Context) -> tuple[str, list[str]]:
    """Take `label` out of the settings: the label of a step's adapters, and the keys of those that it is of.

    Raises:
        ConfigError: no adapter is called so, or its method has no gates.
    """
    label = settings.pop("label", "disel")
    stages = [key for key in trained.adapters if key.partition("/")[0] == label]
    if not stages:
        raise ConfigError(f"{context.origin}: no adapter is called {label!r}; there are {', '.join(trained.labels)}")
    methods = trained.plan.methods if trained.plan else ()
    if any(each.label == label and not get_method(each.name).gates for each in methods):
        raise ConfigError(f"{context.origin}: {label} has no gates; name one of method disel")
    return label, stages


def _gates_apart(record: GateRecord, label: str, settings: EvaluateConfig) -> dict[str, Interval]:
    """Mean gates of domains and parts less those of others; what is "all" is not named."""
    numbers = {}
    for (one, other), apart in compared(record, settings).items():
        if one.domain == other.domain:
            name = f"{one.domain}.{one.part}-minus-{other.part}"
        else:
            told = [each for each in (one.depth, one.part) if each != EVERY]
            name = ".".join([f"{one.domain}-minus-{other.domain}", *told])
        numbers[f"{label}.{name}.mean"] = apart
    return numbers


def _gate_cells(one: GateSummary) -> list[str]:
    return [f"{one.mean:.4f}", f"{one.deviation:.4f}", f"{100 * one.closed:.1f} %"]


def gains(settings: dict[str, Any], context: Context) -> Outcome:
    """`gaintune gains` on the runs of the step `of`; methods without factors are left out.

    Numbers, counted and not sampled: `LABEL.smallest`, `.largest`, `.near` (share within [0.95, 1.05], in %) and
    `.flipped` after the last domain, `LABEL.after-DOMAIN.…` after each, `LABEL.smallest_ever` and `.flipped_ever` over
    all stages; `A-minus-B.near` after the last. Of domains learnt apart from each other all begin with `DOMAIN.`.
    """
    trained = context.of(settings)
    context.refuse_unknown(settings)
    survey = survey_gains(trained.runs)
    gain_report.write(survey, context.folder)
    numbers: dict[str, Interval] = {}
    tables, notes = {}, [f"left out, a method without factors: {label}" for label in survey.left_out]
    for sequence in survey.sequences:
        label = sequence.label.replace(": ", ".")  # of several runs the run stands in front
        stages = [stage.figures for stage in sequence.stages]
        numbers[f"{label}.smallest_ever"] = exact(min(stage.smallest for stage in stages))
        numbers[f"{label}.flipped_ever"] = exact(max(stage.flipped for stage in stages))
        rows = {}
        for stage in sequence.stages:
            own = _factors(stage.figures)
            numbers |= {f"{label}.after-{stage.domain}.{name}": exact(value) for name, value in own.items()}
            numbers |= {f"{label}.{name}": exact(value) for name, value in own.items()}  # the last stage stays
            cells = [f"{own['smallest']:.3f}", f"{own['largest']:.3f}", f"{own['near']:.1f} %", str(own["flipped"])]
            rows[f"+{stage.domain}"] = cells
        heads = ["Smallest", "Largest", "Within [0.95, 1.05]", "At or below 0"]
        tables[f"Factors of {label}"] = pd.DataFrame.from_dict(rows, orient="index", columns=heads)
        notes.append(f"{label}: {gain_report.verdict(sequence)}")
    apart, without = _near_apart(survey)
    figures = tuple(sorted(context.folder.glob("*.png")))
    return Outcome(numbers | apart, tables, figures, notes=tuple(notes), without=without)


def _near_apart(survey: FactorSurvey) -> tuple[dict[str, Interval], dict[str, str]]:
    """The differences of `near` within each run, and those that methods with unequally many stages have not."""
    runs: dict[str, dict[str, StageFactors]] = {}
    for sequence in survey.sequences:
        run, _, label = sequence.label.rpartition(": ")
        runs.setdefault(f"{run}." if run else "", {})[label] = sequence.stages[-1]
    numbers, without = {}, {}
    for run, ends in runs.items():
        for (one, first), (other, second) in itertools.permutations(ends.items(), 2):
            name = f"{run}{one}-minus-{other}.near"
            if first.index == second.index:
                numbers[name] = exact(100 * (first.figures.near - second.figures.near))
            else:
                without[name] = f"{one} ends with {first.domain}, {other} with {second.domain}"
    return numbers, without


def _factors(figures: FactorFigures) -> dict[str, float]:
    return {
        "smallest": figures.smallest,
        "largest": figures.largest,
        "near": 100 * figures.near,
        "flipped": figures.flipped,
    }


def subspace(settings: dict[str, Any], context: Context) -> Outcome:
    """`gaintune subspace` on what each method of the step `of` ended with; `labels` and `after` pick some.

    Numbers, counted and not sampled: `LABEL.outside` and `LABEL.outside_leading`, shares of the update's energy in %;
    `LABEL.intruders`.
    """
    trained, plan = context.trained(settings)
    adapters = last_of_each(trained, settings.pop("labels", None), settings.pop("after", None))
    chosen = context.read(SubspaceSettings, settings, {})
    survey = survey_subspace(list(adapters.values()), plan.model, settings=chosen, progress=context.progress)
    subspace_report.write(survey, context.folder)
    numbers, without = {}, {}
    for label, one in zip(adapters, survey.adapters, strict=True):
        numbers[f"{label}.intruders"] = exact(one.intruders())
        for name, share in (("outside", one.outside), ("outside_leading", one.outside_leading)):
            if share is None:
                without[f"{label}.{name}"] = "no adapted weight has such directions"
            else:
                numbers[f"{label}.{name}"] = exact(100 * share)
    rows = pd.DataFrame(subspace_report.summary_rows(survey), columns=subspace_report.heads(survey)).set_index(
        "adapter"
    )
    figures = tuple(sorted(context.folder.glob("*.png")))
    return Outcome(numbers, {"Updates": rows}, figures, notes=tuple(subspace_report.remarks(survey)), without=without)


def tokens(settings: dict[str, Any], context: Context) -> Outcome:
    """`gaintune tokens` on `domains` for what each method of the step `of` ended with; `labels` and `after` pick some.

    Numbers: `LABEL.DOMAIN.mean` in nats and `LABEL.DOMAIN.coherence`, with intervals over blocks; `.size`, the mean
    size of a change, and `.skew`, without.
    """
    trained = context.of(settings)
    adapters = last_of_each(trained, settings.pop("labels", None), settings.pop("after", None))
    if why := nothing_to_learn(settings, context):
        return Outcome(notes=(why,), left_out=True)
    plan = context.world.plan(settings, origin=context.origin)
    survey = survey_tokens(plan, list(adapters.values()), progress=context.progress)
    tokens_report.write(survey, context.folder)
    numbers: dict[str, Interval] = {}
    tables, without = {}, {}
    for domain, found in survey.changes.items():
        rows = {}
        for label, one in zip(adapters, found.values(), strict=True):
            name = f"{label}.{domain}"
            numbers |= {f"{name}.mean": one.mean, f"{name}.size": bare(one.mean_absolute)}
            for figure, value in (("coherence", one.coherence), ("skew", None if one.skew is None else bare(one.skew))):
                if value is None:
                    without[f"{name}.{figure}"] = "no loss changed"
                else:
                    numbers[f"{name}.{figure}"] = value
            rows[label] = tokens_report.cells(one)
        heads = [head[:1].upper() + head[1:] for head in tokens_report.HEADS]
        tables[f"{domain}: change of every token's loss, intervals over blocks"] = pd.DataFrame.from_dict(
            rows, orient="index", columns=heads
        )
    figures = tuple(sorted(context.folder.glob("*.png")))
    return Outcome(numbers, tables, figures, notes=left_out(settings, context), without=without)


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
