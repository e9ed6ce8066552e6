"""lm-eval's benchmarks over a base and adapters on it: scores as lm-eval defines them, and paired differences."""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from gaintune.adapters import BASE, adapter_labels, adapter_off, attached, check_adapter, check_adapters, read_record
from gaintune.config import ModelConfig
from gaintune.errors import ConfigError
from gaintune.evaluate.benchmarks.config import BenchmarkConfig
from gaintune.evaluate.benchmarks.quiet import quiet
from gaintune.evaluate.benchmarks.records import (
    BenchmarkComparison,
    BenchmarkReport,
    BenchmarkScore,
    TaskFacts,
    compare_scores,
    find_score,
    mean_difference,
)
from gaintune.evaluate.benchmarks.store import (
    ScoreStore,
    identity_of,
    numbers_name,
    questions_hash,
    score_key,
    versions,
)
from gaintune.evaluate.benchmarks.tasks import Suite, load_suite
from gaintune.methods import Precision, measuring_precision
from gaintune.models import Base, load_base
from gaintune.progress import Progress

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


logger = logging.getLogger(__name__)


def run_benchmarks(
    base: Base,
    adapters: Mapping[str, str | Path],
    config: BenchmarkConfig,
    *,
    cache: str | Path | None = None,
    suite: Suite | None = None,
    allow_other_base: bool = False,
    mixed_precision: torch.dtype | None = None,
    progress: Progress | None = None,
) -> BenchmarkReport:
    """Measure a loaded base, and adapters on it, on the benchmarks of a config, all in the base's numbers.

    The adapter stays an adapter and is not merged. The base is measured on the same weights with the first adapter
    switched off; where switching it off does not give the base back, as with full fine-tuning and PiSSA, without it.
    Weights that were trained whole are rounded to the base's numbers; `benchmark_adapters` measures them in their own.

    Args:
        base: the base; it is left as it was.
        adapters: adapter folders by the label each is to have.
        config: what is asked.
        cache: folder of scores that are kept between calls; None measures everything.
        suite: what `load_suite(config)` gave, if it has been called already.
        allow_other_base: measure adapters that were trained on another base.
        mixed_precision: autocast dtype of a base in fp32, or None for its own numbers.
        progress: where to show how far it is.

    Raises:
        ConfigError, DataError, AssetError: as `load_suite`; a label that is taken.
        AdapterError, BaseMismatchError: an adapter that is damaged or of another base, whether its scores are kept or
            not.
        TrainingError: a model whose likelihoods are not finite.
    """
    if BASE in adapters:
        raise ConfigError(f"an adapter cannot be called {BASE!r}")
    suite = suite or load_suite(config)
    folders = {label: Path(folder) for label, folder in adapters.items()}
    for folder in folders.values():
        check_adapter(folder, base.name, base.fingerprint, allow_other_base=allow_other_base)
    store = ScoreStore(None if cache is None else Path(cache))
    measuring = _Measuring(suite, config, base, store, mixed_precision, progress)
    untouched = measuring.keys(None)
    adapted: dict[str, tuple[BenchmarkScore, ...]] = {}
    for label, folder in folders.items():
        _warn_of_rounding(folder, label, measuring.numbers)
        keys = measuring.keys(folder)
        if not measuring.missing([*keys, *untouched]):
            adapted[label] = measuring.scores(keys, label, base.model)  # nothing is asked: all of them are there
            continue
        with attached(base, folder, allow_other_base=allow_other_base) as (model, gives_base_back):
            if gives_base_back and measuring.missing(untouched):
                with adapter_off(model):
                    measuring.scores(untouched, BASE, model)
            adapted[label] = measuring.scores(keys, label, model)
        gc.collect()
    numbers = dict.fromkeys((BASE, *adapted), measuring.numbers)
    return _report(suite, config, measuring.scores(untouched, BASE, base.model), adapted, numbers)


def benchmark_adapters(
    model: ModelConfig,
    adapters: Sequence[Path] | Mapping[str, str | Path],
    config: BenchmarkConfig,
    *,
    cache: str | Path | None = None,
    suite: Suite | None = None,
    allow_other_base: bool = False,
    progress: Progress | None = None,
) -> BenchmarkReport:
    """Load a base and do `run_benchmarks` over adapters, each in the numbers it was trained in.

    Where those differ, as between full fine-tuning and an adapter on a bf16 base, the base is loaded and measured once
    in each. `report.base` is the base in those of the first adapter; every comparison is with the base in the
    adapter's own, `base_of(report, label)`. All is checked before a model is loaded.

    Args:
        model: the base.
        adapters: folders by label, or folders, which are then labelled by their names.
        config: what is asked.
        cache: as in `run_benchmarks`, and so are the others.

    Raises:
        GaintuneError: as `run_benchmarks` and `load_base`.
    """
    named = adapters if isinstance(adapters, Mapping) else dict(zip(adapter_labels(adapters), adapters, strict=True))
    folders = {label: Path(folder) for label, folder in named.items()}
    suite = suite or load_suite(config)
    check_adapters(list(folders.values()), model, allow_other_base=allow_other_base)
    alike: dict[Precision, dict[str, Path]] = {}
    for label, folder in folders.items():
        record = read_record(folder)
        alike.setdefault(measuring_precision(model, record.method if record else None), {})[label] = folder
    reports: list[BenchmarkReport] = []
    for numbers, members in (alike or {measuring_precision(model): {}}).items():
        base = load_base(model, dtype=numbers.load)
        reports.append(
            run_benchmarks(
                base,
                members,
                config,
                cache=cache,
                suite=suite,
                allow_other_base=allow_other_base,
                mixed_precision=numbers.mixed,
                progress=progress,
            )
        )
        del base  # before the next one is loaded
        gc.collect()
    return _joined(reports, list(folders))


def base_of(report: BenchmarkReport, label: str) -> tuple[BenchmarkScore, ...]:
    """The base's scores that an adapter is compared with: those in the numbers that the adapter was measured in."""
    return tuple(each.base for each in report.comparisons if each.label == label)


def _joined(reports: Sequence[BenchmarkReport], labels: Sequence[str]) -> BenchmarkReport:
    """Reports over the same questions as one, its adapters in the order of the labels."""
    first = reports[0]
    adapted = {label: scores for report in reports for label, scores in report.adapted.items()}
    compared: list[BenchmarkComparison] = [each for report in reports for each in report.comparisons]
    compared.sort(key=lambda each: labels.index(each.label))
    numbers = {label: name for report in reversed(reports) for label, name in report.settings["numbers"].items()}
    settings = {**first.settings, "numbers": {label: numbers[label] for label in (BASE, *labels)}}
    return BenchmarkReport(
        first.asked, first.base, {label: adapted[label] for label in labels}, tuple(compared), settings
    )


def _warn_of_rounding(folder: Path, label: str, numbers: str) -> None:
    record = read_record(folder)
    if record is not None and record.whole and not numbers.startswith("float32"):
        logger.warning(
            "%s was trained whole in fp32 and is measured rounded to %s; benchmark_adapters(ModelConfig(...), ...) "
            "measures it as it was trained",
            label,
            numbers,
        )


def measure_benchmarks(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    config: BenchmarkConfig,
    *,
    suite: Suite | None = None,
    label: str = "model",
    mixed_precision: torch.dtype | None = None,
    progress: Progress | None = None,
) -> tuple[BenchmarkScore, ...]:
    """Measure a model that is loaded already, such as one that is being trained; nothing is cached.

    `mixed_precision` is the autocast dtype of a model kept in fp32; None for the model's own numbers.

    Returns:
        Every metric of every task and group, in the order of the suite.

    Raises:
        ConfigError, DataError, AssetError, TrainingError: as `run_benchmarks`.
    """
    suite = suite or load_suite(config)
    from gaintune.evaluate.benchmarks.model import ask

    options: dict[str, Any] = {"label": label, "mixed_precision": mixed_precision, "progress": progress}
    found = [score for asked in suite.tasks for score in ask(model, tokenizer, asked, config, **options)]
    return with_groups(suite, found)


def compare_benchmarks(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    config: BenchmarkConfig,
    *,
    suite: Suite | None = None,
    label: str = "adapted",
    mixed_precision: torch.dtype | None = None,
    progress: Progress | None = None,
) -> BenchmarkReport:
    """A loaded `PeftModel` against its base: the same weights with the adapter switched off.

    Raises:
        ConfigError: not a `PeftModel`, or as `load_suite`.
    """
    suite = suite or load_suite(config)
    options: dict[str, Any] = {"suite": suite, "mixed_precision": mixed_precision, "progress": progress}
    with adapter_off(model):
        base = measure_benchmarks(model, tokenizer, config, label=BASE, **options)
    adapted = measure_benchmarks(model, tokenizer, config, label=label, **options)
    return _report(
        suite, config, base, {label: adapted}, dict.fromkeys((BASE, label), numbers_name(model, mixed_precision))
    )


class _Measuring:
    """What all models of one report have in common: the questions, and the scores that are there already."""

    def __init__(
        self,
        suite: Suite,
        config: BenchmarkConfig,
        base: Base,
        store: ScoreStore,
        mixed_precision: torch.dtype | None,
        progress: Progress | None,
    ) -> None:
        self.suite = suite
        self.numbers = numbers_name(base.model, mixed_precision)
        self._mixed = mixed_precision
        self._config = config
        self._base = base
        self._store = store
        self._progress = progress
        self._identity = identity_of(base, self.numbers)
        with quiet():
            self._questions = [questions_hash(asked, config) for asked in suite.tasks]

    def keys(self, adapter: Path | None) -> list[str]:
        """Of the base, or of an adapter on it, what stands for its scores of each task."""
        identity = self._identity if adapter is None else self._identity.with_adapter(adapter)
        both = zip(self.suite.tasks, self._questions, strict=True)
        return [score_key(identity, asked, questions, self._config) for asked, questions in both]

    def missing(self, keys: Sequence[str]) -> bool:
        """Whether some task has yet to be asked."""
        return not all(self._store.has(key) for key in keys)

    def scores(self, keys: Sequence[str], label: str, model: nn.Module) -> tuple[BenchmarkScore, ...]:
        """All scores of a model; what is missing is asked."""
        from gaintune.evaluate.benchmarks.model import ask

        options: dict[str, Any] = {"label": label, "mixed_precision": self._mixed, "progress": self._progress}
        found: list[BenchmarkScore] = []
        for key, asked in zip(keys, self.suite.tasks, strict=True):
            measure = partial(ask, model, self._base.tokenizer, asked, self._config, **options)
            found += self._store.get(key, asked, measure)
        return with_groups(self.suite, found)


def _report(
    suite: Suite,
    config: BenchmarkConfig,
    base: tuple[BenchmarkScore, ...],
    adapted: dict[str, tuple[BenchmarkScore, ...]],
    numbers: Mapping[str, str],
) -> BenchmarkReport:
    comparisons = [
        with_group_difference(each, base, scores, config)
        for label, scores in adapted.items()
        for each in compare_scores(base, scores, label, config)
    ]
    settings = {**config.model_dump(mode="json"), "numbers": dict(numbers), "versions": versions()}
    return BenchmarkReport(suite.asked, base, adapted, tuple(comparisons), settings)
