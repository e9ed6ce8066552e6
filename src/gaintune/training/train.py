"""One adaptation on `transformers.Trainer`: our loss and parameter groups, its loop, checkpoints and trackers."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import nn
from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from transformers.trainer_callback import PrinterCallback

from gaintune.config.plan import TrainConfig
from gaintune.errors import ConfigError, TrainingError, one_line
from gaintune.models.isolation import require_isolation
from gaintune.models.loss import Objective
from gaintune.progress import Progress, Silent
from gaintune.storage.run import damage
from gaintune.training.snapshots import KeepSnapshots, Snapshots
from gaintune.training.trainer import AfterUpdate, RowTrainer, Watch
from gaintune.methods.rules import Rows, UpdateRule


@dataclass(frozen=True)
class Adaptation:
    """What an adaptation did: updates, tokens seen, loss of every update (nats per token), and its pace this time."""

    steps: int
    tokens: int
    losses: tuple[float, ...]
    seconds: float
    tokens_per_second: float


def count_updates(rows: int, plan: TrainConfig, processes: int = 1) -> int:
    """How many updates an adaptation on so many rows takes."""
    return math.ceil(rows / (plan.batch_size * plan.gradient_accumulation * processes)) * plan.epochs


def newest_checkpoint(folder: Path) -> Path | None:
    """The latest whole checkpoint in a folder; those cut short while being written are deleted."""
    whole = []
    for checkpoint in folder.glob("checkpoint-*"):
        if damage(checkpoint) is None:
            whole.append(checkpoint)
        else:
            shutil.rmtree(checkpoint)
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def train(
    model: nn.Module,
    rows: Rows,
    plan: TrainConfig,
    *,
    lr: float,
    seed: int,
    checkpoints: Path,
    objective: Objective | None = None,
    collate: Callable[[list[dict[str, torch.Tensor]]], Mapping[str, torch.Tensor]] | None = None,
    rules: Sequence[UpdateRule] = (),
    rate_multipliers: Mapping[str, float] | None = None,
    snapshots: Snapshots | None = None,
    logs: Path | None = None,
    mixed_precision: torch.dtype | None = None,
    title: str = "training",
    progress: Progress | None = None,
) -> Adaptation:
    """Train what requires a gradient, continuing from a checkpoint if there is one.

    Args:
        model: a model with an adapter attached, or one whose weights all train.
        rows: what to train on; `Examples` for a causal language model.
        plan: optimizer, schedule and batch.
        lr: peak learning rate.
        seed: seed of the order of blocks and of dropout.
        checkpoints: folder for checkpoints inside this adaptation.
        objective: the loss; next-token loss of a causal language model unless given.
        collate: rows to a batch; rows of one length are stacked unless given.
        rules: what acts on every update beside the loss, such as a penalty, in this order.
        rate_multipliers: part of a parameter's name -> factor on `lr`, as in `parameter_groups`.
        snapshots: which copies of the adapter to keep on the way; none unless given.
        logs: folder for TensorBoard's logs; beside the checkpoints unless given.
        mixed_precision: autocast dtype of a model kept in fp32, or None for the model's own numbers.
        title: what a progress bar says.
        progress: where to show it.

    Raises:
        TrainingError: a loss or gradient that is not finite, before it reaches the weights.
        ConfigError: a tracker that is not installed, nothing to train, or a model that mixes the texts of packed rows.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("nothing to train: no parameter of the model requires a gradient")
    if "position_ids" in rows[0]:
        require_isolation(model)
    if plan.gradient_checkpointing:
        base = cast(Any, model.get_base_model() if isinstance(model, PeftModel) else model)
        if hasattr(base, "activation_checkpointing_enable"):  # its name from transformers 5.20 on
            base.activation_checkpointing_enable({"use_reentrant": False})
        else:
            base.gradient_checkpointing_enable({"use_reentrant": False})
    device = next(model.parameters()).device
    arguments = _arguments(plan, lr=lr, seed=seed, folder=checkpoints, device=device, mixed_precision=mixed_precision)
    trackers = _trackers(plan.trackers, logs or checkpoints.parent / "tensorboard")
    kept = [KeepSnapshots(model, snapshots)] if snapshots else []
    trainer = RowTrainer(
        plan=plan,
        objective=objective,
        rules=rules,
        rate_multipliers=rate_multipliers,
        model=model,
        args=arguments,
        train_dataset=cast(Dataset, rows),
        data_collator=collate,
        callbacks=[*trackers, AfterUpdate(model, rules), *kept],
    )
    trainer.remove_callback(PrinterCallback)
    steps = count_updates(len(rows), plan, arguments.world_size)
    total = rows.tokens * plan.epochs
    resume = newest_checkpoint(checkpoints)
    done = total * int(resume.name.rpartition("-")[2]) // steps if resume else 0
    for rule in rules:
        rule.start(model, steps)
        if resume:
            rule.load(resume)
    with (progress or Silent()).task(title, max(total - done, 0), "tokens") as advance:
        trainer.add_callback(Watch(advance, total / steps))
        start = time.perf_counter()
        try:
            trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        except torch.OutOfMemoryError:
            raise TrainingError(
                "out of device memory: lower train.batch_size (and raise train.gradient_accumulation to match), or set "
                "train.gradient_checkpointing=true; finished work is kept"
            ) from None
        seconds = time.perf_counter() - start
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # its forward stays under autocast otherwise
    losses = tuple(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    return Adaptation(trainer.state.global_step, total, losses, seconds, max(total - done, 0) / seconds)


def _trackers(names: Sequence[str], logs: Path) -> list[TrainerCallback]:
    """Callbacks of the trackers named; TensorBoard writes into `logs`."""
    callbacks: list[TrainerCallback] = []
    for name in names:
        try:
            (callback,) = get_reporting_integration_callbacks([name])
            if name == "tensorboard":
                from torch.utils.tensorboard import SummaryWriter

                callbacks.append(callback(tb_writer=SummaryWriter(str(logs))))
            else:
                callbacks.append(callback())
        except (ValueError, ImportError, RuntimeError) as error:
            raise ConfigError(f"train.trackers: {name!r} cannot be used ({one_line(error)})") from None
    return callbacks


def _arguments(
    plan: TrainConfig,
    *,
    lr: float,
    seed: int,
    folder: Path,
    device: torch.device,
    mixed_precision: torch.dtype | None,
) -> TrainingArguments:
    """The plan in the words of `transformers`."""
    settings: Mapping[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": plan.batch_size,
        "gradient_accumulation_steps": plan.gradient_accumulation,
        "num_train_epochs": plan.epochs,
        "learning_rate": lr,
        "weight_decay": plan.weight_decay,
        "adam_beta1": plan.betas[0],
        "adam_beta2": plan.betas[1],
        "max_grad_norm": plan.clip,
        "seed": seed,
        "data_seed": seed,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": plan.checkpoint_steps,
        "save_total_limit": 2,
        "report_to": "none",  # trackers are handed over as callbacks
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "use_cpu": device.type == "cpu",
        "dataloader_pin_memory": device.type == "cuda",
        "bf16": mixed_precision is torch.bfloat16,
        "fp16": mixed_precision is torch.float16,
    }
    arguments = TrainingArguments(**settings)
    if arguments.device.type == "cuda":
        if arguments.world_size == 1 and device != arguments.device:
            raise ConfigError(f"training runs on the first visible device: set CUDA_VISIBLE_DEVICES, not {device}")
        arguments._n_gpu = 1  # several devices are for `accelerate launch`; never replicas in threads
    return arguments
