"""`transformers.Trainer` with our loss, parameter groups and schedule, and safetensors-only checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import nn
from transformers import Trainer, TrainerCallback

from gaintune.config.plan import TrainConfig
from gaintune.errors import DivergedError
from gaintune.models.loss import NextTokenLoss, Objective
from gaintune.progress import Advance
from gaintune.storage.run import write_manifest
from gaintune.tuners.optim import parameter_groups
from gaintune.methods.rules import UpdateRule


def schedule_factor(step: int, *, steps: int, warmup: int, cosine: bool) -> float:
    """Share of the peak rate at update `step` (from 0). The warm-up's first update already moves: 1 / (warmup + 1)."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if not cosine:
        return 1.0
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


class RowTrainer(Trainer):
    """`Trainer` with our loss and groups, update rules before clipping, and a stop before a non-finite update."""

    def __init__(
        self,
        *,
        plan: TrainConfig,
        objective: Objective | None,
        rules: Sequence[UpdateRule],
        rate_multipliers: Mapping[str, float] | None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._plan = plan
        self._rules = rules
        self._rate_multipliers = rate_multipliers
        self._minimised: Objective = objective or NextTokenLoss(self.accelerator.unwrap_model(self.model))
        self.model_accepts_loss_kwargs = True  # the loss is a sum divided by the items of the whole update

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        total = self._minimised.sum(model, inputs)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            total = total * self.accelerator.num_processes
        scored = self._minimised.scored(inputs) if num_items_in_batch is None else num_items_in_batch
        loss = total / scored
        self._require_finite(loss, "loss")
        return loss

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        if not batch_samples:
            return None
        items = torch.stack([self._minimised.scored(batch) for batch in batch_samples]).sum().to(device)
        if not self.args.average_tokens_across_devices:
            return items
        return cast(torch.Tensor, self.accelerator.gather(items)).sum()

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        if self._rules:
            self.accelerator.unscale_gradients()
        for rule in self._rules:
            rule.before_update(self.accelerator.unwrap_model(model), self.state.global_step)
        norm = super()._clip_grad_norm(model)
        self._require_finite(norm, "gradient")
        return norm

    def _require_finite(self, value: Any, what: str) -> None:
        number = float(value.detach() if isinstance(value, torch.Tensor) else value)
        if not math.isfinite(number):
            raise DivergedError(
                f"the {what} is {number} at step {self.state.global_step + 1} of {self.state.max_steps}; stopped "
                "before the update. Lower the learning rate (train.lr), or train in fp32 (model.dtype=fp32); finished "
                "work is kept"
            )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            groups = parameter_groups(
                cast(nn.Module, model or self.model),
                lr=self.args.learning_rate,
                weight_decay=self.args.weight_decay,
                rate_multipliers=self._rate_multipliers,
            )
            betas = (self.args.adam_beta1, self.args.adam_beta2)
            self.optimizer = torch.optim.AdamW(groups, lr=self.args.learning_rate, betas=betas)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        if self.lr_scheduler is None:
            factor = partial(
                schedule_factor,
                steps=num_training_steps,
                warmup=math.ceil(num_training_steps * self._plan.warmup_ratio),
                cosine=self._plan.schedule == "cosine",
            )
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, factor)
        return self.lr_scheduler

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or cast(str, self.args.output_dir))
        model = self.accelerator.unwrap_model(self.model)
        if isinstance(model, PeftModel) and self.args.should_save:
            # embeddings are frozen; left to itself PEFT asks the hub about the base to find out
            model.save_pretrained(str(folder), state_dict=state_dict, save_embedding_layers=False)
            return
        super()._save(output_dir, state_dict)
        if self.args.should_save:  # a pickle of settings that the plan already holds
            (folder / "training_args.bin").unlink(missing_ok=True)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = Path(cast(str, self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
            for rule in self._rules:
                rule.save(folder)
            write_manifest(folder)


class Watch(TrainerCallback):
    """Tells a progress bar of every update."""

    def __init__(self, advance: Advance, tokens_per_step: float) -> None:
        self._advance = advance
        self._tokens = tokens_per_step

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self._advance(self._tokens, loss=logs["loss"])


class AfterUpdate(TrainerCallback):
    """Calls the rules once the weights have moved."""

    def __init__(self, model: nn.Module, rules: Sequence[UpdateRule]) -> None:
        self._model = model
        self._rules = rules

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for rule in self._rules:
            rule.after_update(self._model, state.global_step)
