"""One adaptation on `transformers.Trainer`: loss, parameter groups, checkpoints, trackers and snapshots."""

from __future__ import annotations

import logging
import math
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from transformers.trainer_callback import PrinterCallback

from gaintune.adapters import AdapterRecord, save_adapter
from gaintune.config import TrainConfig
from gaintune.errors import AdapterError, ConfigError, DivergedError, TrainingError, one_line
from gaintune.methods import PreparedMethod, Rows, StageData, StagePosition, TrainingRule, rules_of
from gaintune.models import NextTokenLoss, Objective, require_rows
from gaintune.progress import Advance, Progress, Silent
from gaintune.storage import check_replaceable, damage, discard_whole, first_process, process_count, write_manifest
from gaintune.tuners import AdapterOptimizerMixin

logger = logging.getLogger(__name__)

CHECKPOINT = re.compile(r"checkpoint-(\d+)")
STEP = re.compile(r"step-(\d+)")


def schedule_factor(step: int, *, steps: int, warmup: int, cosine: bool) -> float:
    """Return the share of the peak rate at update `step` (from 0); warm-up begins at 1 / (warmup + 1)."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if not cosine:
        return 1.0
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


class RowTrainer(AdapterOptimizerMixin, Trainer):
    """`Trainer` with an `Objective`, parameter groups, rules before clipping, and a stop before a non-finite update.

    With `in_order` it takes the rows in their own order, else in one that the plan's seed draws for each epoch.
    """

    def __init__(
        self,
        *,
        plan: TrainConfig,
        in_order: bool,
        objective: Objective | None,
        rules: Sequence[TrainingRule],
        rate_multipliers: Mapping[str, float] | None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._plan = plan
        self._in_order = in_order
        self._rules = rules
        self.rate_multipliers = rate_multipliers
        self._objective: Objective = objective or NextTokenLoss(self.accelerator.unwrap_model(self.model))
        self.model_accepts_loss_kwargs = True  # the loss is a sum divided by the items of the whole update

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        total = self._objective.sum(model, inputs)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            total = total * self.accelerator.num_processes
        loss = total / (self._objective.scored(inputs) if num_items_in_batch is None else num_items_in_batch)
        self._require_finite(loss, "loss")
        return loss

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        if not batch_samples:
            return None
        items = torch.stack([self._objective.scored(batch) for batch in batch_samples]).sum().to(device)
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

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self._in_order:
            return SequentialSampler(cast(Any, self.train_dataset))
        return super()._get_train_sampler(train_dataset)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        if self.lr_scheduler is None:
            factor = partial(
                schedule_factor,
                steps=num_training_steps,
                warmup=math.ceil(num_training_steps * self._plan.warmup_ratio),
                cosine=self._plan.schedule == "cosine",
            )
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(cast(Any, optimizer or self.optimizer), factor)
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


@dataclass(eq=False)
class StageCallback(TrainerCallback):
    """Callback: progress after each log, rules after each update, and snapshots in the process that writes them.

    `stops` maps a number of updates to the adapters to save then, each a folder and a record.
    """

    model: nn.Module
    rules: Sequence[TrainingRule]
    snapshots: Snapshots | None
    stops: Mapping[int, Sequence[tuple[Path, AdapterRecord]]]
    advance: Advance
    tokens_per_step: float

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for entry in self.snapshots.folder.glob("step-*") if self.snapshots else ():
            if _step(entry) > state.global_step:  # a copy of a later update, which is computed again
                discard_whole(entry)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for rule in self.rules:
            rule.after_update(self.model, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kept, step, steps = self.snapshots, state.global_step, state.max_steps
        if kept and (step % kept.every == 0 or step == steps):
            settings = {**kept.record.settings, "snapshot": {"step": step, "steps": steps}}
            save_adapter(self.model, kept.folder / f"step-{step:06d}", replace(kept.record, settings=settings))
        for folder, record in self.stops.get(step, ()):
            save_adapter(self.model, folder, record, keep=partial(_keep, self.rules))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.advance(self.tokens_per_step, loss=logs["loss"])


@dataclass(frozen=True)
class Snapshots:
    """Schedule of copies of an adapter during training: `every` so many updates, and after the last one.

    They are `folder/step-000050` and so on. A copy has the finished adapter's `record`, and says in
    `settings["snapshot"]` after how many updates it was made.
    """

    folder: Path
    every: int
    record: AdapterRecord


def check_snapshots(unfinished: Path, finished: Path) -> None:
    """Refuse to put copies of one adapter beside those of another, or beside anything else.

    The copies are in `unfinished` during training, and move to `finished` just before their adapter is written. Raises
    ConfigError, AdapterError or RunDirectoryError where `finished` holds what no run of this adapter wrote.
    """
    if finished.exists() and (unfinished.exists() or not unfinished.parent.exists()):
        raise ConfigError(f"{finished} exists already, from an adapter that is gone; delete it, or name another folder")
    for entry in finished.glob("*"):  # from a run that stopped after the move, which takes them back when it continues
        _step(entry)
        check_replaceable(entry)


def snapshots_of(adapter: str | Path) -> dict[int, Path]:
    """Find the copies kept of an adapter, by the number of updates after which each was made.

    `adapter` is its folder (of `gaintune adapt`, or of a stage of a run), or the folder of the copies. AdapterError if
    there is no such folder, or if no copies were kept.
    """
    adapter = Path(adapter)
    if not adapter.is_dir():
        raise AdapterError(f"{adapter}: no such adapter folder")
    folders = [adapter, adapter.with_name(f"{adapter.name}.snapshots")]
    if adapter.name == "adapter":
        folders.append(adapter.with_name("snapshots"))
    for folder in folders:
        if copies := {_step(entry): entry for entry in folder.glob("step-*") if entry.is_dir()}:
            return dict(sorted(copies.items()))
    raise AdapterError(
        f"{adapter}: no snapshots of it were kept; adapt with --set train.snapshot_steps=N, and it keeps one every N "
        f"updates in {folders[-1].name}"
    )


def _step(entry: Path) -> int:
    """Read the number of updates from a copy's name, such as 50 from step-000050."""
    name = STEP.fullmatch(entry.name)
    if name is None:
        raise AdapterError(f"{entry}: not a snapshot's name, such as step-000050; move it elsewhere")
    return int(name[1])


@dataclass(frozen=True)
class TrainedStage:
    """Outcome of one adaptation: updates, tokens seen, loss of every update (nats per token), and pace.

    `seconds` and `tokens_per_second` are of this process; `rules` may have something to keep with the adapter.
    """

    steps: int
    tokens: int
    losses: tuple[float, ...]
    seconds: float
    tokens_per_second: float
    rules: tuple[TrainingRule, ...] = ()

    def keep(self, folder: Path) -> None:
        """Write what the next adaptation needs; passed to `save_adapter`."""
        _keep(self.rules, folder)


def _keep(rules: Sequence[TrainingRule], folder: Path) -> None:
    for rule in rules:
        rule.keep(folder)


def count_updates(rows: int, plan: TrainConfig, processes: int = 1) -> int:
    """Count the updates of an adaptation on so many rows."""
    return math.ceil(rows / plan.rows_per_update(processes)) * plan.epochs


def checkpoint_activations(model: nn.Module, **options: Any) -> None:
    """Have a model's layers recompute their activations in the backward pass; `options` are torch's own."""
    base = cast(Any, model.get_base_model() if isinstance(model, PeftModel) else model)
    new_name = hasattr(base, "activation_checkpointing_enable")  # from transformers 5.20 on
    enable = base.activation_checkpointing_enable if new_name else base.gradient_checkpointing_enable
    enable({"use_reentrant": False, **options})


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the latest complete checkpoint in a folder; delete damaged ones, with one warning that says why.

    Of several processes on one run, the first warns and deletes.
    """
    names = ((CHECKPOINT.fullmatch(entry.name), entry) for entry in folder.glob("*") if entry.is_dir())
    problems = {entry: damage(entry) for _, entry in sorted((int(name[1]), entry) for name, entry in names if name)}
    newest = next((checkpoint for checkpoint in reversed(problems) if problems[checkpoint] is None), None)
    broken = {checkpoint: problem for checkpoint, problem in problems.items() if problem is not None}
    if broken and first_process():
        next_step = f"training continues from {newest.name}" if newest else "training starts again"
        logger.warning("%s; it is deleted, and %s", "; ".join(broken.values()), next_step)
        for checkpoint in broken:  # else it would count as one of the newest two, which are kept
            shutil.rmtree(checkpoint)
    return newest


def train_stage(
    model: nn.Module,
    method: PreparedMethod,
    rows: Rows,
    plan: TrainConfig,
    position: StagePosition,
    *,
    checkpoints: Path,
    own_rows: Rows | None = None,
    objective: Objective | None = None,
    collate: Callable[[list[dict[str, torch.Tensor]]], Mapping[str, Any]] | None = None,
    head_rates: Mapping[str, float] | None = None,
    snapshots: Snapshots | None = None,
    stops: Mapping[int, Sequence[tuple[Path, AdapterRecord]]] | None = None,
    in_order: bool = False,
    logs: Path | None = None,
    title: str = "training",
    progress: Progress | None = None,
) -> TrainedStage:
    """Train the parameters that require a gradient, from the newest checkpoint if there is one.

    Args:
        model: a model that `attach` made or `load_adapter` opened for training.
        method: its method, which gives rates, rules and penalty.
        rows: training rows, with replayed rows among them; `Examples` for a causal language model.
        plan: optimizer, schedule, batch and seed (of the order of rows and of dropout).
        position: position of this adaptation in its sequence.
        checkpoints: folder for checkpoints inside this adaptation.
        own_rows: the domain's own rows, from which EWC computes its information; default: `rows`.
        objective: the loss; default: next-token loss of a causal language model.
        collate: function from rows to a batch; default: stack rows of one length.
        head_rates: factors on the rate for the parts of a new head, beside the method's own.
        snapshots: which copies of the adapter to keep during training.
        stops: adapters to save during training, each a folder and a record, by the number of updates before them.
        in_order: whether the rows are trained on in their own order.
        logs: folder for TensorBoard's logs; default: beside the checkpoints.

    Raises:
        TrainingError: a loss or gradient that is not finite, before it reaches the weights.
        ConfigError: a tracker that is not installed, nothing to train, rows longer than the model takes or whose texts
            it mixes, or something that the method's rules need and the adapter to continue lacks.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("nothing to train: no parameter of the model requires a gradient")
    first = rows[0]
    require_rows(model, len(first["input_ids"]), packed="position_ids" in first)
    if plan.gradient_checkpointing:
        checkpoint_activations(model)
    shown, mixed = progress or Silent(), method.precision.mixed
    rules = rules_of(method, position, seed=plan.seed)
    device = next(model.parameters()).device
    arguments = _arguments(plan, method.lr, checkpoints, device, mixed)
    trainer = RowTrainer(
        plan=plan,
        in_order=in_order,
        objective=objective,
        rules=rules,
        rate_multipliers={**(head_rates or {}), **method.rate_multipliers},
        model=model,
        args=arguments,
        train_dataset=cast(Dataset, rows),
        data_collator=collate,
        callbacks=_trackers(plan.trackers, logs or checkpoints.parent / "tensorboard"),
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
    with shown.task(title, max(total - done, 0), "tokens") as advance:
        kept, saved = (snapshots, stops or {}) if first_process() else (None, {})
        trainer.add_callback(StageCallback(model, rules, kept, saved, advance, total / steps))
        start = time.perf_counter()
        try:
            trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        except torch.OutOfMemoryError:
            raise TrainingError(
                "out of device memory: lower train.batch_size, with train.effective_batch="
                f"{plan.rows_per_update(process_count())} for the same updates, or set "
                "train.gradient_checkpointing=true; `gaintune estimate` says what fits. Finished work is kept"
            ) from None
        except RuntimeError as error:
            if "without overflow" not in str(error):  # torch's words where a step does not fit into the weights' dtype
                raise
            message = f"the learning rate, {method.lr:g}, is too large for the weights' numbers; lower it"
            raise DivergedError(message) from None
        seconds = time.perf_counter() - start
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # else its forward stays under autocast
    losses = tuple(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    if rules:
        loss = objective or NextTokenLoss(model)
        stage_data = StageData(own_rows or rows, loss, f"{title}: what matters to it", collate, mixed, shown)
        for rule in rules:
            rule.finish(model, stage_data)
    pace = max(total - done, 0) / seconds
    return TrainedStage(trainer.state.global_step, total, losses, seconds, pace, tuple(rules))


def _trackers(names: Sequence[str], logs: Path) -> list[TrainerCallback]:
    """Return the named trackers' callbacks; TensorBoard writes into `logs`."""
    callbacks: list[TrainerCallback] = []
    for name in names:
        try:
            (callback,) = get_reporting_integration_callbacks([name])
            options = {}
            if name == "tensorboard":
                from torch.utils.tensorboard import SummaryWriter

                options["tb_writer"] = SummaryWriter(str(logs))
            callbacks.append(callback(**options))
        except (ValueError, ImportError, RuntimeError) as error:
            raise ConfigError(f"train.trackers: {name!r} cannot be used ({one_line(error)})") from None
    return callbacks


def _arguments(
    plan: TrainConfig, lr: float, folder: Path, device: torch.device, mixed_precision: torch.dtype | None
) -> TrainingArguments:
    """Translate a plan into `transformers` settings."""
    settings: Mapping[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": plan.batch_size,
        "gradient_accumulation_steps": plan.accumulation(process_count()),
        "num_train_epochs": plan.epochs,
        "optim": "adamw_torch",
        "learning_rate": lr,
        "weight_decay": plan.weight_decay,
        "adam_beta1": plan.betas[0],
        "adam_beta2": plan.betas[1],
        "max_grad_norm": plan.clip,
        "seed": plan.seed,
        "data_seed": plan.seed,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": plan.checkpoint_steps,
        "save_total_limit": 2,
        "report_to": "none",  # trackers are passed as callbacks
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
        arguments._n_gpu = 1  # no replicas in threads; `accelerate launch` uses several devices
    return arguments
