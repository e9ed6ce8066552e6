"""Optimizer groups: what is decayed, what is not, and what learns at a rate of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from gaintune.errors import ConfigError

GATES = ".lora_G."
"""Part of the name of every parameter of a gate."""

NEVER_DECAYED = (GATES, ".ia3_l.", ".lora_E.")
"""Gates, and factors that PEFT keeps as matrices of one row or column: (IA)3's (where 1 is no change) and AdaLoRA's."""


def parameter_groups(
    model: nn.Module, lr: float, weight_decay: float, rate_multipliers: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """Group the trainable parameters of `model` for any torch optimizer.

    Never decayed: gains (decay pulls them back to the pretrained model), DISeL's gates (decay removes their dependence
    on the input), the factors of (IA)3 and AdaLoRA, biases, norms and every other vector. The gates of a DISeL adapter
    learn at its `gate_lr_ratio` times `lr`, unless `rate_multipliers` says otherwise.

        optimizer = torch.optim.AdamW(parameter_groups(model, lr=0.01, weight_decay=0.1))
        Trainer(model=model, ..., optimizers=(optimizer, None))       # TRL's trainers take `optimizers` too

    Args:
        model: a PeftModel, or any module.
        lr: learning rate of every group without a multiplier.
        weight_decay: decay of weight matrices.
        rate_multipliers: part of a parameter's name, such as "gain_", -> factor on `lr` for the parameters so named. A
            part that names no trainable parameter raises `ValueError`.

    Returns:
        Groups `{"params": [...], "lr": ..., "weight_decay": ..., "name": ...}`, empty ones left out.

    Raises:
        ConfigError: a model that FSDP-1 has wrapped; FSDP-2 wraps it after the groups are made.
    """
    _refuse_flattened(model)
    given = dict(rate_multipliers or {})
    # those given come first: the first part of a name that is found counts
    multipliers = given | {part: ratio for part, ratio in _gate_ratios(model).items() if part not in given}
    norms = {
        id(parameter)
        for module in model.modules()
        if "norm" in type(module).__name__.lower()
        for parameter in module.parameters(recurse=False)
    }
    groups: dict[str, dict[str, Any]] = {}
    used = set()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = next((part for part in multipliers if part in name), None)
        used.add(part)
        exempt = id(parameter) in norms or any(part in name for part in NEVER_DECAYED)
        decayed = parameter.dim() >= 2 and not exempt
        group_name = ("decay" if decayed else "no_decay") + (f":{part.strip('.')}" if part else "")
        group = groups.setdefault(
            group_name,
            {
                "params": [],
                "lr": lr * multipliers.get(part, 1.0) if part else lr,
                "weight_decay": weight_decay if decayed else 0.0,
                "name": group_name,
            },
        )
        group["params"].append(parameter)
    unused = sorted(set(given) - used)
    if unused:
        raise ValueError(f"rate_multipliers names {', '.join(unused)}, but no trainable parameter is called so.")
    return list(groups.values())


def create_disel_optimizer(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.0,
    gate_lr_ratio: float | None = None,
    optimizer_cls: type[torch.optim.Optimizer] = torch.optim.AdamW,
    **kwargs: Any,
) -> torch.optim.Optimizer:
    """Make an optimizer for DISeL: gates at their own rate and without decay, the rest as in `parameter_groups`.

    Args:
        model: the model with trainable DISeL adapters.
        lr: learning rate of A, B and everything else that is not a gate.
        weight_decay: decay of weight matrices that are not gates.
        gate_lr_ratio: the gates' rate over `lr`; each adapter's own `gate_lr_ratio` unless given.
        optimizer_cls: its class; `kwargs` are passed to it.

    Raises `ConfigError` where nothing of a gate trains.
    """
    if not any(GATES in name and parameter.requires_grad for name, parameter in model.named_parameters()):
        raise ConfigError(
            "no gate of a DISeL adapter trains in this model: add an adapter with get_peft_model(model, DiselConfig()) "
            "or activate one; for other methods use gaintune.parameter_groups"
        )
    multipliers = None if gate_lr_ratio is None else {GATES: gate_lr_ratio}
    return optimizer_cls(parameter_groups(model, lr, weight_decay, multipliers), **{"lr": lr, **kwargs})


class AdapterOptimizerMixin:
    """Mixin that gives `parameter_groups` to transformers' `Trainer` and what derives from it, such as TRL's trainers.

        class Trainer(AdapterOptimizerMixin, trl.SFTTrainer): ...

    Rate, decay, optimizer and schedule are those of the trainer's arguments. Without the mixin, `Trainer` decays gains
    and gates too, and gives gates the common rate.
    """

    rate_multipliers: Mapping[str, float] | None = None
    """As in `parameter_groups`; set it on the class or the trainer."""

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the optimizer that the arguments name, over our groups; keep one that was passed in."""
        trainer: Any = self
        if trainer.optimizer is None:
            trained: nn.Module = trainer.model if model is None else model
            chosen = trainer.optimizer_cls_and_kwargs or trainer.get_optimizer_cls_and_kwargs(trainer.args, trained)
            optimizer_cls, kwargs = chosen
            own_groups = {"params", "model", "optimizer_dict"} & set(kwargs)
            if own_groups or not (isinstance(optimizer_cls, type) and issubclass(optimizer_cls, torch.optim.Optimizer)):
                raise ConfigError(
                    f"optim={getattr(trainer.args, 'optim', optimizer_cls)!s} makes parameter groups of its own; "
                    "choose one that takes groups, such as adamw_torch"
                )
            groups = parameter_groups(
                trained, trainer.args.learning_rate, trainer.args.weight_decay, self.rate_multipliers
            )
            trainer.optimizer = optimizer_cls(groups, **kwargs)
        return trainer.optimizer


def _refuse_flattened(model: nn.Module) -> None:
    if not torch.distributed.is_available():
        return
    from torch.distributed.fsdp import FullyShardedDataParallel

    if isinstance(model, FullyShardedDataParallel):
        raise ConfigError(
            "FSDP 1 flattens parameters before an optimizer is made, so that matrices, which are decayed, look "
            "like vectors, and its wrapping takes DISeL's matrices out of their layer's reach: use FSDP 2 "
            "(fsdp_version: 2)"
        )


def _gate_ratios(model: nn.Module) -> dict[str, float]:
    """Return every DISeL adapter's ratio by the part that its gates' names share; the model may be wrapped."""
    configs = next(
        (found for part in model.modules() if isinstance(found := getattr(part, "peft_config", None), dict)), {}
    )
    return {
        f"{GATES}{adapter}.": config.gate_lr_ratio
        for adapter, config in configs.items()
        if hasattr(config, "gate_lr_ratio")
    }
