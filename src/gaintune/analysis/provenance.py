"""What a measurement of saved adapters was made from: base, adapters, texts, settings, software."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gaintune.adapters import adapter_labels, adapter_weights, check_whole, read_config, read_record
from gaintune.config import Plan
from gaintune.data import DomainBlocks
from gaintune.errors import AdapterError
from gaintune.models import Base, resolve_device
from gaintune.storage import describe_environment, sha256_file


@dataclass(frozen=True)
class Origin:
    """One adapter's identity and making.

    Attributes:
        adapter: the folder, as it was named.
        sha256: of its manifest, or of its weights where PEFT wrote it without us.
        method: catalogue name; PEFT's type for an adapter without a record.
        label: what the run called the method.
        domains: what it has learnt, in order; empty where nobody wrote it down.
        base: name of its base.
        base_fingerprint: identity of its base; None where nobody wrote it down.
        settings: training and method settings, by section.
    """

    adapter: str
    sha256: str
    method: str
    label: str
    domains: tuple[str, ...]
    base: str
    base_fingerprint: str | None
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "domains": list(self.domains)}


def origin_of(folder: Path) -> Origin:
    """Read what an adapter's folder says of itself; AdapterError where it is damaged or no adapter."""
    record = read_record(folder)
    check_whole(folder)
    weights = adapter_weights(folder)
    if not weights.is_file():
        raise AdapterError(f"{weights} is missing; restore the folder from where it was saved")
    digest = sha256_file(weights)
    if record is None:
        config = read_config(folder)
        kind = str(config.get("peft_type"))
        return Origin(str(folder), digest, kind, kind, (), str(config.get("base_model_name_or_path")), None, {})
    return Origin(
        adapter=str(folder),
        sha256=digest,
        method=record.method,
        label=record.label,
        domains=tuple(record.domains),
        base=record.base_name,
        base_fingerprint=record.base_fingerprint,
        settings=record.settings,
    )


def table_labels(origins: Sequence[Origin]) -> list[str]:
    """What tables call adapters: method and last domain, such as `gain-ffn on law`, or the folder.

    The folder's name where nobody wrote down what was learnt. Adapters that would have one name have in brackets where
    their paths differ, such as `gain-ffn on law (first-run)`.
    """
    labels = [f"{one.label} on {one.domains[-1]}" if one.domains else Path(one.adapter).name for one in origins]
    told = list(labels)
    for label in {each for each in labels if labels.count(each) > 1}:
        places = [place for place, each in enumerate(labels) if each == label]
        apart = _where_they_differ([Path(origins[place].adapter).parts for place in places])
        for place, part in zip(places, apart, strict=True):
            told[place] = f"{label} ({part})"
    return told


def _where_they_differ(paths: Sequence[tuple[str, ...]]) -> list[str]:
    """Paths without the parts that all begin and end with; whole where that leaves nothing of one."""
    shortest = min(map(len, paths))
    start = next((at for at in range(shortest) if len({path[at] for path in paths}) > 1), shortest)
    end = next((at for at in range(shortest - start) if len({path[-1 - at] for path in paths}) > 1), shortest - start)
    middles = ["/".join(path[start : len(path) - end]) for path in paths]
    return middles if all(middles) else [str(Path(*path)) for path in paths]


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


def provenance(
    plan: Plan,
    base: Base,
    domains: Sequence[DomainBlocks],
    adapters: Mapping[str, Origin],
    settings: Mapping[str, Any] | None = None,
) -> Provenance:
    """Put together what a measurement depends on; its settings are the plan's unless given."""
    if settings is None:
        settings = {name: getattr(plan, name).model_dump(mode="json") for name in ("model", "data", "evaluate")}
    return Provenance(
        base=base.name,
        base_revision=base.revision,
        base_fingerprint=base.fingerprint,
        adapters=adapters,
        texts={domain.name: domain.describe() for domain in domains},
        settings=settings,
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
