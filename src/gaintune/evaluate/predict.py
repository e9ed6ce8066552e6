"""What a classifier says of labelled rows, and the loss it is trained with."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from gaintune.data.classify import ClassifyDomain, LabelledExamples, Padding
from gaintune.errors import TrainingError
from gaintune.evaluate.classification import Predictions
from gaintune.evaluate.perplexity import autocast
from gaintune.progress import Progress, Silent


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
    training = model.training
    model.eval()
    found: list[torch.Tensor] = []
    try:
        with (
            torch.inference_mode(),
            autocast(device, mixed_precision),
            (progress or Silent()).task(title, len(examples), "rows") as advance,
        ):
            for batch in padding.batches(examples, batch_size):
                found.append(loss.logits(model, {name: each.to(device) for name, each in batch.items()}).cpu())
                advance(len(batch["labels"]))
    finally:
        model.train(training)
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
