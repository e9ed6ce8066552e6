"""A base and adapters on it, measured on the same blocks and compared pair by pair."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from gaintune.adapters import adapter_labels, check_adapters, load_adapter
from gaintune.config import Plan
from gaintune.data.blocks import load_domain
from gaintune.evaluate.losses import DomainLoss, MethodRun, Stage
from gaintune.evaluate.matrix import build_matrix
from gaintune.evaluate.perplexity import measure
from gaintune.models import load_base
from gaintune.progress import Progress, Silent


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

    Returns:
        For each domain the base, then the adapters in the order given, labelled by their folders.

    Raises:
        AdapterError, BaseMismatchError: an adapter that is damaged or of another base.
    """
    labels = adapter_labels(adapters)
    check_adapters(adapters, plan.model, plan.data, allow_other_base=allow_other_base)
    shown = progress or Silent()
    base = load_base(plan.model)
    domains = [load_domain(domain, plan.data, base.tokenizer) for domain in plan.data.domains]

    def look(model: nn.Module, label: str) -> dict[str, DomainLoss]:
        return {
            domain.name: measure(
                model,
                domain.validation,
                domain.validation_bytes,
                batch_size=plan.evaluate.batch_size,
                title=f"{label}: measuring {domain.name}",
                progress=shown,
            )
            for domain in domains
        }

    losses = look(base.model, "base")
    runs = []
    for label, folder in zip(labels, adapters, strict=True):
        if runs:  # the base is untouched for the first adapter only
            base = load_base(plan.model)
        model = load_adapter(base, folder, allow_other_base=allow_other_base)
        runs.append(MethodRun(label, losses, (Stage(domains[0].name, look(model, label)),)))
        del model, base
        gc.collect()
    cells = (
        {method.label: method.stages[0].cells for method in build_matrix(runs, plan.evaluate).methods} if runs else {}
    )
    figures = []
    for domain in domains:
        loss = losses[domain.name]
        figures.append(Figure(domain.name, "base", loss.perplexity, loss.bits_per_byte, None, None, None))
        for label in labels:
            cell = cells[label][domain.name]
            interval = (cell.change, cell.low, cell.high)
            figures.append(Figure(domain.name, label, cell.perplexity, cell.bits_per_byte, *interval))
    return figures
