"""Saved classifiers on labelled rows: each scored, and compared row by row with the first."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gaintune.adapters.disk import AdapterRecord, adapter_labels, check_adapters, load_adapter, read_record
from gaintune.config.plan import Plan
from gaintune.data.classify import ClassifyDomain, Padding, load_classification
from gaintune.errors import ConfigError
from gaintune.evaluate.classification import Predictions, Scores, Share, difference, score
from gaintune.evaluate.predict import predict
from gaintune.evaluate.walk import look_at_adapters
from gaintune.models.heads import load_classifier, reads_segments
from gaintune.methods.attach import measuring_numbers
from gaintune.models.base import load_tokenizer
from gaintune.progress import Progress

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClassifierFigure:
    """One classifier on one domain; `change` is its accuracy less that of the first classifier, None for that one."""

    label: str
    scores: Scores
    change: Share | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def is_classifier(adapter: Path) -> bool:
    """Whether a folder holds a classifier of ours; AdapterError if it holds no adapter."""
    record = read_record(adapter)
    return record is not None and bool(record.labels)


def compare_classifiers(
    plan: Plan,
    adapters: Sequence[Path],
    *,
    allow_other_base: bool = False,
    progress: Progress | None = None,
) -> list[ClassifierFigure]:
    """Classify the validation rows of the plan's domains with every adapter and its head.

    Returns:
        For each domain the adapters in the order given, labelled by their folders.

    Raises:
        ConfigError: an adapter without a head, or rows with labels that it does not know.
        AdapterError, BaseMismatchError: an adapter that is damaged or of another base.
        DataError, AssetError: a domain that cannot be read.
    """
    if not adapters:
        raise ConfigError("the base has no head of its own to classify with: name classifiers with --adapter")
    labels = adapter_labels(adapters)
    records = {adapter: _record(adapter) for adapter in adapters}
    check_adapters(adapters, plan.model, plan.data, allow_other_base=allow_other_base)
    tokenizer, segments = load_tokenizer(plan.model), reads_segments(plan.model)
    domains = [
        load_classification(domain, plan.classify, tokenizer, seed=plan.data.seed, segments=segments)
        for domain in plan.data.domains
    ]
    for adapter, record in records.items():
        _check(adapter, record, domains, plan)

    def look(label: str, adapter: Path) -> list[Predictions]:
        names, numbers = records[adapter].labels, measuring_numbers(plan.model, records[adapter].method)
        base = load_classifier(plan.model, names, seed=0, dtype=numbers.load)
        base.check_length(plan.classify.max_length)
        model = load_adapter(base, adapter, allow_other_base=allow_other_base)
        return [
            predict(
                model,
                domain,
                Padding(base.padding),
                labels=names,
                batch_size=plan.evaluate.batch_size,
                mixed_precision=numbers.mixed,
                title=f"{label}: measuring {domain.name}",
                progress=progress,
            )
            for domain in domains
        ]

    found = look_at_adapters(adapters, look)
    return [
        ClassifierFigure(
            label,
            score(predictions[number], plan.evaluate),
            None if predictions is found[0] else difference(found[0][number], predictions[number], plan.evaluate),
        )
        for number in range(len(domains))
        for label, predictions in zip(labels, found, strict=True)
    ]


def _record(adapter: Path) -> AdapterRecord:
    record = read_record(adapter)
    if record is None or not record.labels:
        raise ConfigError(f"{adapter} has no classification head of ours; evaluate it on text, without --task classify")
    return record


def _check(adapter: Path, record: AdapterRecord, domains: Sequence[ClassifyDomain], plan: Plan) -> None:
    """Refuse labels that a classifier does not know, and say where rows are cut elsewhere than in its training."""
    for domain in domains:
        unknown = [label for label in domain.labels if label not in record.labels]
        if unknown:
            raise ConfigError(
                f"{adapter} knows the labels {', '.join(record.labels)}, but rows of domain {domain.name!r} have "
                f"{', '.join(unknown)}"
            )
    trained = record.settings.get("classify", {}).get("max_length")
    if trained is not None and trained != plan.classify.max_length:
        logger.warning(
            "%s was trained on rows of up to %s tokens, they are cut to %d here (classify.max_length)",
            adapter, trained, plan.classify.max_length,
        )  # fmt: skip
