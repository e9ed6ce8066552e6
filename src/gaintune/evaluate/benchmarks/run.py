"""lm-eval's benchmarks over a base and adapters on it: scores as lm-eval defines them, and paired differences.

A score is stored by what decides it, so that a base is measured once for all its adapters.
"""

from __future__ import annotations

import gc
import hashlib
import importlib.metadata
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from gaintune.adapters import (
    BASE,
    CONFIG,
    WEIGHTS,
    adapter_labels,
    adapter_off,
    attached,
    check_adapter,
    check_adapters,
    read_record,
)
from gaintune.config import ModelConfig
from gaintune.data import beginning_of_text
from gaintune.errors import ConfigError, RunDirectoryError
from gaintune.evaluate.benchmarks.config import BenchmarkConfig
from gaintune.evaluate.benchmarks.records import (
    BenchmarkReport,
    BenchmarkScore,
    compare_scores,
    with_group_difference,
    with_groups,
)
from gaintune.evaluate.benchmarks.tasks import LoadedTask, Suite, load_suite, quiet
from gaintune.methods import Precision, measuring_precision
from gaintune.models import TOKENIZER_FILES, Base, load_base
from gaintune.progress import Progress
from gaintune.storage import MANIFEST, canonical_json, locked, make_folder, read_json, sha256_file, write_json

logger = logging.getLogger(__name__)

FORMAT = 2  # of a file of scores
STORED = ("task", "metric", "value", "stderr", "rows", "aggregation", "higher_is_better")
PACKAGES = ("gaintune", "lm_eval", "peft", "torch", "transformers")
# keys of a config that do not decide what the model computes, or that `Precision` stands for
NOT_OF_A_MODEL = ("_name_or_path", "dtype", "torch_dtype", "transformers_version", "quantization_config")
TOKENIZER = (*TOKENIZER_FILES, "special_tokens_map.json", "added_tokens.json", "merges.txt")


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
    """Measure a loaded base, and adapters on it, on the benchmarks of a config, all in the base's precision.

    The adapter stays an adapter and is not merged. The base is measured on the same weights with the first adapter
    switched off; where that does not restore the base, as with full fine-tuning and PiSSA, without it. Weights that
    were trained whole are rounded to the base's precision; `benchmark_adapters` measures them in their own.

    Args:
        base: the base; it is left as it was.
        adapters: adapter folders by their labels.
        cache: folder of scores that are kept between calls; None measures everything.
        suite: result of `load_suite(config)`, if it has been called already.
        allow_other_base: measure adapters that were trained on another base.
        mixed_precision: autocast dtype of a base in fp32, or None for its own precision.

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
    store = _ScoreStore(suite, config, base, None if cache is None else Path(cache), mixed_precision, progress)
    untouched = store.keys(None)
    adapted: dict[str, tuple[BenchmarkScore, ...]] = {}
    for label, folder in folders.items():
        record, keys = read_record(folder), store.keys(folder)
        if record is not None and record.whole and not store.precision.startswith("float32"):
            message = (
                "%s was trained whole in fp32 and is measured rounded to %s; benchmark_adapters(ModelConfig(...), ...) "
                "measures it as it was trained"
            )
            logger.warning(message, label, store.precision)
        if store.has([*keys, *untouched]):
            adapted[label] = store.scores(keys, label, base.model)  # nothing is measured
            continue
        with attached(base, folder, allow_other_base=allow_other_base) as (model, gives_base_back):
            if gives_base_back and not store.has(untouched):
                with adapter_off(model):
                    store.scores(untouched, BASE, model)
            adapted[label] = store.scores(keys, label, model)
        gc.collect()
    precisions = dict.fromkeys((BASE, *adapted), store.precision)
    return _report(suite, config, store.scores(untouched, BASE, base.model), adapted, precisions)


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
    """Load a base and do `run_benchmarks` over adapters, each in the precision it was trained in.

    Where those differ, as between full fine-tuning and an adapter on a bf16 base, the base is loaded and measured once
    in each. `report.base` is the base in that of the first adapter; every comparison is with the base in the adapter's
    own, `base_of(report, label)`. All is checked before a model is loaded.

    Adapters are folders by label, or folders, which are then labelled by their names; other arguments are those of
    `run_benchmarks`.

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
    options: dict[str, Any] = {"cache": cache, "suite": suite, "progress": progress}
    reports: list[BenchmarkReport] = []
    for precision, members in (alike or {measuring_precision(model): {}}).items():
        base = load_base(model, dtype=precision.load)
        options |= {"allow_other_base": allow_other_base, "mixed_precision": precision.mixed}
        reports.append(run_benchmarks(base, members, config, **options))
        del base  # before the next one is loaded
        gc.collect()
    first, labels = reports[0], list(folders)
    adapted = {label: scores for report in reports for label, scores in report.adapted.items()}
    compared = [comparison for report in reports for comparison in report.comparisons]
    compared.sort(key=lambda comparison: labels.index(comparison.label))
    precisions = {label: name for report in reversed(reports) for label, name in report.settings["numbers"].items()}
    settings = {**first.settings, "numbers": {label: precisions[label] for label in (BASE, *labels)}}
    in_order = {label: adapted[label] for label in labels}
    return BenchmarkReport(first.asked, first.base, in_order, tuple(compared), settings)


def base_of(report: BenchmarkReport, label: str) -> tuple[BenchmarkScore, ...]:
    """Return the base's scores that an adapter is compared with: those in the adapter's precision."""
    return tuple(comparison.base for comparison in report.comparisons if comparison.label == label)


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

    `mixed_precision` is the autocast dtype of a model kept in fp32; None for the model's own precision.

    Returns:
        Every metric of every task and group, in the order of the suite.

    Raises:
        ConfigError, DataError, AssetError, TrainingError: as `run_benchmarks`.
    """
    suite = suite or load_suite(config)
    from gaintune.evaluate.benchmarks.model import score_task

    options: dict[str, Any] = {"label": label, "mixed_precision": mixed_precision, "progress": progress}
    scores = [score for task in suite.tasks for score in score_task(model, tokenizer, task, config, **options)]
    return with_groups(suite.groups, scores)


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
    """Compare a loaded `PeftModel` with its base: the same weights with the adapter switched off.

    Raises:
        ConfigError: not a `PeftModel`, or as `load_suite`.
    """
    suite = suite or load_suite(config)
    options: dict[str, Any] = {"suite": suite, "mixed_precision": mixed_precision, "progress": progress}
    with adapter_off(model):
        base = measure_benchmarks(model, tokenizer, config, label=BASE, **options)
    adapted = {label: measure_benchmarks(model, tokenizer, config, label=label, **options)}
    precisions = dict.fromkeys((BASE, label), _precision_name(model, mixed_precision))
    return _report(suite, config, base, adapted, precisions)


def _report(
    suite: Suite,
    config: BenchmarkConfig,
    base: tuple[BenchmarkScore, ...],
    adapted: dict[str, tuple[BenchmarkScore, ...]],
    precisions: Mapping[str, str],
) -> BenchmarkReport:
    comparisons = tuple(
        with_group_difference(comparison, base, scores, config)
        for label, scores in adapted.items()
        for comparison in compare_scores(base, scores, label, config)
    )
    settings = {**config.model_dump(mode="json"), "numbers": dict(precisions), "versions": _versions()}
    return BenchmarkReport(suite.asked, base, adapted, comparisons, settings)


class _ScoreStore:
    """Scores of the models of a report: those measured in this run, and those in a folder, if one is given."""

    def __init__(
        self,
        suite: Suite,
        config: BenchmarkConfig,
        base: Base,
        folder: Path | None,
        mixed_precision: torch.dtype | None,
        progress: Progress | None,
    ) -> None:
        self.precision = _precision_name(base.model, mixed_precision)
        self._suite, self._config, self._folder, self._tokenizer = suite, config, folder, base.tokenizer
        self._options: dict[str, Any] = {"mixed_precision": mixed_precision, "progress": progress}
        self._identity = _identity_of(base, self.precision)
        self._scores: dict[str, list[dict[str, Any]]] = {}
        with quiet():
            self._questions = [_questions_hash(task, config) for task in suite.tasks]

    def keys(self, adapter: Path | None) -> list[str]:
        """Return the keys of the base's scores for each task, or of those of an adapter on it."""
        identity = {**self._identity, "adapter": None if adapter is None else _adapter_hash(adapter)}
        keys, config = [], self._config
        for task, questions in zip(self._suite.tasks, self._questions, strict=True):
            limits = [config.code_seconds, config.code_memory_mb]
            facts = {
                "model": identity,
                "task": task.name,
                "questions": questions,
                "metrics": _plain(task.task.get_config("metric_list")),
                "filters": _plain(task.task.get_config("filter_list")),
                "code": limits if task.task.get_config("unsafe_code") else None,
                "batch_size": config.batch_size,
                "seed": config.seed,
                "versions": _versions(),
            }
            keys.append(_hash(facts))
        return keys

    def has(self, keys: Sequence[str]) -> bool:
        """Return whether there are scores for all keys."""
        return all(key in self._scores or self._read(key) is not None for key in keys)

    def scores(self, keys: Sequence[str], label: str, model: nn.Module) -> tuple[BenchmarkScore, ...]:
        """Return all scores of a model and measure those that are missing; other processes wait for the first."""
        from gaintune.evaluate.benchmarks.model import score_task

        scores: list[BenchmarkScore] = []
        for key, task in zip(keys, self._suite.tasks, strict=True):
            measure = partial(score_task, model, self._tokenizer, task, self._config, label=label, **self._options)
            if key not in self._scores:
                self._scores[key] = self._stored(key, measure)
            for values in self._scores[key]:
                scores.append(BenchmarkScore(**{**values, "items": tuple(values["items"])}, facts=task.facts))
        return with_groups(self._suite.groups, scores)

    def _stored(self, key: str, measure: Callable[[], Sequence[BenchmarkScore]]) -> list[dict[str, Any]]:
        """Read the scores of a key from the folder, else measure and write them."""
        if self._folder is None:
            return [_plain_score(score) for score in measure()]
        make_folder(self._folder)
        with locked(self._folder / f".{key}.lock", "asking the same questions"):
            stored = self._read(key)
            if stored is None:
                stored = [_plain_score(score) for score in measure()]
                write_json(self._folder / f"{key}.json", {"format": FORMAT, "scores": stored})
        return stored

    def _read(self, key: str) -> list[dict[str, Any]] | None:
        file = None if self._folder is None else self._folder / f"{key}.json"
        if file is None or not file.exists():
            return None
        try:
            value = read_json(file)
            if value["format"] == FORMAT and all({*STORED, "items"} == set(score) for score in value["scores"]):
                return value["scores"]
        except (RunDirectoryError, KeyError, TypeError) as error:
            logger.warning("%s is damaged (%s); measuring again", file, error)
        return None


def _plain_score(score: BenchmarkScore) -> dict[str, Any]:
    return {**{name: getattr(score, name) for name in STORED}, "items": list(score.items)}


def _versions() -> dict[str, str]:
    """Return the versions of the packages that decide a score."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def _precision_name(model: nn.Module, mixed_precision: torch.dtype | None = None) -> str:
    """Name a model's precision: bfloat16, float32-autocast-bfloat16, or float16 with a quantization's hash."""
    wrapped: Any = model
    name = str(wrapped.dtype).removeprefix("torch.")
    if mixed_precision is not None:
        name += f"-autocast-{str(mixed_precision).removeprefix('torch.')}"
    quantization = getattr(wrapped.config, "quantization_config", None)
    if quantization is None:
        return name
    return f"{name}-{_hash(quantization if isinstance(quantization, dict) else quantization.to_dict())}"


def _identity_of(base: Base, precision: str) -> dict[str, str]:
    """Return what decides a base's answers, besides the adapter on it and the questions."""
    files = [base.folder / name for name in sorted(set(TOKENIZER))]
    tokenizer: list[Any] = [[file.name, sha256_file(file)] for file in files if file.is_file()]
    model: Any = base.model
    settings = {key: value for key, value in model.config.to_dict().items() if key not in NOT_OF_A_MODEL}
    return {
        "fingerprint": base.fingerprint,
        "settings": _hash(settings),  # the whole config, such as the longest context and all settings of positions
        "tokenizer": _hash([*tokenizer, base.tokenizer.model_max_length, *beginning_of_text(base.tokenizer)]),
        "numbers": precision,
        "attention": str(getattr(model.config, "_attn_implementation", None)),
        "device": model.device.type,
    }


def _adapter_hash(folder: Path) -> str:
    """Return a hash over an adapter's files; the manifest where there is one stands for all of them."""
    names = (MANIFEST,) if (folder / MANIFEST).is_file() else (CONFIG, WEIGHTS)
    return _hash([[name, sha256_file(folder / name)] for name in names if (folder / name).is_file()])


def _questions_hash(task: LoadedTask, config: BenchmarkConfig) -> str:
    """Return a hash over a task's questions: each prompt with its worked examples, each answer, each row."""
    task.task.set_fewshot_seed(config.seed)
    task.task.build_all_requests(limit=config.limit)
    digest = hashlib.sha256()
    for request in task.task.instances:
        row = [request.request_type, request.doc_id, request.idx, request.arguments, request.doc]
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    """Replace functions in a task's settings by their names."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    return f"{value.__module__}.{value.__qualname__}" if callable(value) else value


def _hash(value: Any) -> str:
    return hashlib.sha256(canonical_json(json.loads(json.dumps(value, default=str))).encode()).hexdigest()[:32]
