"""Classifiers on labelled rows: their predictions, accuracy with its interval, every class, and paired differences."""

from __future__ import annotations

import gc
import inspect
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any, Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from gaintune.adapters import AdapterRecord, adapter_labels, check_adapters, load_adapter, read_record
from gaintune.config import EvaluateConfig, Plan
from gaintune.data import ClassifyDomain, LabelledExamples, Padding, load_classification
from gaintune.errors import ConfigError, DataError, TrainingError
from gaintune.evaluate.batches import LoopOptions, run_batches
from gaintune.methods import measuring_precision
from gaintune.models import load_classifier, load_tokenizer, reads_segments, without_adapter
from gaintune.progress import Progress
from gaintune.results import Interval, paired_shares

logger = logging.getLogger(__name__)

POSITIVE = ("1", "equivalent")  # the class of GLUE's F1: MRPC's paraphrases, and 1 where labels are 0 and 1


@dataclass(frozen=True)
class Predictions:
    """The true and the predicted label of every row of a domain, as numbers counted in the order of `labels`."""

    domain: str
    labels: tuple[str, ...]
    truth: tuple[int, ...]
    predicted: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.truth or len(self.truth) != len(self.predicted):
            raise DataError(
                f"{len(self.truth)} true and {len(self.predicted)} predicted labels: need one of each a row"
            )
        numbers = {*self.truth, *self.predicted}
        if not numbers <= set(range(len(self.labels))):
            raise DataError(f"label numbers {sorted(numbers)} for the labels {', '.join(self.labels)}")

    @property
    def right(self) -> NDArray[np.float64]:
        """1 where the prediction is right, else 0, `(rows,)`."""
        return np.asarray(np.equal(self.truth, self.predicted), np.float64)

    @property
    def names(self) -> list[str]:
        """The true label of every row."""
        return [self.labels[number] for number in self.truth]

    def confusion(self) -> NDArray[np.int64]:
        """Count the rows of each true label (first axis) that were given each label (second axis)."""
        counts = np.zeros((len(self.labels), len(self.labels)), np.int64)
        np.add.at(counts, (np.asarray(self.truth), np.asarray(self.predicted)), 1)
        return counts


@dataclass(frozen=True)
class ClassFigures:
    """Figures of a class: `precision` among the rows given its label, `recall` among the rows that have it.

    `rows` have the label, `predicted` were given it. A share of no rows is 0, as is the F1 of nothing.
    """

    label: str
    precision: float
    recall: float
    f1: float
    rows: int
    predicted: int


@dataclass(frozen=True)
class Scores:
    """Scores of a classifier's predictions on a domain.

    Attributes:
        accuracy: share of rows with the right label, and its interval over rows.
        majority: share of the most frequent label: what always giving it would reach.
        matthews: Matthews correlation (CoLA's metric in GLUE; more than two classes after Gorodkin 2004), -1 to 1; 0
            where a label is never given, or all rows have the same.
        macro_f1: unweighted mean of the F1 of the classes that some row has or was given.
        f1: F1 of the class called 1 or equivalent (MRPC's metric in GLUE); None where there are more than two such
            classes, or none is called so.
        classes: in the order of the labels.
    """

    domain: str
    accuracy: Interval
    majority: float
    matthews: float
    macro_f1: float
    f1: float | None
    classes: tuple[ClassFigures, ...]
    rows: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def score(predictions: Predictions, settings: EvaluateConfig) -> Scores:
    """Compute all figures of a model on a domain."""
    counts = predictions.confusion()
    columns = counts.diagonal().tolist(), counts.sum(axis=1).tolist(), counts.sum(axis=0).tolist()
    classes = tuple(
        ClassFigures(label, _share(right, given), _share(right, rows), _share(2 * right, rows + given), rows, given)
        for label, right, rows, given in zip(predictions.labels, *columns, strict=True)
    )
    present = [figures for figures in classes if figures.rows + figures.predicted]
    positive = [figures.f1 for figures in present if figures.label in POSITIVE] if len(present) <= 2 else []
    return Scores(
        domain=predictions.domain,
        accuracy=wilson(int(np.trace(counts)), len(predictions.truth), settings.confidence),
        majority=int(counts.sum(axis=1).max()) / int(counts.sum()),
        matthews=matthews_correlation(counts),
        macro_f1=math.fsum(figures.f1 for figures in present) / len(present),
        f1=positive[0] if positive else None,
        classes=classes,
        rows=len(predictions.truth),
    )


def difference(first: Predictions, second: Predictions, settings: EvaluateConfig) -> Interval:
    """Return the second's accuracy less the first's, paired row by row, with the interval of `paired_shares`.

    Predictions less themselves are exactly 0. Others that are right on the same rows differ by 0 too, but the number
    of rows decides how certain that is.

    Raises:
        DataError: they are not of the same rows.
    """
    if (first.domain, first.names) != (second.domain, second.names):
        raise DataError(f"predictions for {first.domain} and {second.domain} are not of the same rows")
    right = first.right
    return paired_shares(right, right if second is first else second.right, settings.confidence)


def wilson(right: int, rows: int, confidence: float) -> Interval:
    """Return a share of rows with Wilson's score interval (1927), which has a width at 0 and at 1 too."""
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share, spread = right / rows, z**2 / rows
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread**2 / 4) / (1 + spread)
    return Interval(share, max(0.0, middle - half), min(1.0, middle + half))


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def matthews_correlation(counts: Sequence[Sequence[int]] | NDArray[np.int64]) -> float:
    """Return the correlation of true and given labels, from the rows of each pair of them, `(labels, labels)`."""
    table = np.asarray(counts, np.float64)
    rows, given, total = table.sum(axis=1), table.sum(axis=0), table.sum()
    spread = (total**2 - rows @ rows) * (total**2 - given @ given)
    return float((np.trace(table) * total - rows @ given) / math.sqrt(spread)) if spread > 0 else 0.0


class LabelLoss:
    """Cross-entropy of the labels of whole rows, by a sequence classifier or a `PeftModel`: an `Objective`."""

    def __init__(self, model: Any) -> None:
        accepted = inspect.signature(without_adapter(model).forward).parameters
        self._options = {"use_cache": False} if "use_cache" in accepted else {}

    def logits(self, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return a number for each label, fp32 `(rows, labels)`."""
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        return model(**inputs, **self._options).logits.float()

    def sum(self, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Sum the loss of a batch of `Padding` in nats."""
        return F.cross_entropy(self.logits(model, batch), batch["labels"], reduction="sum")

    def scored(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Count the rows of a batch."""
        return torch.tensor(len(batch["labels"]))


def row_logits(
    model: nn.Module, examples: LabelledExamples, padding: Padding, *, batch_size: int, **options: Unpack[LoopOptions]
) -> torch.Tensor:
    """Return the logits of every row, fp32 `(rows, labels)` on the CPU; the model's mode is restored.

    Raises:
        TrainingError: a logit is not finite; the model is broken.
    """
    device = next(model.parameters()).device
    loss = LabelLoss(model)
    parts: list[torch.Tensor] = []

    def step(batch: Mapping[str, torch.Tensor]) -> int:
        parts.append(loss.logits(model, {name: tensor.to(device) for name, tensor in batch.items()}).cpu())
        return len(batch["labels"])

    batches = padding.batches(examples, batch_size)
    run_batches(model, batches, step, total=len(examples), unit="rows", **options)
    logits = torch.cat(parts)
    if not torch.isfinite(logits).all():
        raise TrainingError(
            f"{options.get('title', 'measuring')}: the logits are not finite, so the model is broken; lower the "
            "learning rate and run it anew"
        )
    return logits


def predict(
    model: nn.Module, domain: ClassifyDomain, padding: Padding, *, labels: Sequence[str] = (), **options: Any
) -> Predictions:
    """Predict the most likely label of every validation row of a domain.

    `labels` names the classifier's logits, where it knows more labels than the domain has; options are those of
    `row_logits`.
    """
    names = tuple(labels) or domain.labels
    logits = row_logits(model, domain.validation, padding, **options)
    truth = tuple(names.index(domain.labels[number]) for number in domain.validation.labels.tolist())
    return Predictions(domain.name, names, truth, tuple(logits.argmax(dim=1).tolist()))


@dataclass(frozen=True)
class ClassifierFigure:
    """A classifier on a domain; `change` is its accuracy less that of the first classifier, None for that one."""

    label: str
    scores: Scores
    change: Interval | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def is_classifier(adapter: Path) -> bool:
    """Return whether a folder holds a classifier of ours; AdapterError if it holds no adapter."""
    record = read_record(adapter)
    return record is not None and bool(record.labels)


def compare_classifiers(
    plan: Plan, adapters: Sequence[Path], *, allow_other_base: bool = False, progress: Progress | None = None
) -> list[ClassifierFigure]:
    """Classify the validation rows of the plan's domains with every adapter and its head.

    Returns:
        For each domain the adapters in the order given, labelled by their folders.

    Raises:
        ConfigError: an adapter without a head, or rows with labels that it does not know.
        AdapterError, BaseMismatchError: an adapter that is damaged or of another base.
        DataError, AssetError: a domain that cannot be read.
    """
    if not adapters:
        raise ConfigError("the base has no head of its own to classify with: name classifiers with --adapter")
    labels = adapter_labels(adapters)
    records: dict[Path, AdapterRecord] = {}
    for adapter in adapters:
        record = read_record(adapter)
        if record is None or not record.labels:
            raise ConfigError(f"{adapter} has no classification head; evaluate it on text, without --task classify")
        records[adapter] = record
    check_adapters(adapters, plan.model, plan.data, allow_other_base=allow_other_base)
    tokenizer, segments = load_tokenizer(plan.model), reads_segments(plan.model)
    domains = [
        load_classification(domain, plan.classify, tokenizer, seed=plan.data.seed, segments=segments)
        for domain in plan.data.domains
    ]
    for adapter, record in records.items():
        _check(adapter, record, domains, plan)

    def measure(label: str, adapter: Path) -> list[Predictions]:
        names, precision = records[adapter].labels, measuring_precision(plan.model, records[adapter].method)
        base = load_classifier(plan.model, names, seed=0, dtype=precision.load)
        base.check_length(plan.classify.max_length)
        model = load_adapter(base, adapter, allow_other_base=allow_other_base)
        size, padding = plan.evaluate.batch_size, Padding(base.padding)
        options: dict[str, Any] = {"batch_size": size, "mixed_precision": precision.mixed, "progress": progress}
        return [
            predict(model, domain, padding, labels=names, title=f"{label}: measuring {domain.name}", **options)
            for domain in domains
        ]

    predictions = []
    for label, adapter in zip(labels, adapters, strict=True):
        predictions.append(measure(label, adapter))
        gc.collect()  # an adapted model refers to itself
    figures = []
    for first, *others in zip(*predictions, strict=True):
        for label, own in zip(labels, (first, *others), strict=True):
            change = None if own is first else difference(first, own, plan.evaluate)
            figures.append(ClassifierFigure(label, score(own, plan.evaluate), change))
    return figures


def _check(adapter: Path, record: AdapterRecord, domains: Sequence[ClassifyDomain], plan: Plan) -> None:
    """Refuse labels that a classifier does not know, and warn where rows are cut at another length than in training."""
    for domain in domains:
        unknown = [label for label in domain.labels if label not in record.labels]
        if unknown:
            raise ConfigError(
                f"{adapter} knows the labels {', '.join(record.labels)}, but rows of domain {domain.name!r} have "
                f"{', '.join(unknown)}"
            )
    trained = record.settings.get("classify", {}).get("max_length")
    if trained is not None and trained != plan.classify.max_length:
        message = "%s was trained on rows of up to %s tokens, they are cut to %d here (classify.max_length)"
        logger.warning(message, adapter, trained, plan.classify.max_length)
