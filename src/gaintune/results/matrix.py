"""The matrix of a run: what every domain gained or lost after every stage, with paired bootstrap intervals.

Perplexity is exp(nats / scored token); a change is 100 * (after / base - 1) in % of perplexity, so negative is better.
The losses were measured before, so no function here needs a model.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gaintune.config import EvaluateConfig
from gaintune.errors import DataError
from gaintune.results.bootstrap import FloatArray, replicate_means, stage_figures, stretched, summary_figures, unbiased
from gaintune.results.changes import Change, mean_change, sum_intervals
from gaintune.results.records import (
    BaseFigures,
    Cell,
    Comparison,
    DomainLoss,
    Matrix,
    MatrixRow,
    MethodMatrix,
    MethodRun,
    Settings,
    Stage,
    StageSummary,
    Summary,
)
from gaintune.storage import Run, read_stored

logger = logging.getLogger(__name__)


def build_matrix(
    runs: Sequence[MethodRun], evaluate: EvaluateConfig, *, planned: Sequence[str] | None = None
) -> Matrix:
    """Compute every number of matrix.json.

    A partial run gives what is there: stages may be missing, and the last one may lack domains, which keeps it out of
    the summaries. Domains that are evaluated but never trained count as later domains at every stage.

    Args:
        runs: the methods; the others are compared with the first.
        evaluate: number of resamples, confidence and seed.
        planned: the domains to train on, in order; the longest run's stages when not given.

    Raises:
        DataError: no run, labels or stages that repeat, or a domain measured on different blocks.
    """
    _check_names(runs)
    longest = max(runs, key=lambda run: len(run.stages))
    planned = tuple(planned) if planned is not None else tuple(stage.domain for stage in longest.stages)
    domains = _order(runs, planned)
    _check_blocks(runs, domains)
    nats = _replicates(runs, domains, evaluate)
    finished = [_finished_stages(run, planned) for run in runs]
    methods = tuple(
        _method(run, cells, domains, count, evaluate) for run, cells, count in zip(runs, nats, finished, strict=True)
    )
    comparisons = (
        _compare((runs[0], runs[other]), (nats[0], nats[other]), domains, min(finished[0], finished[other]), evaluate)
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
        trained = [stage.domain for stage in run.stages]
        if len(set(trained)) != len(trained):
            raise DataError(f"{run.label}: a domain is trained twice in {', '.join(trained)}")


def _order(runs: Sequence[MethodRun], planned: Sequence[str]) -> tuple[str, ...]:
    """Order planned domains first, then others that were trained, then those only evaluated; each once."""
    trained = [stage.domain for run in runs for stage in run.stages]
    return tuple(dict.fromkeys([*planned, *trained, *(name for run in runs for name in run.base)]))


def _check_blocks(runs: Sequence[MethodRun], domains: Sequence[str]) -> None:
    """Refuse a domain that was measured on different blocks: pairing needs the same blocks everywhere."""
    for domain in domains:
        first: DomainLoss | None = None
        for run in runs:
            after = [(f"stage {stage.domain}", stage.losses) for stage in run.stages]
            for where, losses in [("base", run.base), *after]:
                loss = losses.get(domain)
                first = first or loss
                if loss and first and (loss.tokens, loss.bytes) != (first.tokens, first.bytes):
                    raise DataError(
                        f"{domain}: {run.label}, {where} was measured on other blocks ({len(loss.tokens)} blocks, "
                        f"{sum(loss.tokens)} tokens) than the first ({len(first.tokens)}, {sum(first.tokens)})"
                    )


def _measured(run: MethodRun, domains: Sequence[str]) -> list[str]:
    """Return the domains that the base was measured on: the columns of a method."""
    return [domain for domain in domains if domain in run.base]


def _replicates(runs: Sequence[MethodRun], domains: Sequence[str], evaluate: EvaluateConfig) -> list[FloatArray]:
    """Return each method's nats against its base, `(1 + samples, stages, measured domains)`; NaN where missing."""
    samples, seed = evaluate.bootstrap_samples, evaluate.seed
    columns = [_measured(run, domains) for run in runs]
    result = [np.full((1 + samples, len(run.stages), len(own)), np.nan) for run, own in zip(runs, columns, strict=True)]
    for domain in domains:
        cells, rows, tokens = [], [], ()
        for method, run in enumerate(runs):
            base = run.base.get(domain)
            for index, stage in enumerate(run.stages):
                after = stage.losses.get(domain)
                if base is not None and after is not None:
                    cells.append((method, index, columns[method].index(domain)))
                    rows.append(np.subtract(after.nll, base.nll))  # identical losses are exactly 0 in every replicate
                    tokens = base.tokens
        if rows:
            means = replicate_means(np.array(rows), np.array(tokens), samples=samples, seed=seed, domain=domain)
            for row, (method, index, column) in enumerate(cells):
                result[method][:, index, column] = unbiased(means[:, row], len(tokens))
    return result


def _finished_stages(run: MethodRun, planned: Sequence[str]) -> int:
    """Count the stages from the first on after which every domain of the base was evaluated."""
    if not set(planned) <= set(run.base):
        return 0
    for count, stage in enumerate(run.stages):
        if stage.domain not in run.base or not set(run.base) <= set(stage.losses):
            return count
    return len(run.stages)


@dataclass(frozen=True, eq=False)
class SummaryParts:
    """The summary figures of a finished run with their block resamples, as sums of what each domain adds.

    Attributes:
        domains: what was measured, by name, so that runs of other orders have the same columns.
        blocks: how many blocks each has, `(domains,)`.
        figures: `(1 + samples, domains)` in %, 0 the sample; `changes.reach` says how far an interval of them reaches.
            None where a figure has no cell.
    """

    domains: tuple[str, ...]
    blocks: tuple[int, ...]
    figures: dict[str, FloatArray | None]


def summary_parts(run: MethodRun, evaluate: EvaluateConfig, planned: Sequence[str]) -> SummaryParts:
    """Return the summary figures of a finished run by domain.

    Resample b takes the same blocks of a domain in every run with the same settings and texts, so that differences and
    means of several runs can be taken resample by resample.

    Raises:
        DataError: the run is not finished.
    """
    if _finished_stages(run, planned) < len(planned):
        raise DataError(f"{run.label}: not every planned stage is finished and measured")
    domains = sorted(run.base)
    (nats,) = _replicates([run], domains, evaluate)
    figures = summary_figures(nats[:, : len(planned)], [domains.index(domain) for domain in planned])
    return SummaryParts(tuple(domains), tuple(_blocks(run, domains)), figures)


def _blocks(run: MethodRun, domains: Sequence[str]) -> list[int]:
    return [len(run.base[name].tokens) for name in domains]


def _compare(
    runs: tuple[MethodRun, MethodRun],
    nats: tuple[FloatArray, FloatArray],
    domains: Sequence[str],
    stages: int,
    evaluate: EvaluateConfig,
) -> Comparison | None:
    """Return the paired difference of the second method to the first; None unless both trained in the same order."""
    first, second = ([stage.domain for stage in run.stages[:stages]] for run in runs)
    columns = _measured(runs[0], domains)
    if not stages or first != second or columns != _measured(runs[1], domains):
        return None
    trained = [columns.index(domain) for domain in first]

    def differences(factor: float) -> dict[str, FloatArray | None]:
        subtracted, figures = (summary_figures(stretched(cells, factor)[:, :stages], trained) for cells in nats)
        return {
            name: None if parts is None or (less := subtracted[name]) is None else parts - less
            for name, parts in figures.items()
        }

    intervals = sum_intervals(differences, _blocks(runs[0], columns), evaluate.confidence)
    return Comparison(runs[1].label, runs[0].label, stages, Summary(**intervals))


def _cell(loss: DomainLoss, change: Change, evaluate: EvaluateConfig) -> Cell:
    interval = mean_change([change], evaluate)
    return Cell(loss.perplexity, loss.bits_per_byte, interval.value, interval.low, interval.high)


def _method(
    run: MethodRun, nats: FloatArray, domains: Sequence[str], finished: int, evaluate: EvaluateConfig
) -> MethodMatrix:
    base = {
        name: BaseFigures(loss.perplexity, loss.bits_per_byte, sum(loss.tokens), sum(loss.bytes or ()), len(loss.nll))
        for name, loss in run.base.items()
    }
    columns = _measured(run, domains)
    blocks = _blocks(run, columns)
    rows = []
    for index, stage in enumerate(run.stages):
        cells = {
            name: _cell(stage.losses[name], Change(name, blocks[column], nats[:, index, column]), evaluate)
            for column, name in enumerate(columns)
            if name in stage.losses
        }
        rows.append(MatrixRow(stage.domain, cells, index < finished))
    names = [stage.domain for stage in run.stages[:finished]]
    trained = [columns.index(name) for name in names]
    intervals = functools.partial(sum_intervals, blocks=blocks, confidence=evaluate.confidence)
    summary = Summary(**intervals(lambda factor: summary_figures(stretched(nats, factor)[:, :finished], trained)))

    def at_stage(index: int, factor: float) -> dict[str, FloatArray | None]:
        return stage_figures(stretched(nats[:, index], factor), trained, index)

    per_stage = (
        StageSummary(name, **intervals(functools.partial(at_stage, stage))) for stage, name in enumerate(names)
    )
    return MethodMatrix(run.label, dict(run.info), base, tuple(rows), summary, tuple(per_stage))


def recomputed(folder: Path, matrix: Matrix, settings: EvaluateConfig) -> Matrix:
    """Compute a run's matrix again, with today's statistics, from the stored losses of every block.

    Returns the given matrix, with a warning, where a file of losses is missing, as when only matrix.json was kept.
    `settings` are the resamples, confidence and seed of the run's plan.
    """
    run = Run(folder)
    try:
        return build_matrix([stored_run(run, method) for method in matrix.methods], settings, planned=matrix.planned)
    except FileNotFoundError as missing:
        logger.warning("%s is not there: intervals stay as in %s", missing.filename, run.matrix)
        return matrix


def stored_run(run: Run, method: MethodMatrix) -> MethodRun:
    """Read every loss behind a method's matrix."""
    read = functools.partial(read_stored, parse=DomainLoss.from_dict)
    base = {name: read(run.base(str(method.info.get("numbers")), name)) for name in method.base}
    stages = []
    for index, row in enumerate(method.stages):
        folder = run.stage(method.label, index, row.domain) / "evaluations"
        stages.append(Stage(row.domain, {name: read(folder / f"{name}.json") for name in row.cells}))
    return MethodRun(method.label, base, tuple(stages), dict(method.info))
