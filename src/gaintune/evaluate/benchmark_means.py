"""The metric that counts of a benchmark, and the mean over benchmarks of paired differences."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gaintune.errors import ConfigError
from gaintune.evaluate.benchmark_config import BenchmarkConfig
from gaintune.evaluate.benchmark_records import BenchmarkScore
from gaintune.evaluate.bootstrap import FloatArray, bounds, replicate_means
from gaintune.evaluate.records import Interval

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


def mean_difference(pairs: Sequence[tuple[BenchmarkScore, BenchmarkScore]], config: BenchmarkConfig) -> Interval:
    """Unweighted mean over tasks of the paired differences in points of %, rows resampled within each task.

    Args:
        pairs: for each task the score that is taken away (the base's), and the one it is taken from.
        config: what the interval is made with.
    """
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
