"""Saved classifiers on labelled rows: each scored, and compared row by row with the first."""

from __future__ import annotations

import gc
import inspect
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from gaintune.adapters import AdapterRecord, adapter_labels, check_adapters, load_adapter, read_record
from gaintune.config import Plan
from gaintune.data import ClassifyDomain, LabelledExamples, Padding, load_classification
from gaintune.errors import ConfigError, TrainingError
from gaintune.evaluate.batches import run_batches
from gaintune.evaluate.classification import Predictions, Scores, difference, score
from gaintune.methods import measuring_precision
from gaintune.models import load_classifier, load_tokenizer, reads_segments
from gaintune.progress import Progress
from gaintune.results import Interval


class LabelLoss:
    """Cross-entropy of the labels of whole rows: an `Objective` of training.

    Args:
        model: a sequence classifier of transformers, or a `PeftModel` around one.
    """

    def __init__(self, model: Any) -> None:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        accepted = inspect.signature(base.forward).parameters
        self._options = {"use_cache": False} if "use_cache" in accepted else {}

    def logits(self, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """One number for each label, fp32 `(rows, labels)`."""
        seen = {name: tensor for name, tensor in batch.items() if name != "labels"}
        return model(**seen, **self._options).logits.float()

    def sum(self, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Summed loss of a batch of `Padding` in nats."""
        return F.cross_entropy(self.logits(model, batch), batch["labels"], reduction="sum")

    def scored(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """How many rows a batch has."""
        return torch.tensor(len(batch["labels"]))


def row_logits(
    model: nn.Module,
    examples: LabelledExamples,
    padding: Padding,
    *,
    batch_size: int,
    mixed_precision: torch.dtype | None = None,
    title: str = "classifying",
    progress: Progress | None = None,
) -> torch.Tensor:
    """The logits of every row, fp32 `(rows, labels)` on the CPU; the model is left in the mode it was in.

    Raises:
        TrainingError: a logit is not finite; the model is broken.
    """
    device = next(model.parameters()).device
    loss = LabelLoss(model)
    found: list[torch.Tensor] = []

    def step(batch: Mapping[str, torch.Tensor]) -> int:
        found.append(loss.logits(model, {name: each.to(device) for name, each in batch.items()}).cpu())
        return len(batch["labels"])

    run_batches(
        model,
        padding.batches(examples, batch_size),
        step,
        total=len(examples),
        unit="rows",
        mixed_precision=mixed_precision,
        title=title,
        progress=progress,
    )
    logits = torch.cat(found)
    if not torch.isfinite(logits).all():
        raise TrainingError(
            f"{title}: the logits are not finite, so the model is broken; lower the learning rate and run it anew"
        )
    return logits


def predict(
    model: nn.Module, domain: ClassifyDomain, padding: Padding, *, labels: Sequence[str] = (), **options: Any
) -> Predictions:
    """The most likely label of every validation row of a domain.

    Args:
        model: the classifier.
        domain: its rows.
        padding: what fills them up.
        labels: names of the classifier's logits, where it knows more labels than the domain has.
        options: as for `row_logits`.
    """
    names = tuple(labels) or domain.labels
    logits = row_logits(model, domain.validation, padding, **options)
    truth = tuple(names.index(domain.labels[number]) for number in domain.validation.labels.tolist())
    return Predictions(domain.name, names, truth, tuple(logits.argmax(dim=1).tolist()))


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClassifierFigure:
    """One classifier on one domain; `change` is its accuracy less that of the first classifier, None for that one."""

    label: str
    scores: Scores
    change: Interval | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def is_classifier(adapter: Path) -> bool:
    """Whether a folder holds a classifier of ours; AdapterError if it holds no adapter."""
    record = read_record(adapter)
    return record is not None and bool(record.labels)


def compare_classifiers(
    plan: Plan,
    adapters: Sequence[Path],
    *,
    allow_other_base: bool = False,
    progress: Progress | None = None,
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
    records = {adapter: _record(adapter) for adapter in adapters}
    check_adapters(adapters, plan.model, plan.data, allow_other_base=allow_other_base)
    tokenizer, segments = load_tokenizer(plan.model), reads_segments(plan.model)
    domains = [
        load_classification(domain, plan.classify, tokenizer, seed=plan.data.seed, segments=segments)
        for domain in plan.data.domains
    ]
    for adapter, record in records.items():
        _check(adapter, record, domains, plan)

    def measure(label: str, adapter: Path) -> list[Predictions]:
        names, numbers = records[adapter].labels, measuring_precision(plan.model, records[adapter].method)
        base = load_classifier(plan.model, names, seed=0, dtype=numbers.load)
        base.check_length(plan.classify.max_length)
        model = load_adapter(base, adapter, allow_other_base=allow_other_base)
        return [
            predict(
                model,
                domain,
                Padding(base.padding),
                labels=names,
                batch_size=plan.evaluate.batch_size,
                mixed_precision=numbers.mixed,
                title=f"{label}: measuring {domain.name}",
                progress=progress,
            )
            for domain in domains
        ]

    found = []
    for label, adapter in zip(labels, adapters, strict=True):
        found.append(measure(label, adapter))
        gc.collect()  # an adapted model refers to itself
    return [
        ClassifierFigure(
            label,
            score(predictions[number], plan.evaluate),
            None if predictions is found[0] else difference(found[0][number], predictions[number], plan.evaluate),
        )
        for number in range(len(domains))
        for label, predictions in zip(labels, found, strict=True)
    ]


def _record(adapter: Path) -> AdapterRecord:
    record = read_record(adapter)
    if record is None or not record.labels:
        raise ConfigError(f"{adapter} has no classification head of ours; evaluate it on text, without --task classify")
    return record


def _check(adapter: Path, record: AdapterRecord, domains: Sequence[ClassifyDomain], plan: Plan) -> None:
    """Refuse labels that a classifier does not know, and say where rows are cut elsewhere than in its training."""
    for domain in domains:
        unknown = [label for label in domain.labels if label not in record.labels]
        if unknown:
            raise ConfigError(
                f"{adapter} knows the labels {', '.join(record.labels)}, but rows of domain {domain.name!r} have "
                f"{', '.join(unknown)}"
            )
    trained = record.settings.get("classify", {}).get("max_length")
    if trained is not None and trained != plan.classify.max_length:
        logger.warning(
            "%s was trained on rows of up to %s tokens, they are cut to %d here (classify.max_length)",
            adapter, trained, plan.classify.max_length,
        )  # fmt: skip
