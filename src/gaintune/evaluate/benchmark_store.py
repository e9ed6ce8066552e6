"""Benchmark scores on disk by what decides them, so that a base is measured once for all its adapters."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from gaintune.adapter_folder import CONFIG, WEIGHTS
from gaintune.errors import RunDirectoryError
from gaintune.evaluate.benchmark_config import BenchmarkConfig
from gaintune.evaluate.benchmark_records import BenchmarkScore
from gaintune.evaluate.benchmark_tasks import AskedTask
from gaintune.models import TOKENIZER_FILES, Base
from gaintune.runs import MANIFEST, canonical_json, make_folder, read_json, sha256_file, write_json

logger = logging.getLogger(__name__)

FORMAT = 1
OF_A_SCORE = ("task", "metric", "value", "stderr", "rows", "aggregation", "higher_is_better")
TOKENIZER = (*TOKENIZER_FILES, "special_tokens_map.json", "added_tokens.json", "merges.txt")


@dataclass(frozen=True)
class ModelIdentity:
    """What decides a model's answers: its weights, tokenizer, numbers and device, and the adapter on it, if any."""

    fingerprint: str
    tokenizer: str
    numbers: str
    device: str
    adapter: str | None = None


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
        with FileLock(self.folder / f".{key}.lock"):
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
        except (RunDirectoryError, KeyError, TypeError, UnicodeDecodeError) as error:
            logger.warning("%s is damaged (%s); measuring again", file, error)
        return None


def _to_dict(score: BenchmarkScore) -> dict[str, Any]:
    return {**{name: getattr(score, name) for name in OF_A_SCORE}, "items": list(score.items)}


def identity_of(base: Base, adapter: Path | None = None) -> ModelIdentity:
    """The identity of a loaded base, and of an adapter folder on it."""
    files = [base.folder / name for name in sorted(set(TOKENIZER))]
    tokenizer = _hash([[file.name, sha256_file(file)] for file in files if file.is_file()])
    model: Any = base.model
    quantization = getattr(model.config, "quantization_config", None)
    numbers = str(model.dtype).removeprefix("torch.")
    if quantization is not None:
        numbers += f"-{_hash(quantization if isinstance(quantization, dict) else quantization.to_dict())}"
    content = None if adapter is None else _adapter_content(adapter)
    return ModelIdentity(base.fingerprint, tokenizer, numbers, model.device.type, content)


def _adapter_content(folder: Path) -> str:
    """Hash over an adapter's files; the manifest where there is one stands for all of them."""
    names = (MANIFEST,) if (folder / MANIFEST).is_file() else (CONFIG, WEIGHTS)
    return _hash([[name, sha256_file(folder / name)] for name in names if (folder / name).is_file()])


def score_key(model: ModelIdentity, asked: AskedTask, questions: str, config: BenchmarkConfig) -> str:
    """32 hexadecimal digits over the model, the task's questions and metrics, and lm-eval's version."""
    facts = {
        "model": vars(model),
        "task": asked.name,
        "questions": questions,
        "metrics": _plain(asked.task.get_config("metric_list")),
        "filters": _plain(asked.task.get_config("filter_list")),
        "code": [config.code_seconds, config.code_memory_mb] if asked.task.get_config("unsafe_code") else None,
        "batch_size": config.batch_size,
        "seed": config.seed,
        "lm_eval": importlib.metadata.version("lm_eval"),
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
