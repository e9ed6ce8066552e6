"""Steps that look into what others trained, or at the linear model: gates, factors, subspaces, tokens."""

from __future__ import annotations

import itertools
from typing import Any

import pandas as pd

from gaintune.analysis.gains import report as gain_report
from gaintune.analysis.subspace import report as subspace_report
from gaintune.analysis.tokens import report as tokens_report
from gaintune.analysis.gains.survey import FactorFigures, FactorSurvey, StageFactors, survey_gains
from gaintune.analysis.gates.apart import compared
from gaintune.analysis.gates.report import groups
from gaintune.analysis.gates.report import write as write_gates
from gaintune.analysis.gates.statistics import EVERY, GateRecord, GateSummary, summarise
from gaintune.analysis.gates.survey import survey_gates
from gaintune.analysis.linear_model.experiment import Settings, run_experiment
from gaintune.analysis.linear_model.report import checks, summary
from gaintune.analysis.linear_model.report import write as write_linear
from gaintune.analysis.subspace.compare import SubspaceSettings
from gaintune.analysis.subspace.survey import survey_subspace
from gaintune.analysis.tokens.survey import survey_tokens
from gaintune.config.plan import EvaluateConfig
from gaintune.errors import ConfigError
from gaintune.results.records import Interval
from gaintune.recipes.steps.train import left_out, nothing_to_learn
from gaintune.recipes.outcome import Context, Outcome, bare, exact, last_of_each

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
    if trained.plan is not None and any(each.label == label and each.name != "disel" for each in trained.plan.methods):
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
