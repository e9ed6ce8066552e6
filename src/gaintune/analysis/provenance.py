"""What a measurement of saved adapters was made from: base, adapters, texts, settings, software."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gaintune.adapters.disk import adapter_labels, read_record
from gaintune.analysis.origin import Origin, origin_of, table_labels
from gaintune.config.plan import Plan
from gaintune.data.load import DomainBlocks
from gaintune.storage.environment import describe_environment
from gaintune.models.base import Base, resolve_device

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Provenance:
    """Everything that the numbers depend on; `adapters` by what they are called in tables."""

    base: str
    base_revision: str | None
    base_fingerprint: str
    adapters: Mapping[str, Origin]
    texts: Mapping[str, Mapping[str, str | int]]
    settings: Mapping[str, Any]
    environment: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**vars(self), "adapters": {label: origin.to_dict() for label, origin in self.adapters.items()}}


def named_origins(folders: Sequence[Path]) -> dict[str, Origin]:
    """Adapters by what tables call them (`table_labels`), from their files alone.

    Raises:
        AdapterError: a folder that is no adapter, or a damaged one.
        ConfigError: an adapter named twice.
    """
    adapter_labels(folders)
    origins = [origin_of(folder) for folder in folders]
    return dict(zip(table_labels(origins), origins, strict=True))


def provenance(plan: Plan, base: Base, domains: Sequence[DomainBlocks], adapters: Mapping[str, Origin]) -> Provenance:
    """Put together what a measurement of `adapters` on `base` and these texts depends on."""
    return Provenance(
        base=base.name,
        base_revision=base.revision,
        base_fingerprint=base.fingerprint,
        adapters=adapters,
        texts={domain.name: domain.describe() for domain in domains},
        settings={name: getattr(plan, name).model_dump(mode="json") for name in ("model", "data", "evaluate")},
        environment=describe_environment(resolve_device(plan.model.device)),
    )


def warn_of_other_texts(adapters: Iterable[Path], domains: Sequence[DomainBlocks]) -> None:
    """Say where a domain is not what an adapter learnt: of other text it may have seen what it is measured on."""
    here = {domain.name: domain.content_hash for domain in domains}
    for folder in adapters:
        record = read_record(folder)
        for name, learnt in (record.content_hashes if record else {}).items():
            if here.get(name, learnt) != learnt:
                logger.warning(
                    "%s learnt %s from other text, or cut to other sizes, than it is measured on here. Text and "
                    "data.seed alone decide what is held out: give the training's --train-tokens, --validation-tokens "
                    "and --block-size, or its plan, to see that they are the same",
                    folder, name,
                )  # fmt: skip
