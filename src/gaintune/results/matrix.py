"""The matrix of a run: what every domain gained or lost after every stage, with paired bootstrap intervals.

Pure functions over losses that were already measured (`losses`), giving the numbers of matrix.json (`records`).
Perplexity is exp(nats / scored token); a change is 100 * (after / base - 1) in % of perplexity, so negative is better.
The mathematics of resampling is in `bootstrap`, that of intervals over few blocks in `averages`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gaintune.config import EvaluateConfig
from gaintune.errors import DataError
from gaintune.results.averages import sum_interval, sum_intervals
from gaintune.results.bootstrap import (
    FloatArray,
    percent,
    replicate_means,
    stage_figures,
    stretched,
    summary_figures,
    unbiased,
)
from gaintune.results.losses import DomainLoss, MethodRun, Stage, change
from gaintune.results.records import (
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
    "SummaryParts",
    "build_matrix",
    "change",
    "summary_parts",
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
            )
            for row, (method, index) in enumerate(places):
                result[method][:, index, column] = unbiased(means[:, row], len(tokens))
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


@dataclass(frozen=True, eq=False)
class SummaryParts:
    """The summary figures of a finished run with their block resamples, as sums of what each domain adds.

    Attributes:
        domains: what was measured, by name, so that runs of other orders have the same columns.
        blocks: how many blocks each has, `(domains,)`.
        figures: `(1 + samples, domains)` in %, 0 the sample; `averages.reach` says how far an interval of them
            reaches. None where a figure has no cell.
    """

    domains: tuple[str, ...]
    blocks: tuple[int, ...]
    figures: dict[str, FloatArray | None]


def summary_parts(run: MethodRun, evaluate: EvaluateConfig, planned: Sequence[str]) -> SummaryParts:
    """The summary figures of a finished run by domain.

    Resample b takes the same blocks of a domain in every run with the same settings and texts, so that differences and
    means of several runs can be taken resample by resample.

    Raises:
        DataError: the run is not finished.
    """
    domains = _order([run], planned)
    if _finished_stages(run, planned) < len(planned):
        raise DataError(f"{run.label}: not every planned stage is finished and measured")
    by_name = sorted(run.base)
    columns = [domains.index(name) for name in by_name]
    figures = _figures(_replicates([run], domains, evaluate)[0], domains, columns, planned)
    return SummaryParts(tuple(by_name), _blocks([run], by_name), figures)


def _blocks(runs: Sequence[MethodRun], domains: Sequence[str]) -> tuple[int, ...]:
    """How many blocks each domain has."""
    return tuple(next(len(run.base[name].tokens) for run in runs if name in run.base) for name in domains)


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

    def differences(factor: float) -> dict[str, FloatArray | None]:
        first, second = (_figures(stretched(nats[which], factor), domains, columns[0], learnt) for which in (0, other))
        return {
            name: None if parts is None or (less := first[name]) is None else parts - less
            for name, parts in second.items()
        }

    blocks = _blocks(runs, [domains[column] for column in columns[0]])
    return Comparison(
        runs[other].label, runs[0].label, stages, Summary(**sum_intervals(differences, blocks, confidence))
    )


def _cell(loss: DomainLoss, nats: FloatArray, confidence: float) -> Cell:
    """One domain after one stage; `nats` are `(1 + samples, 1)`."""
    found = sum_interval(lambda factor: percent(stretched(nats, factor)), [len(loss.tokens)], confidence)
    return Cell(loss.perplexity, loss.bits_per_byte, found.value, found.low, found.high)


def _method(
    run: MethodRun, nats: FloatArray, domains: Sequence[str], columns: list[int], finished: int, confidence: float
) -> MethodMatrix:
    base = {
        name: BaseFigures(
            loss.perplexity, loss.bits_per_byte, sum(loss.tokens), sum(loss.bytes or ()), len(loss.tokens)
        )
        for name, loss in run.base.items()
    }
    kept = [domains[column] for column in columns]
    blocks = _blocks([run], kept)
    rows = []
    for index, stage in enumerate(run.stages):
        cells = {
            domains[column]: _cell(stage.losses[domains[column]], nats[:, index, [column]], confidence)
            for column in columns
            if domains[column] in stage.losses
        }
        rows.append(MatrixRow(stage.domain, cells, index < finished))
    learnt = [stage.domain for stage in run.stages[:finished]]
    places = [kept.index(domain) for domain in learnt]

    def summary(factor: float) -> dict[str, FloatArray | None]:
        return _figures(stretched(nats, factor), domains, columns, learnt)

    def at_stage(index: int, factor: float) -> dict[str, FloatArray | None]:
        return stage_figures(stretched(nats[:, index, columns], factor), places, index)

    per_stage = tuple(
        StageSummary(domain, **sum_intervals(functools.partial(at_stage, index), blocks, confidence))
        for index, domain in enumerate(learnt)
    )
    return MethodMatrix(
        run.label, dict(run.info), base, tuple(rows), Summary(**sum_intervals(summary, blocks, confidence)), per_stage
    )
