"""Benchmarks of snapshots: accuracy on the target's tasks, and what is kept of all others, as means over tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gaintune.errors import ConfigError
from gaintune.evaluate.benchmark_config import BenchmarkConfig, read_config
from gaintune.evaluate.benchmark_records import BenchmarkScore
from gaintune.evaluate.bootstrap import FloatArray, bounds, replicate_means
from gaintune.evaluate.records import Interval
from gaintune.models import Base
from gaintune.progress import Progress

METRICS = {
    "hellaswag": "acc_norm",
    "arc_challenge": "acc_norm",
    "arc_easy": "acc_norm",
    "piqa": "acc_norm",
    "openbookqa": "acc_norm",
    "gsm8k": "exact_match,strict-match",
}
"""Which metric of a task counts, as in the DISeL paper (table 10 and appendix III.6), where it is not the accuracy."""
USUAL = ("acc", "exact_match", "pass@1")


@dataclass(frozen=True)
class TaskScore:
    """One task's metric; `value` and `stderr` in %."""

    task: str
    metric: str
    value: float
    stderr: float | None
    rows: int


@dataclass(frozen=True)
class Scores:
    """One model's benchmarks.

    Attributes:
        tasks: every task.
        target: mean over the target's tasks in %; None where there is none.
        target_change: its difference to the base in points of %, paired row by row.
        retention: mean over all other tasks in %; None where there is none.
        retention_change: its difference to the base.
    """

    tasks: tuple[TaskScore, ...]
    target: float | None
    target_change: Interval | None
    retention: float | None
    retention_change: Interval | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class MeasuredScores:
    """The base's benchmarks, and those of every snapshot by label and step."""

    base: Scores
    snapshots: Mapping[tuple[str, int], Scores]

    def at(self, label: str, step: int) -> Scores:
        """A snapshot's scores, of step 0 the base's."""
        return self.base if step == 0 else self.snapshots[label, step]


def counting_score(scores: Sequence[BenchmarkScore], task: str) -> BenchmarkScore:
    """The metric that counts of a task; ConfigError where it has none that is a share of rows."""
    found = {score.metric: score for score in scores if score.task == task}
    for metric in (METRICS.get(task), *USUAL):
        for name in (metric, f"{metric},none"):
            if name in found and found[name].is_share:
                return found[name]
    shares = [score for score in found.values() if score.is_share]
    if not shares:
        raise ConfigError(f"benchmark {task} has no metric that is a share of rows ({', '.join(found) or 'no score'})")
    return shares[0]


def scores_of(
    base: Sequence[BenchmarkScore], model: Sequence[BenchmarkScore], tasks: Sequence[str], target: Sequence[str],
    config: BenchmarkConfig,
) -> Scores:  # fmt: skip
    """Put together one model's scores of some tasks, `target` among them, beside the base's."""
    pairs = {task: (counting_score(base, task), counting_score(model, task)) for task in tasks}
    kept = [task for task in tasks if task not in target]
    told = []
    for task, (_, score) in pairs.items():
        error = None if score.stderr is None else 100.0 * score.stderr
        told.append(TaskScore(task, score.metric, 100.0 * score.value, error, score.rows))
    values = {each.task: each.value for each in told}
    return Scores(
        tasks=tuple(told),
        target=float(np.mean([values[task] for task in target])) if target else None,
        target_change=_difference([pairs[task] for task in target], config),
        retention=float(np.mean([values[task] for task in kept])) if kept else None,
        retention_change=_difference([pairs[task] for task in kept], config),
    )


def _difference(pairs: Sequence[tuple[BenchmarkScore, BenchmarkScore]], config: BenchmarkConfig) -> Interval | None:
    """Unweighted mean over tasks of the paired differences in points of %, rows resampled within each task."""
    if not pairs:
        return None
    rows: list[FloatArray] = []
    for base, model in pairs:
        differences = 100.0 * np.subtract(model.items, base.items)
        ones = np.ones(len(differences), dtype=np.int64)
        samples, seed = config.bootstrap_samples, config.bootstrap_seed
        means = replicate_means(differences[None], ones, samples=samples, seed=seed, domain=base.task)
        rows.append(means[:, 0])
    mean = np.mean(rows, axis=0)
    if np.isnan(mean[1:]).any():
        return Interval(float(mean[0]), None, None)
    low, high = bounds(mean, config.confidence)
    return Interval(float(mean[0]), float(low), float(high))


def checked_config(benchmarks: BenchmarkConfig | Mapping[str, Any], target: Sequence[str]) -> BenchmarkConfig:
    """What is asked, with the target's tasks among it; ConfigError otherwise."""
    config = benchmarks if isinstance(benchmarks, BenchmarkConfig) else read_config(dict(benchmarks))
    tasks = [task.name for task in config.tasks]
    unknown = [task for task in target if task not in tasks]
    if unknown:
        raise ConfigError(f"target {unknown[0]} is none of the benchmarks ({', '.join(tasks)}): add it to them")
    return config


def measure_scores(
    base: Base,
    snapshots: Mapping[tuple[str, int], Path],
    config: BenchmarkConfig,
    target: Sequence[str],
    *,
    cache: Path | None = None,
    allow_other_base: bool = False,
    progress: Progress | None = None,
) -> MeasuredScores:
    """Measure a base, and every snapshot on it, on benchmarks; the adapters are not merged.

    Raises:
        ConfigError: a task without a share of rows to count; and whatever `run_benchmarks` raises.
    """
    from gaintune.evaluate.benchmarks import run_benchmarks

    tasks = [task.name for task in config.tasks]
    named = {f"{label}, step {step}": (label, step) for label, step in snapshots}
    report = run_benchmarks(
        base,
        {name: snapshots[key] for name, key in named.items()},
        config,
        cache=cache,
        allow_other_base=allow_other_base,
        progress=progress,
    )
    found = {key: scores_of(report.base, report.adapted[name], tasks, target, config) for name, key in named.items()}
    return MeasuredScores(scores_of(report.base, report.base, tasks, target, config), found)
