"""The one loop over batches that every measurement of a model runs in."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import nn

from gaintune.progress import Progress, Silent

Batch = TypeVar("Batch")


def autocast(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager:
    """Return mixed precision in `dtype`, or a context that does nothing where `dtype` is None."""
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def run_batches(
    model: nn.Module,
    batches: Iterable[Batch],
    step: Callable[[Batch], int],
    *,
    total: int,
    unit: str = "tokens",
    mixed_precision: torch.dtype | None = None,
    title: str,
    progress: Progress | None = None,
) -> None:
    """Call `step` on every batch, in evaluation and inference mode; the model is left in the mode it was in.

    Args:
        model: the model that `step` measures.
        batches: what `step` takes, one after the other.
        step: measures one batch, and returns how many of `unit` it held.
        total: how many of `unit` all batches hold.
        unit: what the progress bar counts.
        mixed_precision: autocast dtype of a model kept in fp32, or None for the model's own precision.
        title: what a progress bar says.
        progress: where to show it.
    """
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        with (
            torch.inference_mode(),
            autocast(device, mixed_precision),
            (progress or Silent()).task(title, total, unit) as advance,
        ):
            for batch in batches:
                advance(step(batch))
    finally:
        model.train(training)
