"""The loss of every token of a plan's domains, with its base and with adapters on it: what each adaptation moved.

GAIN paper, figure 1; the figures are those of `token_statistics`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from gaintune.adapters import check_adapters
from gaintune.analysis.provenance import Provenance, named_origins, provenance, warn_of_other_texts
from gaintune.analysis.tokens import TokensOptions
from gaintune.analysis.tokens.statistics import TokenChanges, range_of, summarise_changes
from gaintune.config import Plan
from gaintune.data import IGNORED, DomainBlocks, Examples, load_domain
from gaintune.errors import ConfigError
from gaintune.evaluate import Measure, measure_base_and_adapters, measure_tokens
from gaintune.models import Base, load_base
from gaintune.progress import Progress
from gaintune.results import FloatArray


@dataclass(frozen=True)
class TokenSurvey:
    """Changes by domain and adapter, `changes[domain][label]`, and what they were made from."""

    changes: Mapping[str, Mapping[str, TokenChanges]]
    provenance: Provenance


def survey_tokens(
    plan: Plan,
    adapters: Sequence[Path],
    options: TokensOptions | None = None,
    *,
    allow_other_base: bool = False,
    progress: Progress | None = None,
) -> TokenSurvey:
    """Measure every scored token of the plan's domains with its base and with adapters on it.

    Each adapter is measured in the numbers it was trained in, and compared with the base in the same; of a classifier
    the backbone, under the base's own language-model head.

    Args:
        plan: base, domains (those learnt and those watched), validation budget and how uncertainty is measured.
        adapters: folders of adapters of any method, or of fully fine-tuned weights.
        options: the histograms' bins and range.
        allow_other_base: take adapters that were trained on another base.
        progress: where to show progress.

    Raises:
        AdapterError, BaseMismatchError: an adapter that is damaged or of another base.
        ConfigError: no adapter, or one named twice.
        DataError: a domain's text is missing or broken.
    """
    chosen = options or TokensOptions()
    if not adapters:
        raise ConfigError("name at least one adapter")
    origins = named_origins(adapters)
    check_adapters(adapters, plan.model, plan.data, allow_other_base=allow_other_base)
    domains: list[DomainBlocks] = []
    made_from: list[Provenance] = []

    def prepare(base: Base) -> Measure[dict[str, FloatArray]]:
        domains.extend(load_domain(domain, plan.data, base.tokenizer) for domain in plan.data.measured)
        warn_of_other_texts(adapters, domains)
        made_from.append(provenance(plan, base, domains, origins))
        return partial(_losses, domains=domains, plan=plan, progress=progress)

    _, adapted = measure_base_and_adapters(plan, adapters, load_base, prepare, allow_other_base=allow_other_base)
    changes = {}
    for domain in domains:
        scored = scored_tokens(domain.validation)
        moved = {
            label: each.adapted[domain.name] - each.base[domain.name]
            for label, each in zip(origins, adapted, strict=True)
        }
        end = chosen.limit or range_of([each[scored] for each in moved.values()])
        changes[domain.name] = {
            label: summarise_changes(
                each, scored, limit=end, bins=chosen.bins, samples=plan.evaluate.bootstrap_samples,
                confidence=plan.evaluate.confidence, seed=plan.evaluate.seed, domain=domain.name,
            )
            for label, each in moved.items()
        }  # fmt: skip
    return TokenSurvey(changes, made_from[0])


def _losses(
    model: nn.Module,
    label: str,
    mixed: torch.dtype | None,
    *,
    domains: Sequence[DomainBlocks],
    plan: Plan,
    progress: Progress | None,
) -> dict[str, FloatArray]:
    """The losses of every token of each domain, float64 `(rows, length - 1)` in nats."""
    return {
        domain.name: measure_tokens(
            model,
            domain.validation,
            batch_size=plan.evaluate.batch_size,
            mixed_precision=mixed,
            title=f"{label}: every token of {domain.name}",
            progress=progress,
        )
        .double()
        .numpy()
        for domain in domains
    }


def scored_tokens(examples: Examples) -> NDArray[np.bool_]:
    """Which tokens but the first of each row are scored, `(rows, length - 1)`."""
    return (examples.labels[:, 1:] != IGNORED).numpy()
