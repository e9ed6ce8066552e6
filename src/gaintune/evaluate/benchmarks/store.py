"""Benchmark scores on disk by what decides them, so that a base is measured once for all its adapters."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gaintune.adapters import CONFIG, WEIGHTS
from gaintune.data import beginning_of_text
from gaintune.errors import RunDirectoryError
from gaintune.evaluate.benchmarks.config import BenchmarkConfig
from gaintune.evaluate.benchmarks.records import BenchmarkScore
from gaintune.evaluate.benchmarks.tasks import AskedTask
from gaintune.models import TOKENIZER_FILES, Base
from gaintune.storage import MANIFEST, canonical_json, locked, make_folder, read_json, sha256_file, write_json

logger = logging.getLogger(__name__)

FORMAT = 2
OF_A_SCORE = ("task", "metric", "value", "stderr", "rows", "aggregation", "higher_is_better")
PACKAGES = ("gaintune", "lm_eval", "peft", "torch", "transformers")
NOT_OF_A_MODEL = ("_name_or_path", "dtype", "torch_dtype", "transformers_version", "quantization_config")
TOKENIZER = (*TOKENIZER_FILES, "special_tokens_map.json", "added_tokens.json", "merges.txt")


@dataclass(frozen=True)
class ModelIdentity:
    """What decides a model's answers, and the adapter on it, if any.

    Attributes:
        fingerprint: of the base's weights.
        settings: hash over its whole config, such as the longest context and every number of its positions.
        tokenizer: hash over its files, the longest text that it takes, and the token it begins texts with, if any.
        numbers: what it computes in, as `numbers_name`.
        attention: the implementation that transformers chose.
        device: kind of device, such as `cuda`.
        adapter: hash over an adapter's files; None for the base alone.
    """

    fingerprint: str
    settings: str
    tokenizer: str
    numbers: str
    attention: str
    device: str
    adapter: str | None = None

    def with_adapter(self, folder: Path) -> ModelIdentity:
        """The same base with the adapter of a folder on it."""
        return replace(self, adapter=_adapter_content(folder))


class ScoreStore:
    """Scores that are there already: those of this run, and those in a folder, if one is given."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._here: dict[str, list[dict[str, Any]]] = {}

    def has(self, key: str) -> bool:
        """Whether there are scores for a key."""
        return key in self._here or self._read(key) is not None

    def get(
        self, key: str, asked: AskedTask, measure: Callable[[], Sequence[BenchmarkScore]]
    ) -> tuple[BenchmarkScore, ...]:
        """A task's scores if they are there, else from `measure`; of several processes one measures, others wait."""
        if key not in self._here:
            self._here[key] = self._from_folder(key, measure)
        return tuple(
            BenchmarkScore(**{**each, "items": tuple(each["items"])}, facts=asked.facts) for each in self._here[key]
        )

    def _from_folder(self, key: str, measure: Callable[[], Sequence[BenchmarkScore]]) -> list[dict[str, Any]]:
        if self.folder is None:
            return [_to_dict(score) for score in measure()]
        make_folder(self.folder)
        with locked(self.folder / f".{key}.lock", "asking the same questions"):
            kept = self._read(key)
            if kept is None:
                kept = [_to_dict(score) for score in measure()]
                write_json(self.folder / f"{key}.json", {"format": FORMAT, "scores": kept})
        return kept

    def _read(self, key: str) -> list[dict[str, Any]] | None:
        file = None if self.folder is None else self.folder / f"{key}.json"
        if file is None or not file.exists():
            return None
        try:
            value = read_json(file)
            if value["format"] == FORMAT and all({*OF_A_SCORE, "items"} == set(each) for each in value["scores"]):
                return value["scores"]
        except (RunDirectoryError, KeyError, TypeError) as error:
            logger.warning("%s is damaged (%s); measuring again", file, error)
        return None


def _to_dict(score: BenchmarkScore) -> dict[str, Any]:
    return {**{name: getattr(score, name) for name in OF_A_SCORE}, "items": list(score.items)}


def versions() -> dict[str, str]:
    """Versions of the packages that decide a score."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def numbers_name(model: nn.Module, mixed_precision: torch.dtype | None = None) -> str:
    """What a model computes in, such as bfloat16, float32-autocast-bfloat16, or float16 with a quantization's hash."""
    wrapped: Any = model
    name = str(wrapped.dtype).removeprefix("torch.")
    if mixed_precision is not None:
        name += f"-autocast-{str(mixed_precision).removeprefix('torch.')}"
    quantization = getattr(wrapped.config, "quantization_config", None)
    if quantization is None:
        return name
    return f"{name}-{_hash(quantization if isinstance(quantization, dict) else quantization.to_dict())}"


def identity_of(base: Base, numbers: str) -> ModelIdentity:
    """The identity of a loaded base that computes in some numbers."""
    files = [base.folder / name for name in sorted(set(TOKENIZER))]
    tokenizer: list[Any] = [[file.name, sha256_file(file)] for file in files if file.is_file()]
    model: Any = base.model
    settings = {key: value for key, value in model.config.to_dict().items() if key not in NOT_OF_A_MODEL}
    return ModelIdentity(
        fingerprint=base.fingerprint,
        settings=_hash(settings),
        tokenizer=_hash([*tokenizer, base.tokenizer.model_max_length, *beginning_of_text(base.tokenizer)]),
        numbers=numbers,
        attention=str(getattr(model.config, "_attn_implementation", None)),
        device=model.device.type,
    )


def _adapter_content(folder: Path) -> str:
    """Hash over an adapter's files; the manifest where there is one stands for all of them."""
    names = (MANIFEST,) if (folder / MANIFEST).is_file() else (CONFIG, WEIGHTS)
    return _hash([[name, sha256_file(folder / name)] for name in names if (folder / name).is_file()])


def score_key(model: ModelIdentity, asked: AskedTask, questions: str, config: BenchmarkConfig) -> str:
    """32 hexadecimal digits over the model, the task's questions and metrics, and the packages' versions."""
    facts = {
        "model": vars(model),
        "task": asked.name,
        "questions": questions,
        "metrics": _plain(asked.task.get_config("metric_list")),
        "filters": _plain(asked.task.get_config("filter_list")),
        "code": [config.code_seconds, config.code_memory_mb] if asked.task.get_config("unsafe_code") else None,
        "batch_size": config.batch_size,
        "seed": config.seed,
        "versions": versions(),
    }
    return _hash(facts)


def questions_hash(asked: AskedTask, config: BenchmarkConfig) -> str:
    """Hash over everything a task asks: each prompt with its worked examples, each answer, each row."""
    asked.task.set_fewshot_seed(config.seed)
    asked.task.build_all_requests(limit=config.limit)
    digest = hashlib.sha256()
    for request in asked.task.instances:
        row = [request.request_type, request.doc_id, request.idx, request.arguments, request.doc]
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    """Settings of a task with functions by their names."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return f"{value.__module__}.{value.__qualname__}" if callable(value) else value


def _hash(value: Any) -> str:
    return hashlib.sha256(canonical_json(json.loads(json.dumps(value, default=str))).encode()).hexdigest()[:32]
