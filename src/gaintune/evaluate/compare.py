"""A base and adapters on it, measured on the same blocks and compared pair by pair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gaintune.adapters import BASE, check_adapters
from gaintune.config import Plan
from gaintune.data import load_domain
from gaintune.evaluate.base_and_adapters import Measure, measure_base_and_adapters
from gaintune.evaluate.perplexity import measure_domain
from gaintune.models import Base, load_base
from gaintune.progress import Progress
from gaintune.results import DomainLoss, MethodRun, Stage, build_matrix


@dataclass(frozen=True)
class Figure:
    """One model on one domain; `change` and its interval in % of the base's perplexity, None for the base itself.

    Running text has bits per byte; a masked language model has the number of masked tokens behind its perplexity.
    """

    domain: str
    label: str
    perplexity: float
    change: float | None = None
    low: float | None = None
    high: float | None = None
    bits_per_byte: float | None = None
    masked: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, without what this kind of perplexity does not have."""
        names = ["domain", "label", "perplexity", "bits_per_byte", "change", "low", "high", "masked"]
        optional = {"bits_per_byte", "masked"}
        return {name: getattr(self, name) for name in names if name not in optional or getattr(self, name) is not None}


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
    check_adapters(adapters, plan.model, plan.data, allow_other_base=allow_other_base)

    def prepare(base: Base) -> Measure[dict[str, DomainLoss]]:
        domains = [load_domain(domain, plan.data, base.tokenizer) for domain in plan.data.measured]

        def measure(model: nn.Module, label: str, mixed: torch.dtype | None) -> dict[str, DomainLoss]:
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

        return measure

    losses, adapted = measure_base_and_adapters(plan, adapters, load_base, prepare, allow_other_base=allow_other_base)
    names = [domain.name for domain in plan.data.measured]
    runs = [MethodRun(each.label, each.base, (Stage(names[0], each.adapted),)) for each in adapted]
    cells = (
        {method.label: method.stages[0].cells for method in build_matrix(runs, plan.evaluate).methods} if runs else {}
    )
    figures = []
    for name in names:
        loss = losses[name]
        figures.append(Figure(name, BASE, loss.perplexity, bits_per_byte=loss.bits_per_byte))
        for each in adapted:
            cell = cells[each.label][name]
            interval = (cell.change, cell.low, cell.high)
            figures.append(Figure(name, each.label, cell.perplexity, *interval, bits_per_byte=cell.bits_per_byte))
    return figures
