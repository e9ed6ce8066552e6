"""The diagonal of the empirical Fisher information: how much each weight matters to the rows of a domain."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn

from gaintune.methods.rules import Lesson


def fisher_information(
    model: nn.Module, lesson: Lesson, *, rows: int | None = None, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Mean over rows of `(d log p(row) / d theta_i)^2 / scored items of the row`, for every trained weight.

    Dividing by the scored items (tokens) puts it in units per token, as the loss that training minimises: over rows of
    one length, N tokens times this is the curvature of their log-likelihood at its maximum (Kirkpatrick et al., 2017,
    section 2.1). Rows go through one at a time, in the model's own numbers and without dropout; of several processes
    each takes its share.

    Args:
        model: the model at the end of the adaptation; left in the mode it was in, its gradients untouched.
        lesson: rows and loss.
        rows: how many rows to take, drawn by `seed`; all unless given.

    Returns:
        Parameter's name -> fp32 tensor of its shape, the same in every process.
    """
    total = len(lesson.rows)
    drawn = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).tolist()
    picked = sorted(drawn[:rows])
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    weights = list(trained.values())
    fisher = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
    first, step = _share()
    tokens = lesson.rows.tokens * len(picked) / max(total, 1)
    training = model.training
    model.eval()
    try:
        with lesson.progress.task(lesson.title, round(tokens), "tokens") as advance:
            for row in picked[first::step]:
                batch = _batch(lesson, row, weights[0].device)
                with _autocast(weights[0].device, lesson.mixed_precision):
                    loss = lesson.objective.sum(model, batch)
                gradients = torch.autograd.grad(loss, weights, allow_unused=True)
                per_item = 1.0 / max(int(lesson.objective.scored(batch)), 1)
                for sum_, gradient in zip(fisher, gradients, strict=True):
                    if gradient is not None:
                        sum_.addcmul_(gradient.float(), gradient.float(), value=per_item)
                advance(tokens / len(picked) * step)
    finally:
        model.train(training)
    if step > 1:
        for sum_ in fisher:
            torch.distributed.all_reduce(sum_)
    return {name: sum_.div_(len(picked)) for name, sum_ in zip(trained, fisher, strict=True)}


def _share() -> tuple[int, int]:
    """Number of this process and of all, of those that work on one run."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def _batch(lesson: Lesson, row: int, device: torch.device) -> dict[str, Any]:
    """One row as a batch."""
    picked = lesson.rows[row]
    if lesson.collate is not None:
        batch = dict(lesson.collate([picked]))
    else:
        batch = {name: tensor.unsqueeze(0) for name, tensor in picked.items()}
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def _autocast(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)
