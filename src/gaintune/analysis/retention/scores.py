"""Benchmarks of snapshots: accuracy on the target's tasks, and what is kept of all others, as means over tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gaintune.config import ModelConfig
from gaintune.errors import ConfigError
from gaintune.evaluate.benchmarks import (
    BenchmarkConfig,
    BenchmarkScore,
    Suite,
    base_of,
    benchmark_adapters,
    counting_score,
    mean_difference,
    read_config,
)
from gaintune.progress import Progress
from gaintune.results import Interval


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
    """The base's benchmarks, those in the numbers of each label's snapshots, and every snapshot's by label and step."""

    base: Scores
    bases: Mapping[str, Scores]
    snapshots: Mapping[tuple[str, int], Scores]

    def at(self, label: str, step: int) -> Scores:
        """A snapshot's scores, of step 0 the base's in the same numbers."""
        return self.bases[label] if step == 0 else self.snapshots[label, step]


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
        target_change=mean_difference([pairs[task] for task in target], config) if target else None,
        retention=float(np.mean([values[task] for task in kept])) if kept else None,
        retention_change=mean_difference([pairs[task] for task in kept], config) if kept else None,
    )


def checked_config(benchmarks: BenchmarkConfig | Mapping[str, Any], target: Sequence[str]) -> BenchmarkConfig:
    """What is asked, with the target's tasks among it; ConfigError otherwise."""
    config = benchmarks if isinstance(benchmarks, BenchmarkConfig) else read_config(dict(benchmarks))
    tasks = [task.name for task in config.tasks]
    unknown = [task for task in target if task not in tasks]
    if unknown:
        raise ConfigError(f"target {unknown[0]} is none of the benchmarks ({', '.join(tasks)}): add it to them")
    return config


def measure_scores(
    model: ModelConfig,
    snapshots: Mapping[tuple[str, int], Path],
    config: BenchmarkConfig,
    target: Sequence[str],
    *,
    suite: Suite | None = None,
    cache: Path | None = None,
    allow_other_base: bool = False,
    progress: Progress | None = None,
) -> MeasuredScores:
    """Measure a base, and every snapshot on it, on benchmarks; the adapters are not merged.

    Each is measured in the numbers it was trained in, and against the base in the same. `suite` is what
    `load_suite(config)` gave, if it has been called already.

    Raises:
        ConfigError: a task without a share of rows to count; and whatever `benchmark_adapters` raises.
    """
    tasks = [task.name for task in config.tasks]
    named = {f"{label}, step {step}": (label, step) for label, step in snapshots}
    report = benchmark_adapters(
        model,
        {name: snapshots[key] for name, key in named.items()},
        config,
        cache=cache,
        suite=suite,
        allow_other_base=allow_other_base,
        progress=progress,
    )
    found: dict[tuple[str, int], Scores] = {}
    bases: dict[str, Scores] = {}
    for name, key in named.items():
        base = base_of(report, name)
        bases[key[0]] = scores_of(base, base, tasks, target, config)
        found[key] = scores_of(base, report.adapted[name], tasks, target, config)
    return MeasuredScores(scores_of(report.base, report.base, tasks, target, config), bases, found)
