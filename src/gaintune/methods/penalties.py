"""Penalties on moving away from what earlier domains taught: L2, and EWC with a diagonal Fisher estimate.

Both add the gradient of `strength / 2 * sum_i w_i (theta_i - theta*_i)^2`, theta* being the weights after the previous
domain: w_i = 1 for L2, and the Fisher information of the earlier domains for elastic weight consolidation
(Kirkpatrick et al., 2017; accumulated over domains as in online EWC, Schwarz et al., 2018). The first domain has none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from gaintune.config import MethodConfig
from gaintune.errors import ConfigError, DivergedError
from gaintune.methods.rules import StageData, StagePosition, TrainingRule, process_share
from gaintune.models import autocast

FISHER = "penalty.safetensors"  # beside an adapter: the Fisher information of its domains
STRENGTHS = {"l2": 0.01, "ewc": 1.0}  # unless a plan gives penalty_strength


def fisher_information(
    model: nn.Module, stage_data: StageData, *, rows: int | None = None, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Average over rows `(d log p(row) / d theta_i)^2 / scored items of the row`, for every trained weight.

    Dividing by the scored items (tokens) puts it in units per token, as the loss that training minimizes: over rows of
    one length, N tokens times this is the curvature of their log-likelihood at its maximum (Kirkpatrick et al., 2017,
    section 2.1). Rows go through one at a time, in the model's own precision and without dropout; of several processes
    each takes its share.

    Args:
        model: the model at the end of the adaptation; left in the mode it was in, its gradients untouched.
        stage_data: rows and loss.
        rows: how many rows to take, drawn by `seed`; all unless given.

    Returns:
        Parameter's name -> fp32 tensor of its shape, the same in every process.
    """
    total = len(stage_data.rows)
    picked = sorted(torch.randperm(total, generator=torch.Generator().manual_seed(seed)).tolist()[:rows])
    trained = _trained(model)
    weights = list(trained.values())
    fisher = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
    first, step = process_share()
    tokens = stage_data.rows.tokens * len(picked) / max(total, 1)
    training = model.training
    model.eval()
    try:
        with stage_data.progress.task(stage_data.title, round(tokens), "tokens") as advance:
            for row in picked[first::step]:
                batch = stage_data.batch(row, weights[0].device)
                with autocast(weights[0].device, stage_data.mixed_precision):
                    loss = stage_data.objective.sum(model, batch)
                gradients = torch.autograd.grad(loss, weights, allow_unused=True)
                per_item = 1.0 / max(int(stage_data.objective.scored(batch)), 1)
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


def strength_of(method: MethodConfig) -> float:
    """Return the strength of a method's penalty: its own, else the penalty's default; 0 without a penalty."""
    if method.penalty is None:
        return 0.0
    return STRENGTHS[method.penalty] if method.penalty_strength is None else method.penalty_strength


def penalty_of(method: MethodConfig, position: StagePosition, *, seed: int) -> TrainingRule | None:
    """Make the rule of a method's penalty, None where it has none or of strength 0.

    Args:
        method: what is configured.
        position: where the adaptation stands.
        seed: seed of the choice of rows for the Fisher information.

    Raises:
        ConfigError: the adapter to continue was not trained with EWC, so that nothing is known of its domains.
    """
    strength = strength_of(method)
    if strength == 0:
        return None
    if method.penalty == "l2":
        return L2(strength, position)
    return Ewc(strength, position, rows=method.ewc_rows, seed=seed)


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def _shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in tensors.items()}


class L2(TrainingRule):
    """Pull on every trained weight alike; needs a copy of the trained weights in memory."""

    copies = 1

    def __init__(self, strength: float, position: StagePosition) -> None:
        self._strength = strength
        self._pulls = position.previous is not None
        self._anchor: dict[str, torch.Tensor] = {}
        # room for distances: to allocate it at every update would take most of the penalty's time
        self._scratch: dict[tuple[torch.dtype, torch.device], torch.Tensor] = {}

    def start(self, model: nn.Module, steps: int) -> None:
        """Remember the weights at the end of the previous domain."""
        if self._pulls:
            trained = _trained(model)
            self._anchor = {name: value.detach().clone() for name, value in trained.items()}
            by_size = sorted(trained.values(), key=torch.Tensor.numel)
            largest = {(value.dtype, value.device): value for value in by_size}
            self._scratch = {kind: torch.empty_like(value).flatten() for kind, value in largest.items()}

    @torch.no_grad()
    def before_update(self, model: nn.Module, step: int) -> None:
        """Add the penalty's gradient."""
        if not self._pulls:
            return
        for name, value in _trained(model).items():
            room = self._scratch[value.dtype, value.device][: value.numel()].view_as(value)
            distance = torch.sub(value, self._anchor[name], out=room)
            if value.grad is None:
                value.grad = torch.zeros_like(value)
            self._add_pull(value.grad, name, distance)

    def _add_pull(self, gradient: torch.Tensor, name: str, distance: torch.Tensor) -> None:
        gradient.add_(distance, alpha=self._strength)


class Ewc(L2):
    """Pull by the Fisher information of the earlier domains, which lies beside the adapter as penalty.safetensors.

    It needs that and the weights in memory, and a pass over the domain after it is trained. At strength 1 every earlier
    domain weighs as the Laplace approximation of as many of its tokens as the new domain has.
    """

    def __init__(self, strength: float, position: StagePosition, *, rows: int | None, seed: int) -> None:
        super().__init__(strength, position)
        self._rows = rows
        self._seed = seed
        self._origin = None if position.previous is None else position.previous / FISHER
        if self._origin is not None and not self._origin.is_file():
            raise ConfigError(
                f"{self._origin.parent} has no {FISHER}: it was not trained with penalty=ewc, so the Fisher "
                "information of its domains is not known. Train them with penalty=ewc too, or use penalty=l2"
            )
        self._fisher: dict[str, torch.Tensor] = {}

    def start(self, model: nn.Module, steps: int) -> None:
        """Read the information of the earlier domains, beside remembering the weights."""
        super().start(model, steps)
        if self._origin is None:
            return
        trained, saved = _trained(model), load_file(self._origin)
        if _shapes(trained) != _shapes(saved):
            raise ConfigError(f"{self._origin} is about other parameters than those that train now")
        self._fisher = {name: value.to(trained[name].device) for name, value in saved.items()}

    def _add_pull(self, gradient: torch.Tensor, name: str, distance: torch.Tensor) -> None:
        gradient.addcmul_(distance, self._fisher[name], value=self._strength)

    def finish(self, model: nn.Module, stage_data: StageData) -> None:
        """Add the information of the domain just trained."""
        found = fisher_information(model, stage_data, rows=self._rows, seed=self._seed)
        for name, value in found.items():
            if not math.isfinite(float(value.sum())):
                raise DivergedError(f"{stage_data.title}: the Fisher information of {name} is not finite")
            self._fisher[name] = value.add_(self._fisher[name]) if name in self._fisher else value

    def keep(self, folder: Path) -> None:
        """Write the information of all domains so far."""
        tensors: dict[str, Any] = {name: value.cpu().contiguous() for name, value in self._fisher.items()}
        save_file(tensors, folder / FISHER)
