"""Steps that look at what others trained, or at the linear model: gates and the closed forms."""

from __future__ import annotations

from typing import Any

import pandas as pd

from gaintune.analysis.gate_report import groups
from gaintune.analysis.gate_report import write as write_gates
from gaintune.analysis.gate_survey import survey_gates
from gaintune.analysis.linear_experiment import Settings, run_experiment
from gaintune.analysis.linear_report import checks, summary
from gaintune.analysis.linear_report import write as write_linear
from gaintune.evaluate.records import Interval
from gaintune.recipes.outcome import Context, Outcome, bare


def linear_model(settings: dict[str, Any], context: Context) -> Outcome:
    """`gaintune linear-model`; numbers `METHOD.to_fixed` and `METHOD.to_bayes`: mean and range over seeds."""
    chosen = Settings(**{"dimension": 32, "rank": 4, "separation": 3.0, "steps": 1500, "seeds": 5, **settings})
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
    """`gaintune gates` on every DISeL adapter of the step `of`, on `domains`; numbers `LABEL.DOMAIN.DEPTH.mean`."""
    trained = context.of(settings)
    label = settings.pop("label", "disel")
    plan = context.world.plan(settings, origin=context.origin)
    numbers, tables, figures = {}, {}, []
    for key, adapter in trained.adapters.items():
        if key.partition("/")[0] != label:
            continue
        folder = context.folder / key.replace("/", "-")
        survey = survey_gates(plan, adapter, progress=context.progress)
        write_gates(survey, folder)
        rows = {}
        for domain, depth, block, one in groups(survey.record):
            name = f"{domain}.{depth}" if block == "all" else f"{domain}.{depth}.{block}"
            numbers[f"{label}.{name}.mean"] = bare(one.mean)
            rows[domain, depth, block] = [f"{one.mean:.4f}", f"{one.deviation:.4f}", f"{100 * one.closed:.1f} %"]
        tables[f"Gates of {key}"] = pd.DataFrame.from_dict(rows, orient="index", columns=["Mean", "SD", "Below 0.05"])
        figures += sorted(folder.glob("*.png"))
    return Outcome(numbers, tables, tuple(figures), notes=())
