"""The metric that counts of a benchmark, and the mean over benchmarks of paired differences."""

from __future__ import annotations

from collections.abc import Sequence

from gaintune.errors import ConfigError
from gaintune.evaluate.benchmarks.config import BenchmarkConfig
from gaintune.evaluate.benchmarks.records import BenchmarkScore, in_points, paired_difference
from gaintune.results.records import Interval
from gaintune.results.verdicts import mean_of_independent

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
