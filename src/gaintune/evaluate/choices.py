"""A decoder as a classifier without a head: of the texts that may follow a prompt it chooses the likeliest.

This is how the GAIN paper measures MedQA and sentiment (arXiv 2604.04516, appendix H), and what multiple-choice
benchmarks report: by the summed log-likelihood of the choice's tokens, and by that sum per byte of the choice.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from gaintune.adapters import BASE, check_adapters
from gaintune.config import Plan
from gaintune.data import ChoiceRow, beginning_of_text, encode_parts, read_choices
from gaintune.errors import DataError, TrainingError
from gaintune.evaluate.base_and_adapters import Measure, measure_base_and_adapters
from gaintune.evaluate.batches import run_batches
from gaintune.evaluate.classification import Predictions, difference, score
from gaintune.models import Base, NextTokenLoss, load_base, longest_input
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
        """The likeliest choice of every row, the first of equals, by its sum or by its sum per byte.

        Bytes are those of the choice's text in UTF-8, without the space before it.
        """
        numbers = []
        for row, sums in zip(self.rows, self.sums, strict=True):
            lengths = [len(choice.strip().encode()) if per_byte else 1 for choice in row.choices]
            numbers.append(int(np.argmax(np.divide(sums, lengths))))
        return Predictions(self.domain, _names(self.rows), tuple(row.answer for row in self.rows), tuple(numbers))


@dataclass(frozen=True)
class ChoiceFigure:
    """One model on one set of questions.

    Attributes:
        accuracy: share of rows whose right choice has the largest summed log-likelihood.
        accuracy_per_byte: the same by the sum per byte of the choice.
        change: accuracy less that of the base, paired row by row; None for the base itself.
        change_per_byte: likewise.
        majority: share of the most frequent answer (for exam questions, of the most frequent letter).
        rows: how many were asked.
        answers: the choice with the largest sum for every row, of which two models' can be paired.
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
        """Plain values for JSON: the figures, without the answers behind them."""
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
    limit = plan.classify.validation_rows
    asked = {name: read_choices(name, path, limit=limit, seed=plan.data.seed) for name, path in sets.items()}
    check_adapters(adapters, plan.model, allow_other_base=allow_other_base)

    def prepare(base: Base) -> Measure[list[Likelihoods]]:
        tokenizer = base.tokenizer

        def measure(model: nn.Module, label: str, mixed: torch.dtype | None) -> list[Likelihoods]:
            return [
                choice_likelihoods(
                    model,
                    tokenizer,
                    rows,
                    name,
                    batch_size=plan.evaluate.batch_size,
                    mixed_precision=mixed,
                    title=f"{label}: answering {name}",
                    progress=progress,
                )
                for name, rows in asked.items()
            ]

        return measure

    before, adapted = measure_base_and_adapters(plan, adapters, load_base, prepare, allow_other_base=allow_other_base)
    figures = []
    for number, untouched in enumerate(before):
        figures.append(_figure(BASE, untouched, None, plan))
        figures += [_figure(each.label, each.adapted[number], each.base[number], plan) for each in adapted]
    return figures


def choice_likelihoods(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[ChoiceRow],
    name: str,
    *,
    batch_size: int = 4,
    mixed_precision: torch.dtype | None = None,
    title: str = "answering",
    progress: Progress | None = None,
) -> Likelihoods:
    """The log-likelihood of every choice of every row after its prompt.

    Prompt and choice are tokenised as a prompt and its completion are in training (`encode_parts`), and the choice's
    tokens are scored. A prompt that is too long for the model loses its beginning, with a warning; the tokenizer's
    beginning-of-text token stays.

    Args:
        model: a causal language model, with or without an adapter; left in the mode it was in.
        tokenizer: the base's.
        rows: the questions.
        name: what the set is called.
        batch_size: prompts in a forward pass.
        mixed_precision: autocast dtype of a model kept in fp32, or None for the model's own numbers.

    Raises:
        DataError: a choice that the tokenizer makes no token of.
        TrainingError: a likelihood is not finite; the model is broken.
    """
    wrapped: Any = model
    carrier = wrapped.get_base_model() if hasattr(wrapped, "get_base_model") else wrapped
    asked = _encode(rows, tokenizer, longest_input(carrier, tokenizer), name)
    choices_after: dict[tuple[int, ...], list[int]] = {}
    for number, each in enumerate(asked):
        choices_after.setdefault(each.seen, []).append(number)
    contexts = sorted(choices_after, key=lambda seen: (-len(seen), seen))  # alike in length in a batch
    device = next(model.parameters()).device
    loss = NextTokenLoss(model)
    sums = [0.0] * len(asked)

    def step(start: int) -> int:
        batch = contexts[start : start + batch_size]
        places = torch.tensor(
            [
                (number, row, place, token)
                for row, seen in enumerate(batch)
                for number in choices_after[seen]
                for place, token in asked[number].placed()
            ]
        )
        ids = pad_sequence([torch.tensor(seen) for seen in batch], batch_first=True).to(device)
        found = loss.at(model, ids, *places[:, 1:].T.to(device))
        for number, nats in zip(places[:, 0].tolist(), found.double().tolist(), strict=True):
            sums[number] -= nats
        return sum(map(len, batch))

    run_batches(
        model,
        range(0, len(contexts), batch_size),
        step,
        total=sum(map(len, contexts)),
        mixed_precision=mixed_precision,
        title=title,
        progress=progress,
    )
    if not all(map(math.isfinite, sums)):
        raise TrainingError(f"{title}: a likelihood is not finite, so the model is broken")
    in_order = iter(sums)
    return Likelihoods(name, tuple(rows), tuple(tuple(next(in_order) for _ in row.choices) for row in rows))


@dataclass(frozen=True)
class _Asked:
    """One choice after its prompt: what the model sees, all tokens but the last, and the choice's own tokens.

    Choices of one token see the prompt alone, so all those of a row are answered by one forward pass.
    """

    seen: tuple[int, ...]
    wanted: tuple[int, ...]

    def placed(self) -> list[tuple[int, int]]:
        """Every wanted token with the place it is predicted at."""
        return list(enumerate(self.wanted, start=len(self.seen) - len(self.wanted)))


def _encode(
    rows: Sequence[ChoiceRow], tokenizer: PreTrainedTokenizerBase, longest: int | None, name: str
) -> list[_Asked]:
    """Every choice of every row in order, tokenised as training does; of a context that is too long the end is kept."""
    begin = tuple(beginning_of_text(tokenizer))
    room = None if longest is None else longest - len(begin)
    made: list[_Asked] = []
    cut = 0
    for row in rows:
        pairs = encode_parts([(row.prompt, choice) for choice in row.choices], tokenizer)
        for choice, parts in zip(row.choices, pairs, strict=True):
            prompt, wanted = (tuple(part.ids.tolist()) for part in parts)
            if not (begin or prompt) or not wanted or (room is not None and len(wanted) > room):
                raise DataError(f"{row.origin}: the choice {choice!r} is no token, or too many, after its prompt")
            seen = (*prompt, *wanted[:-1])
            if room is not None and len(seen) > room:
                seen, cut = seen[-room:], cut + 1
            made.append(_Asked((*begin, *seen), wanted))
    if cut:
        logger.warning(
            "%s: %d of %d prompts with a choice are longer than the model's %s tokens and lost their beginning",
            name, cut, len(made), longest,
        )  # fmt: skip
    return made


def _names(rows: Sequence[ChoiceRow]) -> tuple[str, ...]:
    """What the choices are called: their texts where all rows have the same, else numbers from 1."""
    if len({row.choices for row in rows}) == 1:
        return tuple(choice.strip() for choice in rows[0].choices)
    return tuple(str(number + 1) for number in range(max(len(row.choices) for row in rows)))


def _figure(label: str, found: Likelihoods, base: Likelihoods | None, plan: Plan) -> ChoiceFigure:
    by_sum, by_byte = found.chosen(), found.chosen(per_byte=True)
    scores = score(by_sum, plan.evaluate)
    return ChoiceFigure(
        domain=found.domain,
        label=label,
        accuracy=scores.accuracy,
        accuracy_per_byte=score(by_byte, plan.evaluate).accuracy,
        change=None if base is None else difference(base.chosen(), by_sum, plan.evaluate),
        change_per_byte=None if base is None else difference(base.chosen(per_byte=True), by_byte, plan.evaluate),
        majority=scores.majority,
        rows=scores.rows,
        answers=by_sum,
    )
