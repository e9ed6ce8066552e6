"""lm-eval's model class over a model that is loaded already, and its answers to a task."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import random
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
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
from gaintune.evaluate.benchmarks.records import BenchmarkScore, metrics_of
from gaintune.evaluate.benchmarks.tasks import LoadedTask, quiet
from gaintune.models import begin_texts
from gaintune.progress import Progress, Silent

logger = logging.getLogger(__name__)

_HFLM = cast(Any, HFLM)  # the decorator that registers it hides its type from type checkers


class LmEvalModel(_HFLM):
    """A loaded causal language model for lm-eval; progress is counted in requests.

    Log-probabilities are taken in fp32 whatever the model computes in: in bf16 many choices would tie.

    Args:
        model: the model, with or without an adapter.
        tokenizer: its tokenizer; a copy is used, since lm-eval adds a padding token. It decides whether prompts begin
            with the beginning-of-text token, except for Gemma, which always needs one (`begin_texts`).
        batch_size: prompts in a forward pass.
        title, progress: title of the progress bar, and where to show it.
        mixed_precision: autocast dtype of a model kept in fp32, or None for the model's own precision.
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
        """Return the log-likelihood of continuations, as lm-eval defines it."""
        with self._counted(len(requests)):
            return super().loglikelihood(requests, disable_tqdm=True)

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
        """Generate answers, as lm-eval defines them."""
        self._check_room([request.args for request in requests])
        with self._counted(len(requests)):
            return super().generate_until(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = True, override_bs: int | None = None) -> Any:
        longest = self.max_length
        if any(len(continuation) > longest for _, _, continuation in requests):
            raise DataError(f"{self._title}: an answer is longer than the {longest} tokens that the model reads")
        cut = sum(len(context) + len(continuation) > longest + 1 for _, context, continuation in requests)
        self._warn_of_cut(cut, len(requests))
        answers = super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)
        if not all(math.isfinite(likelihood) for likelihood, _ in answers):
            raise TrainingError(f"{self._title}: a likelihood is not finite, so the model is broken")
        return answers

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
            message = "%s: %d of %d prompts are longer than the model's %d tokens and lost their beginning"
            logger.warning(message, self._title, cut, count, self.max_length)

    @contextlib.contextmanager
    def _counted(self, requests: int) -> Iterator[None]:
        """Show a bar that advances with every answer, which lm-eval hands to its cache hook."""
        original = self.cache_hook
        with self._progress.task(self._title, requests, "requests") as advance:
            self.cache_hook = SimpleNamespace(add_partial=lambda *_: advance(1))
            try:
                yield
            finally:
                self.cache_hook = original


def score_task(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: LoadedTask,
    config: BenchmarkConfig,
    *,
    label: str = "model",
    mixed_precision: torch.dtype | None = None,
    progress: Progress | None = None,
) -> tuple[BenchmarkScore, ...]:
    """Measure every metric of a task; the model's mode and the random generators are restored.

    `mixed_precision` is the autocast dtype of a model kept in fp32; None for the model's own precision.

    Raises:
        TrainingError: a likelihood is not finite; the model is broken.
        ConfigError: answers longer than the model reads.
    """
    training = model.training
    try:
        with quiet(), _seeded(config.seed):
            task.task.set_fewshot_seed(config.seed)
            results: Any = evaluate(
                lm=LmEvalModel(
                    model,
                    tokenizer,
                    batch_size=config.batch_size,
                    title=f"{label}: {task.name}",
                    progress=progress or Silent(),
                    mixed_precision=mixed_precision,
                ),
                task_dict={"tasks": {task.name: task.task}},
                limit=config.limit,
                bootstrap_iters=0,  # its standard errors that need resampling print, and fork
                confirm_run_unsafe_code=True,  # refused when the task was loaded, unless the user allowed it
            )
    finally:
        model.train(training)
    return tuple(_scores(task, results))


def _scores(task: LoadedTask, results: dict[str, Any]) -> Iterator[BenchmarkScore]:
    definition: Any = task.task  # what these two return is annotated as None
    aggregations: dict[str, Callable[..., float]] = definition.aggregation()
    better: dict[str, bool] = definition.higher_is_better()
    samples = sorted(results["samples"][task.name], key=lambda sample: sample["doc_id"])
    for key, metric, kept, value in metrics_of(results["results"][task.name]):
        values = [sample[metric] for sample in samples if sample["filter"] == kept]
        function = aggregations.get(metric, mean)
        aggregation = "mean" if function is mean else "perplexity" if function is perplexity else "other"
        items = () if aggregation == "other" else tuple(map(float, values))
        stderr = None if len(items) < 2 else float(mean_stderr(items))
        if stderr is not None and aggregation == "perplexity":
            stderr *= value  # the limit of lm-eval's bootstrap
        yield BenchmarkScore(
            task=task.name,
            metric=metric if kept == "none" else key,
            value=value,
            stderr=stderr,
            items=items,
            rows=len(values),
            aggregation=aggregation,
            higher_is_better=better.get(metric),
            facts=task.facts,
        )


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed Python's, NumPy's and torch's generators, and restore them afterwards."""
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
