"""What a measurement of saved adapters was made from: base, adapters, texts, settings, software."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gaintune.adapters import adapter_labels, adapter_method, check_undamaged, identity_file, read_config, read_record
from gaintune.config import Plan
from gaintune.data import DomainBlocks
from gaintune.errors import AdapterError, ConfigError
from gaintune.methods import Method
from gaintune.models import Base, resolve_device
from gaintune.storage import describe_environment, sha256_file

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Origin:
    """Identity and making of an adapter."""

    adapter: str  # its folder, as the user named it
    sha256: str  # of its manifest, or of its weights where PEFT wrote it without us
    method: str  # catalogue name; PEFT's type for an adapter without a record
    label: str  # of the method in the run
    domains: tuple[str, ...]  # it was trained on, in order; empty where they are not recorded
    base: str
    base_fingerprint: str | None  # None where it is not recorded
    settings: dict[str, Any]  # of training and method, by section


def origin_of(folder: Path) -> Origin:
    """Read an adapter's identity and making from its folder; AdapterError where it is damaged or no adapter."""
    record = read_record(folder)
    check_undamaged(folder)
    weights = identity_file(folder)
    if not weights.is_file():
        raise AdapterError(f"{weights} is missing; restore the folder from where it was saved")
    name, digest = str(folder), sha256_file(weights)
    if record is None:
        config = read_config(folder)
        kind = str(config.get("peft_type"))
        return Origin(name, digest, kind, kind, (), str(config.get("base_model_name_or_path")), None, {})
    domains, base, fingerprint = tuple(record.domains), record.base_name, record.base_fingerprint
    return Origin(name, digest, record.method, record.label, domains, base, fingerprint, record.settings)


def method_with(ability: str, folder: Path, hint: str) -> Method:
    """Return an adapter's method; AdapterError, with a hint, where it lacks an ability, such as `gates`."""
    method = adapter_method(folder)
    if method is None or not getattr(method, ability):
        record = read_record(folder)
        name = record.method if record is not None else read_config(folder).get("peft_type")
        raise AdapterError(f"{folder}: an adapter of method {name} has no {hint}")
    return method


def table_labels(origins: Sequence[Origin]) -> list[str]:
    """Return the names of adapters in tables: method and last domain, such as `gain-ffn on law`.

    Without a record of domains it is the folder's name. To equal names, the part in which the paths differ is added, as
    in `gain-ffn on law (first-run)`.
    """
    labels = [f"{each.label} on {each.domains[-1]}" if each.domains else Path(each.adapter).name for each in origins]
    unique = list(labels)
    for label in {each for each in labels if labels.count(each) > 1}:
        equal = [index for index, each in enumerate(labels) if each == label]
        parts = _where_they_differ([Path(origins[index].adapter).parts for index in equal])
        for index, part in zip(equal, parts, strict=True):
            unique[index] = f"{label} ({part})"
    return unique


def _where_they_differ(paths: Sequence[tuple[str, ...]]) -> list[str]:
    """Return paths without their common beginning and end; whole paths where that would leave one of them empty."""
    shortest = min(map(len, paths))
    start = next((at for at in range(shortest) if len({path[at] for path in paths}) > 1), shortest)
    end = next((at for at in range(shortest - start) if len({path[-1 - at] for path in paths}) > 1), shortest - start)
    middles = ["/".join(path[start : len(path) - end]) for path in paths]
    return middles if all(middles) else [str(Path(*path)) for path in paths]


@dataclass(frozen=True)
class Provenance:
    """Everything that a measurement's numbers depend on; `adapters` by their names in tables."""

    base: str
    base_revision: str | None
    base_fingerprint: str
    adapters: Mapping[str, Origin]
    texts: Mapping[str, Mapping[str, str | int]]
    settings: Mapping[str, Any]
    environment: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def named_origins(folders: Sequence[Path]) -> dict[str, Origin]:
    """Read the origins of adapters, by their names in tables (`table_labels`).

    AdapterError for a folder that is no adapter or damaged, ConfigError for no folder or one named twice.
    """
    if not adapter_labels(folders):
        raise ConfigError("name at least one adapter")
    origins = [origin_of(folder) for folder in folders]
    return dict(zip(table_labels(origins), origins, strict=True))


def provenance(
    plan: Plan,
    base: Base,
    domains: Sequence[DomainBlocks],
    adapters: Mapping[str, Origin],
    settings: Mapping[str, Any] | None = None,
) -> Provenance:
    """Collect what a measurement depends on; its settings are the plan's unless given."""
    if settings is None:
        settings = {name: getattr(plan, name).model_dump(mode="json") for name in ("model", "data", "evaluate")}
    texts = {domain.name: domain.describe() for domain in domains}
    environment = describe_environment(resolve_device(plan.model.device))
    return Provenance(base.name, base.revision, base.fingerprint, adapters, texts, settings, environment)


def warn_of_other_texts(adapters: Iterable[Path], domains: Sequence[DomainBlocks]) -> None:
    """Warn where a domain is not what an adapter was trained on, which may hold the text that is measured here."""
    hashes = {domain.name: domain.content_hash for domain in domains}
    for folder in adapters:
        record = read_record(folder)
        for name, trained in (record.content_hashes if record else {}).items():
            if hashes.get(name, trained) != trained:
                logger.warning(
                    "%s was trained on %s of other text, or cut to other sizes, than it is measured on here. Text and "
                    "data.seed alone decide what is held out: give the training's --train-tokens, --validation-tokens "
                    "and --block-size, or its plan, to see that they are the same",
                    folder, name,
                )  # fmt: skip
