"""The matrix of a run: what every domain gained or lost after every stage, with paired bootstrap intervals.

Pure functions over losses that were already measured (`losses`), giving the numbers of matrix.json (`records`).
Perplexity is exp(nats / scored token); a change is 100 * (after / base - 1) in % of perplexity, so negative is better.
The mathematics of resampling, and of widening for few blocks, is in `bootstrap`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gaintune.config import EvaluateConfig
from gaintune.errors import DataError
from gaintune.evaluate.bootstrap import (
    FloatArray,
    bounds,
    percent,
    replicate_means,
    stage_figures,
    summary_figures,
)
from gaintune.evaluate.losses import DomainLoss, MethodRun, Stage, change
from gaintune.evaluate.records import (
    BaseFigures,
    Cell,
    Comparison,
    Interval,
    Matrix,
    MatrixRow,
    MethodMatrix,
    Settings,
    StageSummary,
    Summary,
)

__all__ = [
    "BaseFigures",
    "Cell",
    "Comparison",
    "DomainLoss",
    "Interval",
    "Matrix",
    "MatrixRow",
    "MethodMatrix",
    "MethodRun",
    "Settings",
    "Stage",
    "StageSummary",
    "Summary",
    "build_matrix",
    "change",
    "summary_replicates",
]


def build_matrix(
    runs: Sequence[MethodRun], evaluate: EvaluateConfig, *, planned: Sequence[str] | None = None
) -> Matrix:
    """Compute every number of matrix.json.

    A partial run gives what is there: stages may be missing, and the last one may lack domains, which keeps it out of
    the summaries. Domains that are evaluated but never learnt count as not yet learnt at every stage.

    Args:
        runs: one for each method; the first is the one that the others are compared with.
        evaluate: number of resamples, confidence and seed.
        planned: the domains to be learnt, in order; the longest run's stages when not given.

    Raises:
        DataError: no run, labels or stages that repeat, or one domain measured on different blocks.
    """
    _check_names(runs)
    longest = max(runs, key=lambda run: len(run.stages))
    planned = tuple(planned) if planned is not None else tuple(stage.domain for stage in longest.stages)
    domains = _order(runs, planned)
    _check_blocks(runs, domains)
    nats = _replicates(runs, domains, evaluate)
    finished = [_finished_stages(run, planned) for run in runs]
    columns = [[column for column, name in enumerate(domains) if name in run.base] for run in runs]
    methods = tuple(
        _method(run, cells, domains, kept, count, evaluate.confidence)
        for run, cells, kept, count in zip(runs, nats, columns, finished, strict=True)
    )
    comparisons = tuple(
        _compare(runs, nats, domains, columns, other, min(finished[0], finished[other]), evaluate.confidence)
        for other in range(1, len(runs))
    )
    settings = Settings(evaluate.bootstrap_samples, evaluate.confidence, evaluate.seed)
    partial = any(count < max(len(planned), len(run.stages)) for run, count in zip(runs, finished, strict=True))
    return Matrix(domains, planned, methods, tuple(filter(None, comparisons)), settings, partial)


def _check_names(runs: Sequence[MethodRun]) -> None:
    labels = [run.label for run in runs]
    if not runs or len(set(labels)) != len(labels):
        raise DataError(f"a matrix needs methods with different labels, got {labels}")
    for run in runs:
        learnt = [stage.domain for stage in run.stages]
        if len(set(learnt)) != len(learnt):
            raise DataError(f"{run.label}: a domain is learnt twice in {', '.join(learnt)}")


def _order(runs: Sequence[MethodRun], planned: Sequence[str]) -> tuple[str, ...]:
    """Planned domains first, then what else was learnt, then what was only evaluated; each once."""
    learnt = [stage.domain for run in runs for stage in run.stages]
    measured = [name for run in runs for name in run.base]
    return tuple(dict.fromkeys([*planned, *learnt, *measured]))


def _check_blocks(runs: Sequence[MethodRun], domains: Sequence[str]) -> None:
    """Pairing needs the same blocks everywhere."""
    for domain in domains:
        seen: DomainLoss | None = None
        for run in runs:
            for where, losses in [("base", run.base), *((f"stage {one.domain}", one.losses) for one in run.stages)]:
                loss = losses.get(domain)
                seen = seen or loss
                if loss and seen and (loss.tokens, loss.bytes) != (seen.tokens, seen.bytes):
                    raise DataError(
                        f"{domain}: {run.label}, {where} was measured on other blocks ({len(loss.tokens)} blocks, "
                        f"{sum(loss.tokens)} tokens) than the first ({len(seen.tokens)}, {sum(seen.tokens)})"
                    )


def _replicates(runs: Sequence[MethodRun], domains: Sequence[str], evaluate: EvaluateConfig) -> list[FloatArray]:
    """For each method the nats lost or gained against its base, `(1 + samples, stages, domains)`; NaN where missing."""
    samples = evaluate.bootstrap_samples
    result = [np.full((1 + samples, len(run.stages), len(domains)), np.nan) for run in runs]
    for column, domain in enumerate(domains):
        places, rows, tokens = [], [], ()
        for method, run in enumerate(runs):
            base = run.base.get(domain)
            for index, stage in enumerate(run.stages):
                after = stage.losses.get(domain)
                if base is not None and after is not None:
                    places.append((method, index))
                    rows.append(np.subtract(after.nll, base.nll))  # identical losses are exactly 0 in every replicate
                    tokens = base.tokens
        if rows:
            means = replicate_means(
                np.array(rows),
                np.array(tokens),
                samples=samples,
                seed=evaluate.seed,
                domain=domain,
                confidence=evaluate.confidence,
            )
            for row, (method, index) in enumerate(places):
                result[method][:, index, column] = means[:, row]
    return result


def _finished_stages(run: MethodRun, planned: Sequence[str]) -> int:
    """Stages from the first on after which every domain of the base was evaluated."""
    if not set(planned) <= set(run.base):
        return 0
    for count, stage in enumerate(run.stages):
        if stage.domain not in run.base or not set(run.base) <= set(stage.losses):
            return count
    return len(run.stages)


def _figures(
    nats: FloatArray, domains: Sequence[str], columns: list[int], learnt: Sequence[str]
) -> dict[str, FloatArray | None]:
    """Summary figures after the stages in `learnt`, over the columns that have a base."""
    kept = [domains[column] for column in columns]
    return summary_figures(nats[:, : len(learnt)][:, :, columns], [kept.index(domain) for domain in learnt])


def summary_replicates(
    run: MethodRun, evaluate: EvaluateConfig, planned: Sequence[str]
) -> dict[str, FloatArray | None]:
    """The summary figures of a finished run with their block resamples, each `(1 + samples,)` in %; 0 is the sample.

    Resample b takes the same blocks of a domain in every run with the same settings and texts, so that differences and
    means of several runs can be taken resample by resample. They are widened for few blocks: their percentiles at
    `evaluate.confidence` are the interval. None where a figure has no cell.

    Raises:
        DataError: the run is not finished.
    """
    domains = _order([run], planned)
    if _finished_stages(run, planned) < len(planned):
        raise DataError(f"{run.label}: not every planned stage is finished and measured")
    columns = [column for column, name in enumerate(domains) if name in run.base]
    return _figures(_replicates([run], domains, evaluate)[0], domains, columns, planned)


def _interval(replicates: FloatArray | None, confidence: float) -> Interval | None:
    if replicates is None:
        return None
    low, high = bounds(replicates, confidence)
    if np.isnan(low):
        return Interval(float(replicates[0]), None, None)
    return Interval(float(replicates[0]), float(low), float(high))


def _compare(
    runs: Sequence[MethodRun],
    nats: Sequence[FloatArray],
    domains: Sequence[str],
    columns: Sequence[list[int]],
    other: int,
    stages: int,
    confidence: float,
) -> Comparison | None:
    """Paired difference of a method to the first one after `stages`; None unless both took the same way there."""
    learnt = [stage.domain for stage in runs[0].stages[:stages]]
    if not stages or learnt != [stage.domain for stage in runs[other].stages[:stages]] or columns[0] != columns[other]:
        return None
    first = _figures(nats[0], domains, columns[0], learnt)
    second = _figures(nats[other], domains, columns[other], learnt)
    differences = {
        name: _interval(values - reference, confidence)
        for name, values in second.items()
        if values is not None and (reference := first[name]) is not None
    }
    return Comparison(runs[other].label, runs[0].label, stages, Summary(**differences))


def _method(
    run: MethodRun, nats: FloatArray, domains: Sequence[str], columns: list[int], finished: int, confidence: float
) -> MethodMatrix:
    base = {
        name: BaseFigures(loss.perplexity, loss.bits_per_byte, sum(loss.tokens), sum(loss.bytes), len(loss.tokens))
        for name, loss in run.base.items()
    }
    rows = []
    for index, stage in enumerate(run.stages):
        cells = {}
        for column in columns:
            loss = stage.losses.get(domains[column])
            interval = _interval(percent(nats[:, index, column]), confidence)
            if loss is not None and interval is not None:
                cells[domains[column]] = Cell(
                    loss.perplexity, loss.bits_per_byte, interval.value, interval.low, interval.high
                )
        rows.append(MatrixRow(stage.domain, cells, index < finished))
    learnt = [stage.domain for stage in run.stages[:finished]]
    figures = _figures(nats, domains, columns, learnt)
    summary = Summary(**{name: _interval(values, confidence) for name, values in figures.items()})
    kept = [domains[column] for column in columns]
    places = [kept.index(domain) for domain in learnt]
    per_stage = tuple(
        StageSummary(
            domain,
            **{
                name: _interval(values, confidence)
                for name, values in stage_figures(nats[:, :finished][:, :, columns], places, index).items()
            },
        )
        for index, domain in enumerate(learnt)
    )
    return MethodMatrix(run.label, dict(run.info), base, tuple(rows), summary, per_stage)
