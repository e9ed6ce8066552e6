"""From a domain of labelled rows to rows of tokens for a classifier: budget in rows, truncation that is counted."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from gaintune.config import ClassifyConfig, DomainConfig
from gaintune.data.documents import Documents, drawn_order
from gaintune.data.labelled import LabelledText, load_labelled
from gaintune.data.neighbours import normalize
from gaintune.errors import DataError

logger = logging.getLogger(__name__)

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class LabelledExamples:
    """Rows of tokens, of different lengths, with the number of their label.

    Attributes:
        input_ids: token ids of each row, int64 `(length,)`.
        labels: int64 `(rows,)`, counted in the order of `ClassifyDomain.labels`.
        segments: 0 for tokens of the first text, 1 for the second, as `input_ids`; None for models that do not take it.
        truncated: rows of which the end was cut away.
    """

    input_ids: tuple[torch.Tensor, ...]
    labels: torch.Tensor
    segments: tuple[torch.Tensor, ...] | None = None
    truncated: int = 0

    @property
    def tokens(self) -> int:
        """Number of tokens without padding."""
        return sum(len(row) for row in self.input_ids)

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, row: int) -> Batch:
        """Return one row: `input_ids` and `token_type_ids` `(length,)`, `labels` a scalar."""
        picked = {"input_ids": self.input_ids[row], "labels": self.labels[row]}
        if self.segments is not None:
            picked["token_type_ids"] = self.segments[row]
        return picked


@dataclass(frozen=True)
class Padding:
    """Collator that pads rows on the right to the longest of a batch, and masks the padding."""

    token: int

    def __call__(self, rows: list[Batch]) -> Batch:
        """Return `input_ids`, `attention_mask` and `token_type_ids`, `(rows, longest)`, and `labels` `(rows,)`."""
        ids = [row["input_ids"] for row in rows]
        batch = {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.token),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": torch.stack([row["labels"] for row in rows]),
        }
        if "token_type_ids" in rows[0]:
            batch["token_type_ids"] = pad_sequence([row["token_type_ids"] for row in rows], batch_first=True)
        return batch

    def batches(self, examples: LabelledExamples, size: int) -> Iterator[Batch]:
        """Yield all rows in order, `size` at a time."""
        for start in range(0, len(examples), size):
            yield self([examples[row] for row in range(len(examples))[start : start + size]])


@dataclass(frozen=True)
class ClassifyDomain:
    """A domain of labelled rows ready to train on and to measure.

    `labels` are the names in the training rows, sorted (numbers by value). `content_hash` is the SHA-256 of the tokens,
    the labels and the settings that made them. `repeated` counts validation rows whose text is also that of a training
    row, case, spacing and punctuation aside.
    """

    name: str
    labels: tuple[str, ...]
    train: LabelledExamples
    validation: LabelledExamples
    content_hash: str
    repeated: int

    def describe(self) -> dict[str, str | int | list[str]]:
        """Return what a record keeps of the rows: their content hash, and how many there were."""
        return {
            "content_hash": self.content_hash,
            "labels": list(self.labels),
            "train_rows": len(self.train),
            "validation_rows": len(self.validation),
            "train_truncated": self.train.truncated,
            "validation_truncated": self.validation.truncated,
            "repeated": self.repeated,
        }


def load_classification(
    domain: DomainConfig,
    settings: ClassifyConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    segments: bool = False,
) -> ClassifyDomain:
    """Load a domain of labelled rows within its limits.

    A pair is joined as the tokenizer joins pairs, or by a line end where it has no separator of its own (decoders).
    Longer rows are cut to `settings.max_length` tokens, a pair at its longer text, and counted. `seed` decides the
    split and the order of rows. With `segments` every token has the number of its text in the pair, for models that
    read it (BERT).

    Raises:
        DataError: as `load_labelled`; only one label, or one that no training row has.
        AssetError: a download failed.
    """
    texts = load_labelled(domain, seed)
    labels = _label_names(texts)
    train = _draw(texts.train, settings.train_rows, seed, "train", domain.name)
    validation = _draw(texts.validation, settings.validation_rows, seed, "validation", domain.name)
    if len({row.label for row in train}) < 2:
        raise DataError(
            f"domain {domain.name!r}: the {len(train)} training row(s) drawn all have the label {train[0].label!r}; "
            "raise classify.train_rows"
        )
    trained_on = {normalize(row.whole) for row in train}
    repeated = sum(normalize(row.whole) in trained_on for row in validation)
    if repeated:
        logger.warning("domain %s: %d validation row(s) also stand in the training rows", domain.name, repeated)
    sides: dict[str, LabelledExamples] = {}
    for side, rows in (("training", train), ("validation", validation)):
        examples = _encode(rows, labels, tokenizer, settings.max_length, segments)
        sides[side] = examples
        if examples.truncated:
            logger.warning(
                "domain %s: %d of %d %s rows are longer than classify.max_length (%d tokens) and were cut",
                domain.name, examples.truncated, len(examples), side, settings.max_length,
            )  # fmt: skip
    digest = _content_hash(settings, seed, labels, sides.values())
    return ClassifyDomain(domain.name, labels, sides["training"], sides["validation"], digest, repeated)


def _label_names(texts: Documents[LabelledText]) -> tuple[str, ...]:
    """Return the labels of the training rows in order: by value where all are whole numbers, else by name."""
    found = {row.label for row in texts.train}
    if len(found) < 2:
        first = texts.train[0]
        raise DataError(
            f"{first.origin}: this and every other training row has the label {first.label!r}; "
            "a classifier needs two different labels at least"
        )
    names = tuple(sorted(found, key=int if all(label.isdecimal() for label in found) else str))
    for row in texts.validation:
        if row.label not in found:
            raise DataError(
                f"{row.origin}: no training row has the label {row.label!r} (they have {', '.join(names)}); "
                "correct it, or give training rows of that label"
            )
    return names


def _draw(rows: Sequence[LabelledText], limit: int | None, seed: int, side: str, name: str) -> tuple[LabelledText, ...]:
    """Draw rows in an order that the seed decides; all of them where there is no limit."""
    if limit is not None and limit > len(rows):
        logger.warning("domain %s: %d %s rows, fewer than the %d asked for", name, len(rows), side, limit)
    return tuple(rows[index] for index in drawn_order(len(rows), seed, side)[:limit])


def _encode(
    rows: Sequence[LabelledText], labels: Sequence[str], tokenizer: PreTrainedTokenizerBase, limit: int, segments: bool
) -> LabelledExamples:
    """Tokenize rows with the tokenizer's special tokens, cut to `limit` tokens."""
    first: list[str] = [row.text_a for row in rows]
    second = [row.text_b for row in rows if row.text_b is not None] or None
    if second is not None and tokenizer.sep_token_id is None:
        first, second = [f"{a}\n{b}" for a, b in zip(first, second, strict=True)], None
    options: dict[str, Any] = {"return_token_type_ids": segments, "return_attention_mask": False, "verbose": False}
    whole = tokenizer(first, second, **options)
    cut = tokenizer(first, second, truncation=True, max_length=limit, **options)
    for row, ids in zip(rows, cut["input_ids"], strict=True):
        if not ids:
            raise DataError(f"{row.origin}: the tokenizer makes no token of this text; correct or delete the row")
    return LabelledExamples(
        input_ids=tuple(torch.tensor(ids) for ids in cut["input_ids"]),
        labels=torch.tensor([labels.index(row.label) for row in rows]),
        segments=tuple(torch.tensor(ids) for ids in cut["token_type_ids"]) if segments else None,
        truncated=sum(len(ids) > limit for ids in whole["input_ids"]),
    )


def _content_hash(settings: ClassifyConfig, seed: int, labels: Sequence[str], sides: Iterable[LabelledExamples]) -> str:
    """Return the SHA-256 over settings, labels and both sides' rows, the same on machines of either byte order."""
    facts = (settings.max_length, settings.train_rows, settings.validation_rows, seed, tuple(labels))
    digest = hashlib.sha256(repr(facts).encode())
    for examples in sides:
        digest.update(repr(len(examples)).encode())
        for row in range(len(examples)):
            values = np.append(examples.input_ids[row].numpy(), examples.labels[row].item())
            digest.update(repr(values.shape).encode())
            digest.update(values.astype("<i8").tobytes())
    return digest.hexdigest()
