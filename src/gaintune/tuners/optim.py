"""Optimizer groups: what is decayed, what is not, and what learns at a rate of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


def parameter_groups(
    model: nn.Module, lr: float, weight_decay: float, rate_multipliers: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """The trainable parameters of `model`, grouped for any torch optimizer.

    Never decayed: gains (decay pulls them back to the pretrained model), biases, norms and every other vector.

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
    """
    multipliers = dict(rate_multipliers or {})
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
        decayed = parameter.dim() >= 2 and id(parameter) not in norms
        group_name = ("decay" if decayed else "no_decay") + (f":{part}" if part else "")
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
    unused = sorted(set(multipliers) - used)
    if unused:
        raise ValueError(f"rate_multipliers names {', '.join(unused)}, but no trainable parameter is called so.")
    return list(groups.values())
