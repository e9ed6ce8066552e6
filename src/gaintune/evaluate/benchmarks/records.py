"""Benchmark results as frozen data: scores with their items, of groups too, and differences with their intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from gaintune.errors import ConfigError, DataError
from gaintune.evaluate.benchmarks.config import BenchmarkConfig
from gaintune.results import Interval, in_percent, mean_of_independent, paired_bootstrap, paired_shares, percent

if TYPE_CHECKING:
    from lm_eval.api.group import Group

Aggregation = Literal["mean", "perplexity", "other"]
Unit = Literal["points", "%", "own"]


@dataclass(frozen=True)
class TaskFacts:
    """The settings of a task, so that a score can be read.

    Attributes:
        source: where the rows are from.
        fewshot: worked examples before each question.
        version: of lm-eval's task file.
        notes: what differs from the task as lm-eval has it; empty for nothing.
    """

    source: str
    split: str
    fewshot: int
    version: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class BenchmarkScore:
    """A metric of a benchmark of a model, as lm-eval defines it.

    Attributes:
        metric: lm-eval's name of the metric; with its filter where there is one, as in `exact_match,strict-match`.
        value: the metric, a share for accuracies.
        stderr: its standard error, in the same unit; None where lm-eval knows none.
        items: the metric of each row, in the order of the rows: 0 or 1 of an accuracy, nats of a perplexity. Of a group
            all rows of its tasks. Empty where rows have no number of their own.
        aggregation: how the items become the value.
        higher_is_better: None where the task file does not say.
        members: of a group the tasks in it; empty for a task.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    items: tuple[float, ...] = field(repr=False)
    rows: int
    aggregation: Aggregation
    higher_is_better: bool | None
    facts: TaskFacts
    members: tuple[str, ...] = ()

    @property
    def is_share(self) -> bool:
        """Whether the items lie between 0 and 1, so that a difference is in points of %."""
        return self.aggregation == "mean" and all(0 <= item <= 1 for item in self.items)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, without the items."""
        return {key: value for key, value in asdict(self).items() if key != "items"}


@dataclass(frozen=True)
class BenchmarkComparison:
    """A metric of an adapted model against its base on the same rows.

    Attributes:
        difference: adapted minus base with the interval of `paired_difference`, in `unit`; None where the metric is
            neither a mean over rows nor a perplexity.
        unit: points of % for shares, % of the base's for a perplexity, else the metric's own.
    """

    label: str
    base: BenchmarkScore
    adapted: BenchmarkScore
    difference: Interval | None
    unit: Unit

    @property
    def task(self) -> str:
        """lm-eval's name of the task or group."""
        return self.adapted.task

    @property
    def metric(self) -> str:
        """lm-eval's name of the metric."""
        return self.adapted.metric

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        difference = None if self.difference is None else asdict(self.difference)
        names = {"task": self.task, "metric": self.metric, "label": self.label}
        figures = {"base": self.base.value, "adapted": self.adapted.value, "rows": self.adapted.rows}
        return {**names, **figures, "difference": difference, "unit": self.unit}


@dataclass(frozen=True)
class BenchmarkReport:
    """All scores of a base and of adapters on it.

    Attributes:
        asked: names of the tasks and groups as the config has them; the others are members of groups.
        adapted: scores of each adapter, by its label.
        settings: the config, and the versions that decide the scores.
    """

    asked: tuple[str, ...]
    base: tuple[BenchmarkScore, ...]
    adapted: dict[str, tuple[BenchmarkScore, ...]]
    comparisons: tuple[BenchmarkComparison, ...]
    settings: dict[str, Any]

    def score(self, task: str, metric: str, label: str | None = None) -> BenchmarkScore:
        """Return a score, of the base unless an adapter's label is given; `ConfigError` where there is none."""
        return find_score(self.base if label is None else self.adapted[label], task, metric)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for `storage.write_json`, without the items."""
        return {
            "asked": list(self.asked),
            "base": [score.to_dict() for score in self.base],
            "adapted": {label: [score.to_dict() for score in scores] for label, scores in self.adapted.items()},
            "comparisons": [comparison.to_dict() for comparison in self.comparisons],
            "settings": self.settings,
        }


def find_score(scores: Iterable[BenchmarkScore], task: str, metric: str) -> BenchmarkScore:
    """Return the score of a task's metric; `ConfigError` names the metrics that there are."""
    metrics = {score.metric: score for score in scores if score.task == task}
    if metric not in metrics:
        raise ConfigError(f"benchmark {task} has no metric {metric!r}; it has {', '.join(metrics) or 'no score'}")
    return metrics[metric]


def compare_scores(
    base: Sequence[BenchmarkScore], adapted: Sequence[BenchmarkScore], label: str, config: BenchmarkConfig
) -> tuple[BenchmarkComparison, ...]:
    """Compare every metric of an adapted model with the base's, paired row by row.

    Raises:
        DataError: scores over different rows, which cannot be paired.
    """
    return tuple(_compare(find_score(base, score.task, score.metric), score, label, config) for score in adapted)


def _compare(base: BenchmarkScore, adapted: BenchmarkScore, label: str, config: BenchmarkConfig) -> BenchmarkComparison:
    if base.facts != adapted.facts or base.rows != adapted.rows or len(base.items) != len(adapted.items):
        raise DataError(f"benchmark {base.task}: base and {label} were measured on other rows, or with other settings")
    if base.aggregation == "other" or not base.items:
        return BenchmarkComparison(label, base, adapted, None, "own")
    difference = paired_difference(base, adapted, config)
    if base.aggregation == "perplexity":  # items are log-likelihoods: when they fall, the perplexity rises
        ends = (difference.high, difference.low)
        low, high = (None if nats is None else float(percent(np.asarray(0.0 - nats))) for nats in ends)
        value = float(percent(np.asarray(0.0 - difference.value)))
        return BenchmarkComparison(label, base, adapted, Interval(value, low, high), "%")
    if base.is_share and adapted.is_share:
        return BenchmarkComparison(label, base, adapted, in_percent(difference), "points")
    return BenchmarkComparison(label, base, adapted, difference, "own")


def paired_difference(base: BenchmarkScore, model: BenchmarkScore, config: BenchmarkConfig) -> Interval:
    """Return the mean over rows of a model's items less the base's, in their own unit, with its interval over rows.

    Right and wrong answers (0 and 1) have the interval of `paired_shares`, which has a width even where no answer
    changes; graded rows and log-likelihoods that of `paired_bootstrap`. A score less itself is exactly 0.
    """
    if model is base:
        return Interval(0.0, 0.0, 0.0)
    if {*base.items, *model.items} <= {0, 1}:
        return paired_shares(base.items, np.array(model.items), config.confidence)
    differences, samples, seed = np.subtract(model.items, base.items), config.bootstrap_samples, config.bootstrap_seed
    return paired_bootstrap(differences, samples=samples, confidence=config.confidence, seed=seed)


METRICS = {
    "hellaswag": "acc_norm",
    "arc_challenge": "acc_norm",
    "arc_easy": "acc_norm",
    "piqa": "acc_norm",
    "openbookqa": "acc_norm",
    "gsm8k": "exact_match,strict-match",
    "gsm8k_cot": "exact_match,strict-match",
    "triviaqa": "exact_match,remove_whitespace",
    "nq_open": "exact_match,remove_whitespace",
}
"""The metric of a task that counts, as in the DISeL paper (table 10 and appendix III.6), where it is not accuracy."""
USUAL = ("acc", "exact_match", "pass@1")
"""Else the first of these that a task has; never one of several filters."""


def counting_score(scores: Sequence[BenchmarkScore], task: str) -> BenchmarkScore:
    """Return the score of a task's metric that counts, in whatever order lm-eval lists its filters.

    Raises:
        ConfigError: no metric that is a share of rows, or none that is known to count.
    """
    metrics = {score.metric: score for score in scores if score.task == task}
    for metric in (METRICS.get(task), *USUAL):
        for name in (metric, f"{metric},none"):
            if name in metrics and metrics[name].is_share:
                return metrics[name]
    listed = ", ".join(metrics) or "no score"
    if not any(score.is_share for score in metrics.values()):
        raise ConfigError(f"benchmark {task} has no metric that is a share of rows ({listed})")
    wanted = METRICS.get(task, f"one of {', '.join(USUAL)}")
    raise ConfigError(f"benchmark {task} has {listed}; which of them counts is not known, expected {wanted}")


def mean_difference(pairs: Sequence[tuple[BenchmarkScore, BenchmarkScore]], config: BenchmarkConfig) -> Interval:
    """Return the unweighted mean over tasks of the paired differences in points of %, with its interval over rows.

    Tasks have different rows, so `mean_of_independent` combines their intervals. A single task has the very interval
    of its `BenchmarkComparison`.

    Args:
        pairs: for each task the score that is subtracted (the base's), and the other.
        config: settings of the intervals.
    """
    return mean_of_independent([in_percent(paired_difference(base, model, config)) for base, model in pairs])


def with_groups(groups: Iterable[Group], scores: Iterable[BenchmarkScore]) -> tuple[BenchmarkScore, ...]:
    """Add the scores of groups after those of their tasks."""
    tasks = list(scores)
    results: dict[str, dict[str, Any]] = {}
    for score in tasks:
        metric, _, kept = score.metric.partition(",")
        row = results.setdefault(score.task, {"sample_len": score.rows})
        row[f"{metric},{kept or 'none'}"] = score.value
        row[f"{metric}_stderr,{kept or 'none'}"] = "N/A" if score.stderr is None else score.stderr
    return (*tasks, *(score for group in groups for score in _of_group(group, results, tasks)))


def metrics_of(results: dict[str, Any]) -> Iterator[tuple[str, str, str, float]]:
    """Return lm-eval's key, metric, filter and value of each metric in its results, without standard errors."""
    for key, value in results.items():
        metric, separator, kept = key.partition(",")
        if separator and not metric.endswith("_stderr"):
            yield key, metric, kept, float(value)


def _of_group(
    group: Group, results: dict[str, dict[str, Any]], scores: Sequence[BenchmarkScore]
) -> Iterator[BenchmarkScore]:
    if not group.has_aggregation:
        return
    members = tuple(task.task_name for task in group.get_all_tasks())
    by_size = {metric.metric: metric.weight_by_size for metric in group.aggregate_metric_list or ()}
    aggregated: Any = group.aggregate(results)  # type: ignore[arg-type]  # it reads what is given here
    for key, metric, kept, value in metrics_of(aggregated):
        name = metric if kept == "none" else key
        parts = [score for score in scores if score.task in members and score.metric == name]
        stderr = aggregated.get(f"{metric}_stderr,{kept}")
        pooled = by_size[metric] and all(part.aggregation == "mean" for part in parts)
        yield BenchmarkScore(
            task=group.name,
            metric=name,
            value=value,
            stderr=None if stderr in (None, "N/A") else float(stderr),
            items=tuple(item for part in parts for item in part.items) if pooled else (),
            rows=sum(part.rows for part in parts),
            aggregation="mean" if pooled else "other",
            higher_is_better=parts[0].higher_is_better,
            facts=_facts([part.facts for part in parts], group),
            members=members,
        )


def _facts(parts: Sequence[TaskFacts], group: Group) -> TaskFacts:
    """Return what the tasks of a group have in common, and all of what differs."""

    def listed(values: Iterable[Any]) -> str:
        return ", ".join(dict.fromkeys(map(str, values)))

    shots = {part.fewshot for part in parts}
    notes = tuple(dict.fromkeys(note for part in parts for note in part.notes))
    if len(shots) > 1:
        notes = (*notes, f"worked examples differ: {listed(sorted(shots))}")
    source, split = listed(part.source for part in parts), listed(part.split for part in parts)
    return TaskFacts(source, split, min(shots), group.version, notes)


def with_group_difference(
    comparison: BenchmarkComparison,
    base: Sequence[BenchmarkScore],
    adapted: Sequence[BenchmarkScore],
    config: BenchmarkConfig,
) -> BenchmarkComparison:
    """Give a group that is a plain mean over its tasks the mean of their differences, in points."""
    names, metric = comparison.adapted.members, comparison.metric
    if comparison.difference is not None or not names:
        return comparison
    pairs = [(find_score(base, name, metric), find_score(adapted, name, metric)) for name in names]
    mean = sum(score.value for _, score in pairs) / len(pairs)
    shares = all(score.is_share for pair in pairs for score in pair)
    if not shares or not math.isclose(mean, comparison.adapted.value):
        return comparison
    return replace(comparison, difference=mean_difference(pairs, config), unit="points")
