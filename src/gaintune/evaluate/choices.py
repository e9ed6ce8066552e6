"""Answer questions with choices by a decoder without a head: it chooses the likeliest continuation of a prompt.

This is how the GAIN paper measures MedQA and sentiment (arXiv 2604.04516, appendix H), and what multiple-choice
benchmarks report: by the summed log-likelihood of the choice's tokens, and by that sum per byte of the choice.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from gaintune.adapters import check_adapters
from gaintune.config import BeginningOfText, Plan
from gaintune.data import ChoiceRow, beginning_of_text, encode_parts, read_choices
from gaintune.errors import DataError, TrainingError
from gaintune.evaluate.batches import LoopOptions, run_batches
from gaintune.evaluate.classification import Predictions, difference, score
from gaintune.evaluate.compare import Measure, measure_base_and_adapters, paired_figures
from gaintune.models import Base, NextTokenLoss, load_base, longest_input, without_adapter
from gaintune.progress import Progress
from gaintune.results import Interval

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Likelihoods:
    """Log-likelihood of every choice of every row, in nats summed over the choice's tokens."""

    domain: str
    rows: tuple[ChoiceRow, ...]
    sums: tuple[tuple[float, ...], ...]

    def chosen(self, *, per_byte: bool = False) -> Predictions:
        """Choose the likeliest choice of every row, the first of equals, by its sum or by its sum per byte.

        Bytes are those of the choice's text in UTF-8, without the space before it.
        """
        numbers = []
        for row, sums in zip(self.rows, self.sums, strict=True):
            lengths = [len(choice.strip().encode()) if per_byte else 1 for choice in row.choices]
            numbers.append(int(np.argmax(np.divide(sums, lengths))))
        return Predictions(self.domain, _names(self.rows), tuple(row.answer for row in self.rows), tuple(numbers))


@dataclass(frozen=True)
class ChoiceFigure:
    """A model on a set of questions.

    Attributes:
        accuracy: share of rows whose right choice has the largest summed log-likelihood.
        accuracy_per_byte: the same by the sum per byte of the choice.
        change, change_per_byte: accuracy less that of the base, paired row by row; None for the base itself.
        majority: share of the most frequent answer (for exam questions, of the most frequent letter).
        answers: the choice with the largest sum for every row, so that two models' can be paired.
    """

    domain: str
    label: str
    accuracy: Interval
    accuracy_per_byte: Interval
    change: Interval | None
    change_per_byte: Interval | None
    majority: float
    rows: int
    answers: Predictions = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON: the figures, without the answers behind them."""
        values = asdict(self)
        del values["answers"]
        return values


def compare_choices(
    plan: Plan,
    adapters: Sequence[Path],
    *,
    sets: Mapping[str, Path],
    allow_other_base: bool = False,
    progress: Progress | None = None,
) -> list[ChoiceFigure]:
    """Ask the plan's base, and every adapter on it, the questions of every set (a name and a file or folder).

    `classify.validation_rows` limits the rows of a set, drawn in an order that `data.seed` decides.

    Returns:
        For each set the base, then the adapters in the order given, labelled by their folders.

    Raises:
        DataError: a set that cannot be read; see `read_choices`.
        AdapterError, BaseMismatchError: an adapter that is damaged or of another base.
    """
    limit, seed = plan.classify.validation_rows, plan.data.seed
    questions = {name: read_choices(name, path, limit=limit, seed=seed) for name, path in sets.items()}
    check_adapters(adapters, plan.model, allow_other_base=allow_other_base)

    def prepare(base: Base) -> Measure[list[Likelihoods]]:
        settings = {"beginning": plan.data.beginning_of_text, "batch_size": plan.evaluate.batch_size}

        def measure(model: nn.Module, label: str, mixed: torch.dtype | None) -> list[Likelihoods]:
            options: dict[str, Any] = {**settings, "mixed_precision": mixed, "progress": progress}
            return [
                choice_likelihoods(model, base.tokenizer, rows, name, title=f"{label}: answering {name}", **options)
                for name, rows in questions.items()
            ]

        return measure

    def figure(_: int, label: str, own: Likelihoods, base: Likelihoods | None) -> ChoiceFigure:
        by_sum, by_byte = own.chosen(), own.chosen(per_byte=True)
        scores = score(by_sum, plan.evaluate)
        return ChoiceFigure(
            domain=own.domain,
            label=label,
            accuracy=scores.accuracy,
            accuracy_per_byte=score(by_byte, plan.evaluate).accuracy,
            change=None if base is None else difference(base.chosen(), by_sum, plan.evaluate),
            change_per_byte=None if base is None else difference(base.chosen(per_byte=True), by_byte, plan.evaluate),
            majority=scores.majority,
            rows=scores.rows,
            answers=by_sum,
        )

    before, adapted = measure_base_and_adapters(plan, adapters, load_base, prepare, allow_other_base=allow_other_base)
    return paired_figures(before, adapted, figure)


def choice_likelihoods(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[ChoiceRow],
    name: str,
    *,
    beginning: BeginningOfText = "auto",
    batch_size: int = 4,
    **options: Unpack[LoopOptions],
) -> Likelihoods:
    """Measure the log-likelihood of every choice of every row after its prompt.

    Prompt and choice are tokenized as a prompt and its completion are in training (`encode_parts`), and the choice's
    tokens are scored. A prompt that is too long for the model loses its beginning, with a warning; the
    beginning-of-text token stays.

    Args:
        model: a causal language model, with or without an adapter; its mode is restored.
        tokenizer: the base's.
        rows: the questions of the set called `name`.
        beginning: whether a beginning-of-text token comes before every prompt, as `data.beginning_of_text`.
        batch_size: prompts in a forward pass.

    Raises:
        DataError: a choice that the tokenizer makes no token of.
        ConfigError: `beginning` is always, and the tokenizer has no such token.
        TrainingError: a likelihood is not finite; the model is broken.
    """
    begin = tuple(beginning_of_text(tokenizer, beginning))
    encoded = _encode(rows, tokenizer, begin, longest_input(without_adapter(model), tokenizer), name)
    choices_after: dict[tuple[int, ...], list[int]] = {}
    for number, (context, _) in enumerate(encoded):
        choices_after.setdefault(context, []).append(number)
    contexts = sorted(choices_after, key=lambda context: (-len(context), context))  # alike in length in a batch
    device = next(model.parameters()).device
    loss = NextTokenLoss(model)
    sums = [0.0] * len(encoded)

    def step(start: int) -> int:
        batch = contexts[start : start + batch_size]
        scored = torch.tensor(
            [
                (number, row, position, token)
                for row, context in enumerate(batch)
                for number in choices_after[context]
                for position, token in enumerate(encoded[number][1], start=len(context) - len(encoded[number][1]))
            ]
        )
        ids = pad_sequence([torch.tensor(context) for context in batch], batch_first=True).to(device)
        losses = loss.at(model, ids, *scored[:, 1:].T.to(device))
        for number, nats in zip(scored[:, 0].tolist(), losses.double().tolist(), strict=True):
            sums[number] -= nats
        return sum(map(len, batch))

    starts = range(0, len(contexts), batch_size)
    run_batches(model, starts, step, total=sum(map(len, contexts)), **options)
    if not all(map(math.isfinite, sums)):
        raise TrainingError(f"{options.get('title', 'measuring')}: a likelihood is not finite, so the model is broken")
    in_order = iter(sums)
    return Likelihoods(name, tuple(rows), tuple(tuple(next(in_order) for _ in row.choices) for row in rows))


def _encode(
    rows: Sequence[ChoiceRow],
    tokenizer: PreTrainedTokenizerBase,
    begin: tuple[int, ...],
    longest: int | None,
    name: str,
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return the context and the tokens of every choice of every row in order, tokenized as in training.

    The model reads the context, all tokens but the last; one that is too long keeps its end. Choices of one token have
    the prompt alone as context, so one forward pass answers all those of a row.
    """
    room = None if longest is None else longest - len(begin)
    encoded = []
    cut = 0
    for row in rows:
        pairs = encode_parts([(row.prompt, choice) for choice in row.choices], tokenizer)
        for text, parts in zip(row.choices, pairs, strict=True):
            prompt, choice = (tuple(part.ids.tolist()) for part in parts)
            if not (begin or prompt) or not choice or (room is not None and len(choice) > room):
                raise DataError(f"{row.origin}: the choice {text!r} is no token, or too many, after its prompt")
            context = (*prompt, *choice[:-1])
            if room is not None and len(context) > room:
                context, cut = context[-room:], cut + 1
            encoded.append(((*begin, *context), choice))
    if cut:
        message = "%s: %d of %d prompts with a choice are longer than the model's %s tokens and lost their beginning"
        logger.warning(message, name, cut, len(encoded), longest)
    return encoded


def _names(rows: Sequence[ChoiceRow]) -> tuple[str, ...]:
    """Name the choices: by their texts where all rows have the same, else by numbers from 1."""
    if len({row.choices for row in rows}) == 1:
        return tuple(choice.strip() for choice in rows[0].choices)
    return tuple(str(number + 1) for number in range(max(len(row.choices) for row in rows)))
