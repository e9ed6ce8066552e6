"""Scores of groups of benchmarks, such as MMLU, from those of their tasks, as lm-eval aggregates them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from gaintune.evaluate.benchmarks.config import BenchmarkConfig
from gaintune.evaluate.benchmark_means import mean_difference
from gaintune.evaluate.benchmarks.records import BenchmarkComparison, BenchmarkScore, TaskFacts, find_score
from gaintune.evaluate.benchmarks.tasks import Suite

if TYPE_CHECKING:
    from lm_eval.api.group import Group


def with_groups(suite: Suite, scores: Iterable[BenchmarkScore]) -> tuple[BenchmarkScore, ...]:
    """The scores with those of the suite's groups behind them."""
    found = list(scores)
    results: dict[str, dict[str, Any]] = {}
    for score in found:
        metric, separator, kept = score.metric.partition(",")
        kept = kept if separator else "none"
        row = results.setdefault(score.task, {"sample_len": score.rows})
        row[f"{metric},{kept}"] = score.value
        row[f"{metric}_stderr,{kept}"] = "N/A" if score.stderr is None else score.stderr
    return (*found, *(each for group in suite.groups for each in _of_group(group, results, found)))


def with_group_difference(
    each: BenchmarkComparison,
    base: Sequence[BenchmarkScore],
    adapted: Sequence[BenchmarkScore],
    config: BenchmarkConfig,
) -> BenchmarkComparison:
    """A comparison; of a group that is a plain mean over its tasks with the mean of their differences, in points."""
    if each.difference is not None or not each.adapted.members:
        return each
    names = each.adapted.members
    pairs = [(find_score(base, name, each.metric), find_score(adapted, name, each.metric)) for name in names]
    mean = sum(score.value for _, score in pairs) / len(pairs)
    if not all(score.is_share for pair in pairs for score in pair) or not math.isclose(mean, each.adapted.value):
        return each
    return replace(each, difference=mean_difference(pairs, config), unit="points")


def _of_group(
    group: Group, results: dict[str, dict[str, Any]], scores: Sequence[BenchmarkScore]
) -> Iterator[BenchmarkScore]:
    if not group.has_aggregation:
        return
    members = tuple(task.task_name for task in group.get_all_tasks())
    by_size = {each.metric: each.weight_by_size for each in group.aggregate_metric_list or ()}
    aggregated: Any = group.aggregate(results)  # type: ignore[arg-type]  # it reads what is given here
    for key, value in aggregated.items():
        metric, separator, kept = key.partition(",")
        if not separator or metric.endswith("_stderr"):
            continue
        name = metric if kept == "none" else key
        parts = [score for score in scores if score.task in members and score.metric == name]
        stderr = aggregated.get(f"{metric}_stderr,{kept}")
        pooled = by_size[metric] and all(part.aggregation == "mean" for part in parts)
        yield BenchmarkScore(
            task=group.name,
            metric=name,
            value=float(value),
            stderr=None if stderr in (None, "N/A") else float(stderr),
            items=tuple(item for part in parts for item in part.items) if pooled else (),
            rows=sum(part.rows for part in parts),
            aggregation="mean" if pooled else "other",
            higher_is_better=parts[0].higher_is_better,
            facts=_facts(parts, group),
            members=members,
        )


def _facts(parts: Sequence[BenchmarkScore], group: Group) -> TaskFacts:
    """What the tasks of a group have in common; all of what differs."""

    def said(values: Iterable[Any]) -> str:
        return ", ".join(dict.fromkeys(str(value) for value in values))

    shots = {part.facts.fewshot for part in parts}
    notes = tuple(dict.fromkeys(note for part in parts for note in part.facts.notes))
    if len(shots) > 1:
        notes = (*notes, f"worked examples differ: {said(sorted(shots))}")
    source, split = said(part.facts.source for part in parts), said(part.facts.split for part in parts)
    return TaskFacts(source, split, min(shots), group.version, notes)
