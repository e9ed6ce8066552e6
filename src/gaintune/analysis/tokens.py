"""The loss of every token of a plan's domains, with its base and with adapters on it: what each adaptation moved.

GAIN paper, figure 1; the figures are those of `token_statistics`.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gaintune.adapters import check_adapters, load_adapter
from gaintune.analysis.provenance import Provenance, named_origins, provenance
from gaintune.analysis.token_statistics import BINS, TokenChanges, check_histogram, range_of, summarise_changes
from gaintune.config import Plan
from gaintune.data.blocks import load_domain
from gaintune.data.examples import Examples
from gaintune.errors import ConfigError
from gaintune.evaluate.bootstrap import FloatArray
from gaintune.evaluate.perplexity import measure_tokens
from gaintune.loss import IGNORED
from gaintune.models import load_base
from gaintune.progress import Progress, Silent


@dataclass(frozen=True)
class TokenSurvey:
    """Changes by domain and adapter, `changes[domain][label]`, and what they were made from."""

    changes: Mapping[str, Mapping[str, TokenChanges]]
    provenance: Provenance


def survey_tokens(
    plan: Plan,
    adapters: Sequence[Path],
    *,
    bins: int = BINS,
    limit: float | None = None,
    allow_other_base: bool = False,
    progress: Progress | None = None,
) -> TokenSurvey:
    """Measure every scored token of the plan's domains with its base and with adapters on it.

    Args:
        plan: base, domains, validation budget and how uncertainty is measured.
        adapters: folders of adapters of any method, or of fully fine-tuned weights.
        bins: bins of a histogram, an odd number.
        limit: nats at which the histograms end; for each domain where 99.5 % of all adapters' changes lie, unless
            given.
        allow_other_base: take adapters that were trained on another base.
        progress: where to show progress.

    Raises:
        AdapterError, BaseMismatchError: an adapter that is damaged or of another base.
        ConfigError: no adapter, one named twice, or an even number of bins.
        DataError: a domain's text is missing or broken.
    """
    check_histogram(bins, limit)
    if not adapters:
        raise ConfigError("name at least one adapter")
    origins = named_origins(adapters)
    check_adapters(adapters, plan.model, allow_other_base=allow_other_base)
    shown = progress or Silent()
    base = load_base(plan.model)
    domains = [load_domain(domain, plan.data, base.tokenizer) for domain in plan.data.domains]
    made_from = provenance(plan, base, domains, origins)

    def look(model: Any, label: str) -> dict[str, FloatArray]:
        return {
            domain.name: measure_tokens(
                model,
                domain.validation,
                batch_size=plan.evaluate.batch_size,
                title=f"{label}: every token of {domain.name}",
                progress=shown,
            )
            .double()
            .numpy()
            for domain in domains
        }

    before = look(base.model, "base")
    after: dict[str, dict[str, FloatArray]] = {}
    for label, adapter in zip(origins, adapters, strict=True):
        if after:  # the base is untouched for the first adapter only
            base = load_base(plan.model)
        after[label] = look(load_adapter(base, adapter, allow_other_base=allow_other_base), label)
        del base
        gc.collect()
    changes = {}
    for domain in domains:
        scored = scored_tokens(domain.validation)
        moved = {label: losses[domain.name] - before[domain.name] for label, losses in after.items()}
        end = limit or range_of([each[scored] for each in moved.values()])
        changes[domain.name] = {
            label: summarise_changes(
                each, scored, limit=end, bins=bins, samples=plan.evaluate.bootstrap_samples,
                confidence=plan.evaluate.confidence, seed=plan.evaluate.seed, domain=domain.name,
            )
            for label, each in moved.items()
        }  # fmt: skip
    return TokenSurvey(changes, made_from)


def scored_tokens(examples: Examples) -> NDArray[np.bool_]:
    """Which tokens but the first of each row are scored, `(rows, length - 1)`."""
    return (examples.labels[:, 1:] != IGNORED).numpy()
