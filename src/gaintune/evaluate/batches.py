"""The loop over batches that every measurement of a model runs in."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypedDict, TypeVar

import torch
from torch import nn

from gaintune.models import autocast
from gaintune.progress import Progress, Silent

Batch = TypeVar("Batch")


class LoopOptions(TypedDict, total=False):
    """Options of `run_batches` that measurements hand on."""

    mixed_precision: torch.dtype | None
    title: str
    progress: Progress | None


def run_batches(
    model: nn.Module,
    batches: Iterable[Batch],
    step: Callable[[Batch], int],
    *,
    total: int,
    unit: str = "tokens",
    mixed_precision: torch.dtype | None = None,
    title: str = "measuring",
    progress: Progress | None = None,
) -> None:
    """Call `step` on every batch in evaluation and inference mode, and restore the model's mode.

    Args:
        model: the model that `step` measures.
        batches: the arguments of `step`.
        step: measures a batch, and returns how many of `unit` it held.
        total: how many of `unit` all batches hold.
        unit: what the progress bar counts.
        mixed_precision: autocast dtype of a model kept in fp32, or None for the model's own precision.
        title: title of the progress bar, if there is a `progress` to show it.
    """
    training = model.training
    model.eval()
    bar = (progress or Silent()).task(title, total, unit)
    try:
        with torch.inference_mode(), autocast(next(model.parameters()).device, mixed_precision), bar as advance:
            for batch in batches:
                advance(step(batch))
    finally:
        model.train(training)
