"""Benchmark results as frozen data: scores with their items, and differences to the base with their intervals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from gaintune.errors import ConfigError, DataError
from gaintune.evaluate.benchmarks.config import BenchmarkConfig
from gaintune.results import Interval, mean_of_independent, paired_bootstrap, paired_shares, percent

Aggregation = Literal["mean", "perplexity", "other"]
Unit = Literal["points", "%", "own"]


@dataclass(frozen=True)
class TaskFacts:
    """What was asked, so that a score can be read.

    Attributes:
        source: where the rows are from.
        split: of the rows.
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
    """One metric of one benchmark of one model, as lm-eval defines it.

    Attributes:
        task: lm-eval's name of the task or group.
        metric: lm-eval's name of the metric; with its filter where there is one, as in `exact_match,strict-match`.
        value: the metric, a share for accuracies.
        stderr: its standard error, in the same unit; None where lm-eval knows none.
        items: the metric of each row, in the order of the rows: 0 or 1 of an accuracy, nats of a perplexity. Of a group
            all rows of its tasks. Empty where rows have no number of their own.
        rows: how many rows were asked.
        aggregation: how the items become the value.
        higher_is_better: None where the task file does not say.
        facts: what was asked.
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
        """Whether the items lie between 0 and 1, so that a difference can be told in points of %."""
        return self.aggregation == "mean" and all(0 <= item <= 1 for item in self.items)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without the items."""
        return {key: value for key, value in asdict(self).items() if key != "items"}


@dataclass(frozen=True)
class BenchmarkComparison:
    """One metric of an adapted model against its base on the same rows.

    Attributes:
        label: what the adapted model is called.
        base: the base's score.
        adapted: the adapted model's.
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
        """Plain values for JSON."""
        difference = None if self.difference is None else asdict(self.difference)
        names = {"task": self.task, "metric": self.metric, "label": self.label}
        figures = {"base": self.base.value, "adapted": self.adapted.value, "rows": self.adapted.rows}
        return {**names, **figures, "difference": difference, "unit": self.unit}


@dataclass(frozen=True)
class BenchmarkReport:
    """All scores of a base and of adapters on it.

    Attributes:
        asked: names of the tasks and groups as they were asked for; the others are members of groups.
        base: scores of the base.
        adapted: scores of each adapter, by its label.
        comparisons: each adapter against the base.
        settings: the config, and the versions that decide the numbers.
    """

    asked: tuple[str, ...]
    base: tuple[BenchmarkScore, ...]
    adapted: dict[str, tuple[BenchmarkScore, ...]]
    comparisons: tuple[BenchmarkComparison, ...]
    settings: dict[str, Any]

    def score(self, task: str, metric: str, label: str | None = None) -> BenchmarkScore:
        """One score, of the base unless an adapter's label is given; `ConfigError` where there is none."""
        return find_score(self.base if label is None else self.adapted[label], task, metric)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `runs.write_json`, without the items."""
        return {
            "asked": list(self.asked),
            "base": [score.to_dict() for score in self.base],
            "adapted": {label: [score.to_dict() for score in scores] for label, scores in self.adapted.items()},
            "comparisons": [each.to_dict() for each in self.comparisons],
            "settings": self.settings,
        }


def find_score(scores: Iterable[BenchmarkScore], task: str, metric: str) -> BenchmarkScore:
    """The score of a task's metric; `ConfigError` names what there is."""
    found = [score for score in scores if score.task == task]
    for score in found:
        if score.metric == metric:
            return score
    there = ", ".join(score.metric for score in found) or "no score"
    raise ConfigError(f"benchmark {task} has no metric {metric!r}; it has {there}")


def compare_scores(
    base: Sequence[BenchmarkScore], adapted: Sequence[BenchmarkScore], label: str, config: BenchmarkConfig
) -> tuple[BenchmarkComparison, ...]:
    """Every metric of an adapted model against the base's, paired row by row.

    Raises:
        DataError: scores over different rows, which cannot be paired.
    """
    return tuple(_compare(find_score(base, each.task, each.metric), each, label, config) for each in adapted)


def _compare(base: BenchmarkScore, adapted: BenchmarkScore, label: str, config: BenchmarkConfig) -> BenchmarkComparison:
    if base.facts != adapted.facts or base.rows != adapted.rows or len(base.items) != len(adapted.items):
        raise DataError(f"benchmark {base.task}: base and {label} were asked other rows, or asked otherwise")
    if base.aggregation == "other" or not base.items:
        return BenchmarkComparison(label, base, adapted, None, "own")
    difference = paired_difference(base, adapted, config)
    if base.aggregation == "perplexity":  # items are log-likelihoods: a fall of them is a rise of the perplexity
        return BenchmarkComparison(label, base, adapted, _change_of_perplexity(difference), "%")
    if base.is_share and adapted.is_share:
        return BenchmarkComparison(label, base, adapted, in_points(difference), "points")
    return BenchmarkComparison(label, base, adapted, difference, "own")


def paired_difference(base: BenchmarkScore, model: BenchmarkScore, config: BenchmarkConfig) -> Interval:
    """Mean over rows of a model's items less the base's, in their own unit, with its interval over rows.

    Right and wrong answers (0 and 1) have the interval of `paired_shares`, with a width even where no row is answered
    otherwise; graded rows and log-likelihoods `paired_bootstrap`. A score less itself is exactly 0, without width.
    """
    if model is base:
        return Interval(0.0, 0.0, 0.0)
    if {*base.items, *model.items} <= {0, 1}:
        return paired_shares(base.items, np.array(model.items), config.confidence)
    return paired_bootstrap(
        np.subtract(model.items, base.items),
        samples=config.bootstrap_samples,
        confidence=config.confidence,
        seed=config.bootstrap_seed,
    )


def in_points(shares: Interval) -> Interval:
    """A difference of shares in points of %."""
    low, high = (None if end is None else 100.0 * end for end in (shares.low, shares.high))
    return Interval(100.0 * shares.value, low, high)


def _change_of_perplexity(log_likelihood: Interval) -> Interval:
    def change(end: float | None) -> float | None:
        return None if end is None else float(percent(np.asarray(0.0 - end)))

    value = float(percent(np.asarray(0.0 - log_likelihood.value)))
    return Interval(value, change(log_likelihood.high), change(log_likelihood.low))


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
"""Which metric of a task counts, as in the DISeL paper (table 10 and appendix III.6), where it is not the accuracy."""
USUAL = ("acc", "exact_match", "pass@1")
"""Else the first of these that a task has; never one of several filters."""


def counting_score(scores: Sequence[BenchmarkScore], task: str) -> BenchmarkScore:
    """The metric that counts of a task, which does not depend on the order in which lm-eval lists its filters.

    Raises:
        ConfigError: no metric that is a share of rows, or only such as nobody has said which of them counts.
    """
    found = {score.metric: score for score in scores if score.task == task}
    for metric in (METRICS.get(task), *USUAL):
        for name in (metric, f"{metric},none"):
            if name in found and found[name].is_share:
                return found[name]
    listed = ", ".join(found) or "no score"
    if not any(score.is_share for score in found.values()):
        raise ConfigError(f"benchmark {task} has no metric that is a share of rows ({listed})")
    wanted = METRICS.get(task, f"one of {', '.join(USUAL)}")
    raise ConfigError(f"benchmark {task} has {listed}; which of them counts is not known, expected {wanted}")


def mean_difference(pairs: Sequence[tuple[BenchmarkScore, BenchmarkScore]], config: BenchmarkConfig) -> Interval:
    """Unweighted mean over tasks of the paired differences in points of %, each with the interval of its rows.

    Tasks ask different rows, so their intervals are put together as `mean_of_independent` says. One task has the very
    interval that its `BenchmarkComparison` has.

    Args:
        pairs: for each task the score that is taken away (the base's), and the one it is taken from.
        config: what the intervals are made with.
    """
    return mean_of_independent([in_points(paired_difference(base, model, config)) for base, model in pairs])
