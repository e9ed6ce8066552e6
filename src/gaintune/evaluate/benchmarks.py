"""lm-eval's benchmarks over a base and adapters on it: scores as lm-eval defines them, and paired differences."""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from gaintune.adapters import adapter_labels, check_adapters, load_adapter
from gaintune.checkpoints import Checkpoint
from gaintune.config import ModelConfig
from gaintune.errors import ConfigError
from gaintune.evaluate.benchmark_config import BenchmarkConfig
from gaintune.evaluate.benchmark_groups import with_groups
from gaintune.evaluate.benchmark_quiet import quiet
from gaintune.evaluate.benchmark_records import BenchmarkReport, BenchmarkScore, compare_scores
from gaintune.evaluate.benchmark_store import ScoreStore, identity_of, questions_hash, score_key
from gaintune.evaluate.benchmark_tasks import Suite, load_suite
from gaintune.models import Base, load_base, load_model
from gaintune.progress import Progress

BASE = "base"
PROBE_TOKENS = 16


def run_benchmarks(
    base: Base,
    adapters: Mapping[str, str | Path],
    config: BenchmarkConfig,
    *,
    cache: str | Path | None = None,
    suite: Suite | None = None,
    allow_other_base: bool = False,
    progress: Progress | None = None,
) -> BenchmarkReport:
    """Measure a base, and adapters on it, on the benchmarks of a config.

    The adapter stays an adapter and is not merged. The base is measured on the same weights with the first adapter
    switched off; where switching it off does not give the base back, as with full fine-tuning and PiSSA, without it.

    Args:
        base: the base; it is left as it was.
        adapters: adapter folders by the label each is to have.
        config: what is asked.
        cache: folder of scores that are kept between calls; None measures everything.
        suite: what `load_suite(config)` gave, if it has been called already.
        allow_other_base: measure adapters that were trained on another base.
        progress: where to show how far it is.

    Raises:
        ConfigError, DataError, AssetError: as `load_suite`; a label that is taken.
        AdapterError, BaseMismatchError: an adapter that is damaged or of another base.
        TrainingError: a model whose likelihoods are not finite.
    """
    if BASE in adapters:
        raise ConfigError(f"an adapter cannot be called {BASE!r}")
    suite = suite or load_suite(config)
    measuring = _Measuring(suite, config, base, ScoreStore(None if cache is None else Path(cache)), progress)
    untouched = measuring.keys(None)
    adapted: dict[str, tuple[BenchmarkScore, ...]] = {}
    for label, folder in ((label, Path(folder)) for label, folder in adapters.items()):
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
    return _report(suite, config, measuring.scores(untouched, BASE, base.model), adapted)


def benchmark_adapters(
    model: ModelConfig,
    adapters: Sequence[Path],
    config: BenchmarkConfig,
    *,
    cache: Path | None = None,
    allow_other_base: bool = False,
    progress: Progress | None = None,
) -> BenchmarkReport:
    """Load a base and do `run_benchmarks` over adapter folders, labelled by their names; all is checked first."""
    labels = adapter_labels(adapters)
    suite = load_suite(config)
    check_adapters(adapters, model, allow_other_base=allow_other_base)
    options: dict[str, Any] = {"cache": cache, "allow_other_base": allow_other_base, "progress": progress}
    return run_benchmarks(load_base(model), dict(zip(labels, adapters, strict=True)), config, suite=suite, **options)


def measure_benchmarks(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    config: BenchmarkConfig,
    *,
    suite: Suite | None = None,
    label: str = "model",
    progress: Progress | None = None,
) -> tuple[BenchmarkScore, ...]:
    """Measure a model that is loaded already, such as one that is being trained; nothing is cached.

    Returns:
        Every metric of every task and group, in the order of the suite.

    Raises:
        ConfigError, DataError, AssetError, TrainingError: as `run_benchmarks`.
    """
    suite = suite or load_suite(config)
    from gaintune.evaluate.benchmark_model import ask

    found = [
        score for asked in suite.tasks for score in ask(model, tokenizer, asked, config, label=label, progress=progress)
    ]
    return with_groups(suite, found)


def compare_benchmarks(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    config: BenchmarkConfig,
    *,
    suite: Suite | None = None,
    label: str = "adapted",
    progress: Progress | None = None,
) -> BenchmarkReport:
    """A loaded `PeftModel` against its base: the same weights with the adapter switched off.

    Raises:
        ConfigError: not a `PeftModel`, or as `load_suite`.
    """
    suite = suite or load_suite(config)
    options: dict[str, Any] = {"suite": suite, "progress": progress}
    with adapter_off(model):
        base = measure_benchmarks(model, tokenizer, config, label=BASE, **options)
    return _report(suite, config, base, {label: measure_benchmarks(model, tokenizer, config, label=label, **options)})


@contextlib.contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Switch a `PeftModel`'s adapter off for a while; ConfigError for another model."""
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        raise ConfigError("only a PeftModel has an adapter to switch off; measure the two models one by one")
    with model.disable_adapter():
        yield


@contextlib.contextmanager
def attached(base: Base, folder: Path, *, allow_other_base: bool = False) -> Iterator[tuple[nn.Module, bool]]:
    """Put an adapter onto a base for a while.

    Yields:
        The adapted model, and whether it computes exactly what the base does when the adapter is switched off.
    """
    from peft import PeftModel

    before = _probe(base.model)
    model = load_adapter(base, folder, allow_other_base=allow_other_base)
    gives_back = False
    if isinstance(model, PeftModel):
        with model.disable_adapter():
            gives_back = torch.equal(_probe(model), before)
    try:
        yield model, gives_back
    finally:
        if isinstance(model, PeftModel) and hasattr(model.base_model, "unload"):  # a prompt has no layers to take out
            cast(Any, model.base_model).unload()
        if not torch.equal(_probe(base.model), before):
            _restore(base)


def _probe(model: nn.Module) -> torch.Tensor:
    """Logits on a few tokens: they tell whether a model is what it was."""
    wrapped: Any = model
    tokens = torch.arange(PROBE_TOKENS, device=wrapped.device) % wrapped.config.get_text_config().vocab_size
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            return wrapped(input_ids=tokens[None], use_cache=False).logits.clone()
    finally:
        model.train(training)


def _restore(base: Base) -> None:
    """Read a base's weights again, into the model it has; methods that change weights never work on quantized ones."""
    model = base.model
    saved = load_model(Checkpoint(base.name, base.folder, base.revision), model.dtype, torch.device("cpu"))
    model.load_state_dict(saved.state_dict(), strict=True)


class _Measuring:
    """What all models of one report have in common: the questions, and the scores that are there already."""

    def __init__(
        self, suite: Suite, config: BenchmarkConfig, base: Base, store: ScoreStore, progress: Progress | None
    ) -> None:
        self.suite = suite
        self._config = config
        self._base = base
        self._store = store
        self._progress = progress
        with quiet():
            self._questions = [questions_hash(asked, config) for asked in suite.tasks]

    def keys(self, adapter: Path | None) -> list[str]:
        """Of the base, or of an adapter on it, what stands for its scores of each task."""
        identity = identity_of(self._base, adapter)
        both = zip(self.suite.tasks, self._questions, strict=True)
        return [score_key(identity, asked, questions, self._config) for asked, questions in both]

    def missing(self, keys: Sequence[str]) -> bool:
        """Whether some task has yet to be asked."""
        return not all(self._store.has(key) for key in keys)

    def scores(self, keys: Sequence[str], label: str, model: nn.Module) -> tuple[BenchmarkScore, ...]:
        """All scores of a model; what is missing is asked."""
        from gaintune.evaluate.benchmark_model import ask

        options: dict[str, Any] = {"label": label, "progress": self._progress}
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
) -> BenchmarkReport:
    comparisons = [each for label, scores in adapted.items() for each in compare_scores(base, scores, label, config)]
    settings = {**config.model_dump(mode="json"), "lm_eval": importlib.metadata.version("lm_eval")}
    return BenchmarkReport(suite.asked, base, adapted, tuple(comparisons), settings)
