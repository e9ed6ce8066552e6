"""AdaLoRA in training: its budget driven at every update, its orthogonality term, and both exact after a stop.

Zhang et al., "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning" (ICLR 2023). The budget falls over a
whole sequence of adaptations, by PEFT's allocator. PEFT adds the orthogonality term to a loss that the model returns;
here the loss is computed from hidden states, so the term's gradient is added instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from gaintune.errors import ConfigError
from gaintune.config.sections import MethodConfig
from gaintune.methods.rules import Place, StageRule

STATE = "adalora.safetensors"
ORTHOGONALITY = 0.1
WARM_UP, FINAL, ALLOCATIONS = 0.1, 0.3, 100


class BudgetSchedule(StageRule):
    """Drives PEFT's rank allocator over the updates of a sequence.

    The full rank trains for the first tenth of all updates; then the budget falls (by a cubic) to the average rank
    that was asked for, at most a hundred times; in the last three tenths it stays. These shares and the weight of the
    orthogonality term (0.1; PEFT's 0.5 drowned the loss in the experience of the DISeL paper, appendix on AdaLoRA) are
    ours: the papers' values for budgets of this size are not known.

    An adapter on disk keeps its full shape, with zeros for the singular values that are pruned: it computes the same
    wherever it is loaded, and can be carried on. What the allocator remembers lies beside it.

    Args:
        config: the method; `orthogonality` is heeded here.
        place: where this adaptation stands. A single one has a schedule of its own, whatever it carries on.
    """

    def __init__(self, config: MethodConfig, place: Place) -> None:
        self._weight = ORTHOGONALITY if config.orthogonality is None else config.orthogonality
        self._place = place
        self._kept: dict[str, list[bool]] | None = None
        self._tuner: Any = None

    def start(self, model: nn.Module, steps: int) -> None:
        """Set the schedule, and take the allocator's state of the stage before."""
        self._tuner = model.base_model
        config = self._config
        total = self._place.total or steps
        if total < 2:
            raise ConfigError("adalora needs at least two updates: give more text or train.epochs, or smaller batches")
        config.total_step, config.tinit, config.tfinal = total, int(WARM_UP * total), max(1, round(FINAL * total))
        config.deltaT = max(1, total // ALLOCATIONS)
        self._tuner.rankallocator.reset_ipt()
        if self._place.first and self._place.previous is not None:
            self.load(self._place.previous)

    @torch.no_grad()
    def before_update(self, model: nn.Module, step: int) -> None:
        """Add the gradient of PEFT's term: weight times the mean of ||P P^T - I||_F, P being every A and B^T."""
        if self._weight == 0:
            return
        directions = list(self._directions())
        for is_a, value in directions:
            rows = value if is_a else value.T
            excess = rows @ rows.T
            excess.diagonal().sub_(1.0)
            size = torch.linalg.matrix_norm(excess)
            pull = (
                excess.mul_(2.0 * self._weight / len(directions) / size.clamp_min(torch.finfo(size.dtype).tiny)) @ rows
            )
            pull = pull if is_a else pull.T
            value.grad = pull.contiguous() if value.grad is None else value.grad.add_(pull)

    def after_update(self, model: nn.Module, step: int) -> None:
        """Measure what every direction is worth, and allocate the budget of this update."""
        config = self._config
        config.rank_pattern = self._kept
        self._tuner.update_and_allocate(self._place.first + step)
        # PEFT would cut the saved matrices down by it, and then not load them into the model that goes on training
        self._kept, config.rank_pattern = config.rank_pattern, None

    def save(self, folder: Path) -> None:
        """Write the two running averages of the importance, and which directions are kept."""
        allocator = self._tuner.rankallocator
        state = {f"importance/{name}": value for name, value in allocator.exp_avg_ipt.items()}
        state |= {f"uncertainty/{name}": value for name, value in allocator.exp_avg_unc.items()}
        state |= {f"kept/{name}": torch.tensor(kept) for name, kept in (self._kept or {}).items()}
        save_file({name: value.cpu().contiguous() for name, value in state.items()}, folder / STATE)

    def load(self, folder: Path) -> None:
        """Take the allocator's state back."""
        if not (folder / STATE).is_file():
            raise ConfigError(f"{folder} has no {STATE}, without which AdaLoRA's budget cannot be continued")
        allocator = self._tuner.rankallocator
        devices = {name: value.device for name, value in self._tuner.model.named_parameters()}
        parts: dict[str, dict[str, torch.Tensor]] = {"importance": {}, "uncertainty": {}, "kept": {}}
        for key, value in load_file(folder / STATE).items():
            part, _, name = key.partition("/")
            parts[part][name] = value if part == "kept" else value.to(devices[name])
        allocator.exp_avg_ipt, allocator.exp_avg_unc = parts["importance"], parts["uncertainty"]
        allocator.ipt = {name: torch.zeros_like(value) for name, value in parts["importance"].items()}
        self._kept = {name: value.tolist() for name, value in parts["kept"].items()} or None

    def keep(self, folder: Path) -> None:
        """The same state goes with the adapter."""
        self.save(folder)

    @property
    def _config(self) -> Any:
        return self._tuner.peft_config[self._tuner.trainable_adapter_name]

    def _directions(self) -> Iterator[tuple[bool, nn.Parameter]]:
        """Every A `(rank, in)` and B `(out, rank)`, and whether it is an A."""
        adapter = self._tuner.trainable_adapter_name
        for name, value in self._tuner.model.named_parameters():
            if name.endswith((f"lora_A.{adapter}", f"lora_B.{adapter}")):
                yield "lora_A" in name, value
