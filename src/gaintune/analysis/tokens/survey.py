"""Changes of every token's loss between a plan's base and adapters on it, by domain.

GAIN paper, section 5.1 and figure 1: on a domain that an adapter was not trained on, GAIN's changes are said to be
small and symmetric around zero, so that they cancel in the mean, and LoRA's to be coherent. Coherence here is
|mean| / mean |.| of the changes: 0 where they cancel, 1 where every token moves the same way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from gaintune.adapters import check_adapters
from gaintune.analysis.provenance import Provenance, named_origins, provenance, warn_of_other_texts
from gaintune.analysis.tokens import TokensOptions, check_histogram
from gaintune.config import Plan
from gaintune.data import IGNORED, DomainBlocks, Examples, load_domain
from gaintune.errors import DataError
from gaintune.evaluate import Measure, measure_base_and_adapters, measure_tokens
from gaintune.models import Base, load_base
from gaintune.progress import Progress
from gaintune.results import FloatArray, Interval, interval_of, replicate_means, widened

BINS = 101  # odd, so that a bin is centered on zero
WITHIN = 0.995  # share of the changes inside the histogram's range unless a limit is given
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


@dataclass(frozen=True)
class TokenChanges:
    """Changes of the loss, adapted minus base, of the scored tokens of one domain, in nats: negative is better."""

    tokens: int  # that are scored
    blocks: int  # rows that the tokens lie in
    mean: Interval  # over tokens, with a bootstrap interval over blocks
    mean_absolute: float  # mean size of a change
    deviation: float  # standard deviation over tokens
    skew: float | None  # third standardized moment (population); 0 if symmetric, None where nothing changes
    coherence: Interval | None  # |mean| / mean |.|; its interval reaches 0 where the sign of the mean is in doubt
    better: float  # share of tokens whose loss fell
    worse: float  # share of tokens whose loss rose
    quantiles: tuple[float, ...]  # of the changes, at `QUANTILES`
    histogram: tuple[int, ...]  # tokens in equal bins from -limit to limit; the outermost bins also hold all beyond
    limit: float  # nats at which the histogram's range ends


@dataclass(frozen=True)
class TokenSurvey:
    """Changes by domain and adapter, `changes[domain][label]`, and what they were made from."""

    changes: Mapping[str, Mapping[str, TokenChanges]]
    provenance: Provenance

    def __iter__(self) -> Iterator[tuple[str, str, TokenChanges]]:
        """Yield domain, adapter's label and changes."""
        for domain, adapters in self.changes.items():
            for label, changes in adapters.items():
                yield domain, label, changes


def survey_tokens(
    plan: Plan,
    adapters: Sequence[Path],
    options: TokensOptions | None = None,
    *,
    allow_other_base: bool = False,
    progress: Progress | None = None,
) -> TokenSurvey:
    """Measure every scored token of the plan's domains with its base and with adapters on it.

    An adapter, of any method or fully fine-tuned weights, is measured in the precision it was trained in, and compared
    with the base in the same. A classifier's backbone is measured under the base's own language-model head.

    Raises:
        AdapterError, BaseMismatchError: an adapter that is damaged or of another base.
        ConfigError: no adapter, or one named twice.
        DataError: a domain's text is missing or broken.
    """
    chosen = options or TokensOptions()
    origins = named_origins(adapters)
    check_adapters(adapters, plan.model, plan.data, allow_other_base=allow_other_base)
    domains: list[DomainBlocks] = []
    made_from: list[Provenance] = []  # both are known once the first base is loaded

    def losses(model: nn.Module, label: str, mixed: torch.dtype | None) -> dict[str, FloatArray]:
        """Return the loss of every token of each domain, float64 `(rows, length - 1)` in nats."""
        size, title = plan.evaluate.batch_size, f"{label}: every token of"
        measure = partial(measure_tokens, model, batch_size=size, mixed_precision=mixed, progress=progress)
        return {each.name: measure(each.validation, title=f"{title} {each.name}").double().numpy() for each in domains}

    def prepare(base: Base) -> Measure[dict[str, FloatArray]]:
        domains.extend(load_domain(domain, plan.data, base.tokenizer) for domain in plan.data.measured)
        warn_of_other_texts(adapters, domains)
        made_from.append(provenance(plan, base, domains, origins))
        return losses

    _, adapted = measure_base_and_adapters(plan, adapters, load_base, prepare, allow_other_base=allow_other_base)
    settings = plan.evaluate
    changes = {}
    for domain in domains:
        name, scored = domain.name, scored_tokens(domain.validation)
        moved = {label: each.adapted[name] - each.base[name] for label, each in zip(origins, adapted, strict=True)}
        limit = chosen.limit or range_of([each[scored] for each in moved.values()])
        changes[name] = {
            label: summarize_changes(
                each, scored, limit=limit, bins=chosen.bins, samples=settings.bootstrap_samples,
                confidence=settings.confidence, seed=settings.seed, domain=name,
            )
            for label, each in moved.items()
        }  # fmt: skip
    return TokenSurvey(changes, made_from[0])


def scored_tokens(examples: Examples) -> NDArray[np.bool_]:
    """Return which tokens but the first of each row are scored, `(rows, length - 1)`."""
    return (examples.labels[:, 1:] != IGNORED).numpy()


def summarize_changes(
    changes: FloatArray,
    scored: NDArray[np.bool_],
    *,
    limit: float,
    bins: int = BINS,
    samples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
    domain: str = "",
) -> TokenChanges:
    """Summarize changes of the loss, adapted minus base, `(rows, tokens)` in nats, where `scored` is true.

    The histogram has `bins` bins, an odd number, and ends at `limit` nats. Intervals come from `samples` resamples of
    rows; `domain` is mixed into the seed, so that all adapters on a domain are resampled alike.

    Raises:
        ConfigError: an even number of bins, or a limit that is not above 0.
        DataError: a row without a scored token, or changes that are not finite.
    """
    check_histogram(bins, limit)
    values = np.asarray(changes, np.float64)
    if values.shape != scored.shape or values.ndim != 2 or not scored.any(axis=1).all():
        raise DataError("changes of tokens need a mask of their shape (rows, tokens), and a scored token in each row")
    kept = values[scored]
    if not np.isfinite(kept).all():
        raise DataError("a token's loss is not finite: the model is broken")
    sums = np.where(scored, [values, np.abs(values)], 0.0).sum(axis=2)
    counts = scored.sum(axis=1).astype(np.int64)
    means = replicate_means(sums, counts, samples=samples, seed=seed, domain=domain)
    mean, size = means[:, 0], means[:, 1]  # with one block all resamples are NaN, which leaves intervals without ends
    ratios = np.divide(mean, size, out=np.zeros_like(mean), where=size != 0)

    def interval(replicates: FloatArray) -> Interval:
        return interval_of(widened(replicates, confidence, len(counts)), confidence)

    deviation = float(kept.std())
    positions = np.floor((kept + limit) * (bins / (2 * limit))).clip(0, bins - 1).astype(np.int64)
    return TokenChanges(
        tokens=len(kept),
        blocks=len(counts),
        mean=interval(mean),
        mean_absolute=float(np.abs(kept).mean()),
        deviation=deviation,
        skew=float(((kept - kept.mean()) ** 3).mean() / deviation**3) if deviation > 0 else None,
        coherence=_absolute(interval(ratios)) if kept.any() else None,
        better=float((kept < 0).mean()),
        worse=float((kept > 0).mean()),
        quantiles=tuple(np.quantile(kept, QUANTILES).tolist()),
        histogram=tuple(np.bincount(positions, minlength=bins).tolist()),
        limit=limit,
    )


def _absolute(signed: Interval) -> Interval:
    """Return the interval of a figure's size; where the sign is in doubt it reaches 0, as resampled sizes never do."""
    if signed.low is None or signed.high is None:
        return Interval(abs(signed.value), None, None)
    low, high = sorted((abs(signed.low), abs(signed.high)))
    return Interval(abs(signed.value), 0.0 if signed.sign == 0 else low, min(high, 1.0))


def range_of(changes: Sequence[FloatArray]) -> float:
    """Return the nats within which 99.5 % of every adapter's changes lie, `(tokens,)` each; 1 where nothing changes."""
    return max(float(np.quantile(np.abs(each), WITHIN)) for each in changes) or 1.0
