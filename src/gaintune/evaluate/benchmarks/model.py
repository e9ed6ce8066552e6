"""lm-eval's model class over a model that is loaded already, and one task asked of it."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from lm_eval.api.metrics import mean, mean_stderr, perplexity
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from torch import nn
from transformers import PreTrainedTokenizerBase

from gaintune.errors import ConfigError, DataError, TrainingError
from gaintune.evaluate.benchmarks.config import BenchmarkConfig
from gaintune.evaluate.benchmarks.quiet import quiet
from gaintune.evaluate.benchmarks.records import Aggregation, BenchmarkScore
from gaintune.evaluate.benchmarks.tasks import AskedTask
from gaintune.models import begin_texts
from gaintune.progress import Advance, Progress, Silent

logger = logging.getLogger(__name__)

_HFLM = cast(Any, HFLM)  # the decorator that registers it hides what it is from type checkers


class AskedModel(_HFLM):
    """A loaded causal language model as lm-eval asks it; progress is counted in requests.

    Log-probabilities are taken in fp32 whatever the model computes in: in bf16 many choices would tie.

    Args:
        model: the model, with or without an adapter.
        tokenizer: its tokenizer; a copy is used, since lm-eval adds a padding token. Whether prompts begin with the
            beginning-of-text token is its own doing, but for Gemma, which always needs one (`begin_texts`).
        batch_size: prompts in a forward pass.
        title: what a progress bar says.
        progress: where to show it.
        mixed_precision: autocast dtype of a model kept in fp32, or None for the model's own numbers.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        title: str,
        progress: Progress,
        mixed_precision: torch.dtype | None = None,
    ) -> None:
        own = copy.deepcopy(tokenizer)
        begin_texts(own, model.config.model_type)
        super().__init__(
            pretrained=model,
            tokenizer=own,
            backend="causal",
            batch_size=batch_size,
            softmax_dtype="float32",
            mixed_precision_dtype=mixed_precision,
        )
        self._title = title
        self._progress = progress

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log-likelihood of continuations, as lm-eval defines it."""
        with self._shown(len(requests)):
            return super().loglikelihood(requests, disable_tqdm=True)

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
        """Generated answers, as lm-eval defines them."""
        self._check_room([request.args for request in requests])
        with self._shown(len(requests)):
            return super().generate_until(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = True, override_bs: int | None = None) -> Any:
        longest = self.max_length
        if any(len(continuation) > longest for _, _, continuation in requests):
            raise DataError(f"{self._title}: an answer is longer than the {longest} tokens that the model reads")
        cut = sum(len(context) + len(continuation) > longest + 1 for _, context, continuation in requests)
        self._warn_of_cut(cut, len(requests))
        found = super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)
        if not all(math.isfinite(likelihood) for likelihood, _ in found):
            raise TrainingError(f"{self._title}: a likelihood is not finite, so the model is broken")
        return found

    def _check_room(self, requests: Sequence[tuple[str, dict[str, Any]]]) -> None:
        """Refuse answers longer than the model reads; warn of prompts that lose their beginning for them."""
        cut = 0
        for prompt, settings in requests:
            answer = settings.get("max_gen_toks", self.max_gen_toks)
            if answer >= self.max_length:
                raise ConfigError(
                    f"{self._title}: up to {answer} tokens are generated and the model reads {self.max_length}; "
                    "set --generated-tokens (Python: generated_tokens) to less"
                )
            cut += len(self.tok_encode(prompt)) > self.max_length - answer
        self._warn_of_cut(cut, len(requests))

    def _warn_of_cut(self, cut: int, count: int) -> None:
        if cut:
            logger.warning(
                "%s: %d of %d prompts are longer than the model's %d tokens and lost their beginning",
                self._title, cut, count, self.max_length,
            )  # fmt: skip

    @contextlib.contextmanager
    def _shown(self, requests: int) -> Iterator[None]:
        """A bar that advances with every answer, which lm-eval hands to its cache hook."""
        kept = self.cache_hook
        with self._progress.task(self._title, requests, "requests") as advance:
            self.cache_hook = _Count(advance)
            try:
                yield
            finally:
                self.cache_hook = kept


class _Count:
    """Takes the place of lm-eval's cache of answers, to count them."""

    def __init__(self, advance: Advance) -> None:
        self._advance = advance

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        self._advance(1)


def ask(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    asked: AskedTask,
    config: BenchmarkConfig,
    *,
    label: str = "model",
    mixed_precision: torch.dtype | None = None,
    progress: Progress | None = None,
) -> tuple[BenchmarkScore, ...]:
    """Every metric of one task of one model; the model is left in the mode it was in, random generators likewise.

    `mixed_precision` is the autocast dtype of a model kept in fp32; None for the model's own numbers.

    Raises:
        TrainingError: a likelihood is not finite; the model is broken.
        ConfigError: answers longer than the model reads.
    """
    training = model.training
    try:
        with quiet(), seeded(config.seed):
            asked.task.set_fewshot_seed(config.seed)
            title = f"{label}: {asked.name}"
            shown = progress or Silent()
            options: dict[str, Any] = {"title": title, "progress": shown, "mixed_precision": mixed_precision}
            wrapped = AskedModel(model, tokenizer, batch_size=config.batch_size, **options)
            found: Any = evaluate(
                lm=wrapped,
                task_dict={"tasks": {asked.name: asked.task}},
                limit=config.limit,
                bootstrap_iters=0,  # its standard errors that need resampling print, and fork
                confirm_run_unsafe_code=True,  # refused when the task was loaded, unless the user said so
            )
    finally:
        model.train(training)
    return tuple(_scores(asked, found))


def _scores(asked: AskedTask, found: dict[str, Any]) -> Iterator[BenchmarkScore]:
    task: Any = asked.task  # what these two return is annotated as None
    aggregations: dict[str, Callable[..., float]] = task.aggregation()
    better: dict[str, bool] = task.higher_is_better()
    samples = found["samples"][asked.name]
    for key, value in found["results"][asked.name].items():
        metric, separator, kept = key.partition(",")
        if not separator or metric.endswith("_stderr"):
            continue
        rows = [sample for sample in samples if sample["filter"] == kept]
        values = [sample[metric] for sample in sorted(rows, key=lambda sample: sample["doc_id"])]
        aggregation = _kind(aggregations.get(metric, mean))
        items = () if aggregation == "other" else tuple(float(each) for each in values)
        yield BenchmarkScore(
            task=asked.name,
            metric=metric if kept == "none" else key,
            value=float(value),
            stderr=_stderr(aggregation, float(value), items),
            items=items,
            rows=len(values),
            aggregation=aggregation,
            higher_is_better=better.get(metric),
            facts=asked.facts,
        )


def _kind(aggregation: Callable[..., float]) -> Aggregation:
    return "mean" if aggregation is mean else "perplexity" if aggregation is perplexity else "other"


def _stderr(aggregation: Aggregation, value: float, items: Sequence[float]) -> float | None:
    """lm-eval's standard error of a mean; of a perplexity that of the mean times the value, its bootstrap's limit."""
    if len(items) < 2 or aggregation == "other":
        return None
    error = float(mean_stderr(items))
    return error if aggregation == "mean" else value * error


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed Python's, NumPy's and torch's generators, and give them back as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
