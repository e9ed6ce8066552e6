"""A base and adapters on it, measured on the same blocks and compared pair by pair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gaintune.adapters import BASE, adapter_labels, check_adapters
from gaintune.config import Plan
from gaintune.data import load_domain
from gaintune.evaluate.perplexity import measure_domain
from gaintune.evaluate.walk import Look, look_at_base_and_adapters, with_adapter
from gaintune.models import Base, load_base
from gaintune.progress import Progress
from gaintune.results import DomainLoss, MethodRun, Stage, build_matrix


@dataclass(frozen=True)
class Figure:
    """One model on one domain; `change` and its interval in % of the base's perplexity, None for the base itself."""

    domain: str
    label: str
    perplexity: float
    bits_per_byte: float
    change: float | None
    low: float | None
    high: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def compare_adapters(
    plan: Plan,
    adapters: Sequence[Path],
    *,
    allow_other_base: bool = False,
    progress: Progress | None = None,
) -> list[Figure]:
    """Measure the plan's base, and every adapter on it, on the plan's domains.

    Of a classifier the backbone is measured, under the base's own language-model head.

    Returns:
        For each domain the base, then the adapters in the order given, labelled by their folders. Each is measured in
        the numbers it was trained in, and compared with the base in the same; the base shown is the first one's.

    Raises:
        AdapterError, BaseMismatchError: an adapter that is damaged or of another base.
    """
    adapter_labels(adapters)  # refuses an adapter that is named twice
    check_adapters(adapters, plan.model, plan.data, allow_other_base=allow_other_base)

    def prepare(base: Base) -> Look[dict[str, DomainLoss]]:
        domains = [load_domain(domain, plan.data, base.tokenizer) for domain in plan.data.measured]

        def look(model: nn.Module, label: str, mixed: torch.dtype | None) -> dict[str, DomainLoss]:
            return {
                domain.name: measure_domain(
                    model,
                    domain,
                    batch_size=plan.evaluate.batch_size,
                    mixed_precision=mixed,
                    title=f"{label}: measuring {domain.name}",
                    base=plan.model.name if label == BASE else None,
                    progress=progress,
                )
                for domain in domains
            }

        return look

    put_on = partial(with_adapter, plan=plan, allow_other_base=allow_other_base)
    losses, adapted = look_at_base_and_adapters(plan, adapters, load_base, put_on, prepare)
    names = [domain.name for domain in plan.data.measured]
    runs = [MethodRun(each.label, each.base, (Stage(names[0], each.found),)) for each in adapted]
    cells = (
        {method.label: method.stages[0].cells for method in build_matrix(runs, plan.evaluate).methods} if runs else {}
    )
    figures = []
    for name in names:
        loss = losses[name]
        figures.append(Figure(name, BASE, loss.perplexity, loss.bits_per_byte, None, None, None))
        for each in adapted:
            cell = cells[each.label][name]
            interval = (cell.change, cell.low, cell.high)
            figures.append(Figure(name, each.label, cell.perplexity, cell.bits_per_byte, *interval))
    return figures
