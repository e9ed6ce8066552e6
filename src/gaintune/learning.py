"""One adaptation with everything its method brings: rates, rules, penalty; and what it leaves beside the adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gaintune.config.plan import MethodConfig, TrainConfig
from gaintune.models.loss import NextTokenLoss, Objective
from gaintune.methods.attach import learning_rate, rate_multipliers, rules_of
from gaintune.progress import Progress, Silent
from gaintune.training.snapshots import Snapshots
from gaintune.training.train import Adaptation, train
from gaintune.methods.rules import Lesson, Place, Rows, StageRule


@dataclass(frozen=True)
class Learnt:
    """What an adaptation did, and the rules that have something to keep with the adapter."""

    adaptation: Adaptation
    rules: tuple[StageRule, ...]

    def keep(self, folder: Path) -> None:
        """Write what the next adaptation needs; given to `save_adapter`."""
        for rule in self.rules:
            rule.keep(folder)


def learn(
    model: nn.Module,
    method: MethodConfig,
    rows: Rows,
    plan: TrainConfig,
    place: Place,
    *,
    checkpoints: Path,
    own_rows: Rows | None = None,
    objective: Objective | None = None,
    collate: Callable[[list[dict[str, torch.Tensor]]], Mapping[str, Any]] | None = None,
    head_rates: Mapping[str, float] | None = None,
    snapshots: Snapshots | None = None,
    logs: Path | None = None,
    mixed_precision: torch.dtype | None = None,
    title: str = "learning",
    progress: Progress | None = None,
) -> Learnt:
    """Train a model with its method's rates, rules and penalty, continuing from a checkpoint if there is one.

    Args:
        model: a model that `attach` made or `load_adapter` opened for training.
        method: its method.
        rows: what is trained on, replayed rows among them.
        plan: optimizer, schedule, batch and seed.
        place: where this adaptation stands among those before and after it.
        checkpoints: folder for checkpoints inside this adaptation.
        own_rows: the domain's own rows, which EWC's information is about; `rows` unless given.
        head_rates: factors on the rate for the parts of a new head, beside the method's own.

    The others are those of `train`, which says what is raised beside what `rules_of` does.
    """
    shown = progress or Silent()
    rules = rules_of(method, place, seed=plan.seed)
    adaptation = train(
        model,
        rows,
        plan,
        lr=learning_rate(method, plan),
        seed=plan.seed,
        checkpoints=checkpoints,
        objective=objective,
        collate=collate,
        rules=rules,
        rate_multipliers={**(head_rates or {}), **(rate_multipliers(method) or {})},
        snapshots=snapshots,
        logs=logs,
        mixed_precision=mixed_precision,
        title=title,
        progress=shown,
    )
    if rules:
        lesson = Lesson(
            own_rows or rows,
            objective or NextTokenLoss(model),
            f"{title}: what matters to it",
            collate,
            mixed_precision,
            shown,
        )
        for rule in rules:
            rule.finish(model, lesson)
    return Learnt(adaptation, tuple(rules))
