"""The files of an adapter's folder: its record, its settings, whether it is whole, and for which base it is."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gaintune.config import DataConfig, DomainConfig, ModelConfig, Plan
from gaintune.errors import AdapterError, BaseMismatchError, ConfigError
from gaintune.storage import files

if TYPE_CHECKING:
    from gaintune.data import ClassifyDomain, DomainBlocks
    from gaintune.methods import Method, PreparedMethod

logger = logging.getLogger(__name__)


RECORD = "gaintune.json"
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
BASE = "base"  # what the untouched base is called beside adapters


@dataclass(frozen=True)
class DomainSettings:
    """Settings that decide which of a domain's rows are held out and how rows become tokens; see `DataConfig`."""

    task: str
    seed: int
    template: str
    block_size: int
    packing: bool
    end_of_text: bool
    beginning_of_text: str = "auto"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; `beginning_of_text` only where a plan chose it, so that records stay alike."""
        return {key: value for key, value in asdict(self).items() if (key, value) != ("beginning_of_text", "auto")}

    @classmethod
    def of(cls, domain: DomainConfig, data: DataConfig) -> DomainSettings:
        """Collect what a plan says of one of its domains."""
        written = (data.template_of(domain), data.block_size, data.packing, data.end_of_text, data.beginning_of_text)
        return cls(data.task_of(domain), data.seed, *written)


def warn_of_other_rows(adapter: Path, trained: Mapping[str, DomainSettings], data: DataConfig) -> None:
    """Warn where a plan splits or writes a domain in another way than in an adapter's training; say what to give.

    `trained` holds the settings of the adapter's domains by name, as its record has them.
    """
    held_out = ": unless its source has a validation split of its own, text that was trained on counts as held out"
    for domain in data.domains:
        if domain.name not in trained:
            continue
        then, now = asdict(trained[domain.name]), asdict(DomainSettings.of(domain, data))
        written = ("template", "end_of_text") if then["task"] == now["task"] == "instruct" else ()
        for key in ("seed", "beginning_of_text", *written):
            before, here = (str(values[key]).lower() for values in (then, now))
            if before == here:
                continue
            option, give = f"data.{key}", f"--set data.{key}={before}"
            if key == "template":
                option, give = key, f"--template {before}, or the domain's own in a plan"
            logger.warning(
                "%s was trained on %s with %s %s, here it is %s%s. Give %s",
                adapter, domain.name, option, before, here, held_out * (key == "seed"), give,
            )  # fmt: skip


@dataclass(frozen=True)
class AdapterRecord:
    """Record of what an adapter was trained on and how.

    `base_name` is the base as the user named it; `content_hashes` has the hash of the text of each of `domains`, and
    `data` how its rows were made; `settings` are those of the last domain, their `train.lr` the rate that was used;
    `labels` are the classes of a classifier, in the order of its logits, and empty for everything else.
    """

    base_name: str
    base_fingerprint: str
    method: str
    label: str
    domains: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    base_revision: str | None = None
    content_hashes: dict[str, str] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    data: dict[str, DomainSettings] = field(default_factory=dict)

    @property
    def whole(self) -> bool:
        """Whether every weight of the base was trained, so that the folder holds these and no adapter."""
        from gaintune.methods import METHODS

        return self.method in METHODS and METHODS[self.method].trains_base

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {**asdict(self), "data": {name: made.to_dict() for name, made in self.data.items()}}

    @classmethod
    def of_plan(
        cls,
        plan: Plan,
        method: PreparedMethod,
        fingerprint: str,
        trained: Sequence[DomainBlocks | ClassifyDomain],
        *,
        versions: dict[str, str],
        settings: dict[str, Any],
        previous: AdapterRecord | None = None,
        labels: tuple[str, ...] = (),
    ) -> AdapterRecord:
        """Record what a plan's method trained on a base of a fingerprint.

        `trained` are the domains in the order of training, `versions` those of the packages; `settings` are added to
        those of training and method, by section. `previous` is the record of the adapter that training continued.
        """
        had = previous or cls("", "", "", "", domains=())  # nothing came before a new adapter
        made = {domain.name: DomainSettings.of(domain, plan.data) for domain in plan.data.domains}
        training = {**plan.train.model_dump(mode="json"), "lr": method.lr}
        return cls(
            base_name=plan.model.name,
            base_revision=plan.model.revision,
            base_fingerprint=fingerprint,
            method=method.config.name,
            label=method.config.label,
            domains=(*had.domains, *(domain.name for domain in trained)),
            content_hashes={**had.content_hashes, **{domain.name: domain.content_hash for domain in trained}},
            data={**had.data, **{domain.name: made[domain.name] for domain in trained}},
            settings={"train": training, "method": method.config.model_dump(mode="json"), **settings},
            versions=versions,
            labels=labels,
        )


def read_record(folder: Path) -> AdapterRecord | None:
    """Read the record of an adapter, None if PEFT wrote it without us; AdapterError for another folder or damage."""
    if not folder.is_dir():
        raise AdapterError(f"{folder}: no such adapter folder")
    path = folder / RECORD
    if not path.is_file():
        if (folder / CONFIG).is_file():
            return None
        raise AdapterError(f"{folder}: not an adapter, it has neither {RECORD} nor {CONFIG}")
    try:
        values = files.read_json(path)
        values["domains"] = tuple(values["domains"])
        values["labels"] = tuple(values.get("labels", ()))
        values["data"] = {name: DomainSettings(**each) for name, each in values.get("data", {}).items()}
        known = {entry.name for entry in fields(AdapterRecord)}
        return AdapterRecord(**{key: value for key, value in values.items() if key in known})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise AdapterError(f"{path}: damaged record ({error}); restore the folder from where it was saved") from None


def adapter_method(folder: Path) -> Method | None:
    """Find an adapter's method in the catalogue, also if PEFT wrote it without us; None if it is not there."""
    from gaintune.methods import METHODS, recognize

    record = read_record(folder)
    if record is not None and record.whole:
        return METHODS[record.method]
    return recognize(read_config(folder), record.method if record else None)


def adapter_labels(folders: Sequence[Path]) -> list[str]:
    """Label adapters by their folders, beside one another and the base; ConfigError for two of one name."""
    labels = [str(folder) for folder in folders]
    if BASE in labels:
        raise ConfigError(f"an adapter cannot be called {BASE!r}, as the base is: name it by its absolute path")
    if len(set(labels)) != len(labels):
        raise ConfigError(f"an adapter is named twice: {', '.join(labels)}")
    return labels


def claimed_base(folder: Path, record: AdapterRecord | None) -> ModelConfig:
    """Return the base that an adapter names as its own; AdapterError if it names none."""
    if record is not None:
        return ModelConfig(name=str(record.base_name), revision=record.base_revision)
    config = read_config(folder)
    if name := config.get("base_model_name_or_path"):
        return ModelConfig(name=str(name), revision=config.get("revision"))
    raise AdapterError(f"{folder / CONFIG} names no base: say which model it belongs to")


def identity_file(folder: Path) -> Path:
    """Return the file whose SHA-256 stands for the whole adapter: the manifest if there is one, else the weights."""
    return folder / files.MANIFEST if (folder / files.MANIFEST).is_file() else folder / WEIGHTS


def read_config(folder: Path) -> dict[str, Any]:
    """Read the settings PEFT keeps with an adapter; AdapterError if there are none or they are damaged."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterError(f"{folder}: not an adapter, {CONFIG} is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise AdapterError(f"{path}: not valid JSON ({error})") from None
    return config if isinstance(config, dict) else {}


def check_adapter(folder: Path, base: str, fingerprint: str, *, allow_other_base: bool = False) -> str | None:
    """Check an adapter's folder for the base of a name and fingerprint, before anything is attached to that base.

    Returns:
        A warning that the adapter is of another base (with `allow_other_base`), or that this cannot be checked;
        None if it is of this base.

    Raises:
        AdapterError: not an adapter, incomplete or damaged.
        BaseMismatchError: it was trained on another base.
    """
    record = read_record(folder)
    check_undamaged(folder)
    if record is None:
        claimed = read_config(folder).get("base_model_name_or_path")
        return f"{folder} has no {RECORD}: its base cannot be checked (it names {claimed}, this is {base})"
    if record.base_fingerprint == fingerprint:
        return None
    message = (
        f"{folder} was trained on {record.base_name!r} (fingerprint {record.base_fingerprint[:12]}), "
        f"this base is {base!r} (fingerprint {fingerprint[:12]})"
    )
    if not allow_other_base:
        advice = "Load it on its own base, or, if you mean it, pass --allow-other-base (Python: allow_other_base=True)"
        raise BaseMismatchError(f"{message}. {advice}")
    return f"{message}; loading it anyway (allow_other_base)"


def check_undamaged(folder: Path) -> None:
    """Refuse an adapter that its manifest shows to be damaged; one that PEFT wrote without us may have no manifest."""
    ours = (folder / files.MANIFEST).is_file() or (folder / RECORD).is_file()
    if ours and (problem := files.damage(folder)):
        raise AdapterError(f"damaged adapter: {problem}; restore the folder from where it was saved")
