"""Adapters on disk: PEFT's folder with a record of its base, written whole and loaded loudly or not at all."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError, safe_open

from gaintune import runs
from gaintune.checkpoints import Checkpoint
from gaintune.config import ModelConfig
from gaintune.errors import (
    AdapterError,
    BaseMismatchError,
    BaseModelError,
    ConfigError,
    RunDirectoryError,
    one_line,
)
from gaintune.models import Base, load_model, save_model

if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.getLogger(__name__)

RECORD = "gaintune.json"
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
FULL = "full"
FORMAT = 1


@dataclass(frozen=True)
class AdapterRecord:
    """What an adapter was trained on and how.

    `base_name` is the base as the user named it; `content_hashes` has the hash of the text of each of `domains`;
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


def save_adapter(
    model: torch.nn.Module,
    folder: str | Path,
    record: AdapterRecord,
    *,
    keep: Callable[[Path], None] | None = None,
) -> None:
    """Write a PeftModel's active adapter, or the whole of a plain model, with its record.

    The folder appears only when it is whole; an existing one is replaced. The same adapter gives the same bytes,
    whatever the process. `keep` writes further files into it, such as what a penalty must remember.
    """
    from peft import PeftModel

    with runs.complete_folder(Path(folder)) as temporary:
        if isinstance(model, PeftModel):
            _save_peft(model, temporary, record)
        else:
            save_model(cast(Any, model), temporary)
        if keep is not None:
            keep(temporary)
        runs.write_json(temporary / RECORD, {"format": FORMAT, **asdict(record)})


def _save_peft(model: PeftModel, folder: Path, record: AdapterRecord) -> None:
    name = str(model.active_adapter)
    # Embeddings are frozen here; left to itself PEFT asks the hub about the base to find out.
    model.save_pretrained(str(folder), selected_adapters=[name], save_embedding_layers=False)
    if name != "default":  # PEFT puts other names into a subfolder
        for file in (folder / name).iterdir():
            file.rename(folder / file.name)
        (folder / name).rmdir()
    (folder / "README.md").unlink(missing_ok=True)  # a form to fill in; one written later is not under the manifest
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = record.base_name
    config["revision"] = record.base_revision
    for key, value in config.items():  # PEFT turns sets into lists in an order that changes with the process
        if isinstance(getattr(model.peft_config[name], key, None), set):
            config[key] = sorted(value)
    runs.write_json(folder / CONFIG, config)


def read_record(folder: Path) -> AdapterRecord | None:
    """The record of an adapter; None for an adapter that PEFT wrote without us.

    Raises:
        AdapterError: not an adapter folder, or a damaged record.
    """
    if not folder.is_dir():
        raise AdapterError(f"{folder}: no such adapter folder")
    path = folder / RECORD
    if not path.is_file():
        if (folder / CONFIG).is_file():
            return None
        raise AdapterError(f"{folder}: not an adapter, it has neither {RECORD} nor {CONFIG}")
    try:
        values = runs.read_json(path)
        values["domains"] = tuple(values["domains"])
        values["labels"] = tuple(values.get("labels", ()))
        known = {entry.name for entry in fields(AdapterRecord)}
        return AdapterRecord(**{key: value for key, value in values.items() if key in known})
    except (RunDirectoryError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise AdapterError(f"{path}: damaged record ({error}); restore the folder from where it was saved") from None


def adapter_labels(folders: Sequence[Path]) -> list[str]:
    """What adapters are called beside one another: their folders; ConfigError where one is named twice."""
    labels = [str(folder) for folder in folders]
    if len(set(labels)) != len(labels):
        raise ConfigError(f"an adapter is named twice: {', '.join(labels)}")
    return labels


def claimed_base(folder: Path, record: AdapterRecord | None) -> ModelConfig:
    """The base an adapter names as its own; AdapterError if it names none."""
    if record is not None:
        return ModelConfig(name=str(record.base_name), revision=record.base_revision)
    config = read_config(folder)
    if not config.get("base_model_name_or_path"):
        raise AdapterError(f"{folder / CONFIG} names no base: say which model it belongs to")
    return ModelConfig(name=str(config["base_model_name_or_path"]), revision=config.get("revision"))


def adapter_weights(folder: Path) -> Path:
    """The file whose SHA-256 stands for the whole adapter: the manifest where there is one, else the weights."""
    return folder / runs.MANIFEST if (folder / runs.MANIFEST).is_file() else folder / WEIGHTS


def load_adapter(
    base: Base, folder: str | Path, *, trainable: bool = False, allow_other_base: bool = False
) -> torch.nn.Module:
    """Put a saved adapter onto a base, and return the adapted model; `base.model` is changed in place.

    A folder of method 'full' replaces the weights of `base.model`.

    Args:
        trainable: leave the adapter (for 'full', every weight) open to training, to carry on where it stopped.
        allow_other_base: load it although it was trained on another base.

    Raises:
        AdapterError: incomplete, damaged, of an unknown kind, or not the keys this base and config call for.
        BaseMismatchError: it was trained on another base.
    """
    folder = Path(folder)
    record = read_record(folder)
    _check_whole(folder)
    if record is None:
        claimed = read_config(folder).get("base_model_name_or_path")
        logger.warning(
            "%s has no %s: whether it was trained on this base cannot be checked (it names %s, this is %s)",
            folder, RECORD, claimed, base.name,
        )  # fmt: skip
    elif record.base_fingerprint != base.fingerprint:
        message = (
            f"{folder} was trained on {record.base_name!r} (fingerprint {record.base_fingerprint[:12]}), "
            f"this base is {base.name!r} (fingerprint {base.fingerprint[:12]})"
        )
        if not allow_other_base:
            raise BaseMismatchError(
                f"{message}. Load it on its own base, or, if you mean it, pass --allow-other-base "
                "(Python: allow_other_base=True)"
            )
        logger.warning("%s; loading it all the same, as asked", message)
    if record is not None and record.method == FULL:
        return _load_full(base, folder, trainable)
    return _load_peft(base, folder, trainable)


def _check_whole(folder: Path) -> None:
    """An adapter of ours has a manifest; one without a record may have none."""
    if (folder / runs.MANIFEST).is_file() or (folder / RECORD).is_file():
        try:
            problem = runs.damage(folder)
        except (RunDirectoryError, KeyError, TypeError, AttributeError, UnicodeDecodeError):
            problem = f"{folder / runs.MANIFEST} is damaged"
        if problem:
            raise AdapterError(f"{folder}: the adapter is cut short or changed: {problem}")


def read_config(folder: Path) -> dict[str, Any]:
    """The settings PEFT keeps with an adapter; AdapterError if there are none or they are damaged."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterError(f"{folder}: not an adapter, {CONFIG} is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise AdapterError(f"{path}: not valid JSON ({error})") from None
    return config if isinstance(config, dict) else {}


def _read_tensors(folder: Path) -> set[str]:
    """Names of the saved tensors, once every one has been read and found finite."""
    path = folder / WEIGHTS
    if not path.is_file():
        if (folder / "adapter_model.bin").is_file():
            raise AdapterError(f"{folder}: pickled weights can run code when opened; save it again as {WEIGHTS}")
        raise AdapterError(f"{folder}: {WEIGHTS} is missing")
    try:
        with safe_open(path, framework="pt") as tensors:
            names = set(tensors.keys())
            for name in sorted(names):
                tensor = tensors.get_tensor(name)
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    raise AdapterError(f"{path}: {name} holds values that are not finite")
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path}: not a safetensors file, or cut short ({error})") from None
    return names


def _load_peft(base: Base, folder: Path, trainable: bool) -> torch.nn.Module:
    from peft import PeftModel, get_peft_model_state_dict
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kind = read_config(folder).get("peft_type")
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        known = ", ".join(sorted(str(getattr(entry, "value", entry)) for entry in PEFT_TYPE_TO_CONFIG_MAPPING))
        raise AdapterError(f"{folder / CONFIG}: unknown peft_type {kind!r}; this installation knows {known}")
    saved = _read_tensors(folder)
    try:
        model = PeftModel.from_pretrained(
            base.model, str(folder), is_trainable=trainable, torch_device=str(base.model.device)
        )
        wanted = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    except Exception as error:  # PEFT raises whatever the wrong shape, name or config happens to break
        _strip(base.model)
        reason = one_line(error)[:400]
        raise AdapterError(f"{folder}: PEFT cannot load it onto {base.name!r} ({reason})") from error
    unexpected = sorted(saved - wanted - set(model.state_dict()))
    missing = sorted(wanted - saved)
    if missing or unexpected:
        _strip(base.model)
        groups = (("missing", missing), ("unexpected", unexpected))
        found = ", ".join(f"{len(names)} {what} (first: {names[0]})" for what, names in groups if names)
        raise AdapterError(f"{folder}: its tensors are not those its config calls for on {base.name!r}: {found}")
    if not trainable:
        model.requires_grad_(False)  # PEFT leaves some methods' adapters open
    return model


def _strip(model: torch.nn.Module) -> None:
    """Take every adapter layer out of a base again, after loading one has failed half-way."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            inner: Any = module.get_base_layer()
        elif isinstance(module, AuxiliaryTrainingWrapper):
            inner = module.original_module
        else:
            continue
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, inner)
    if hasattr(model, "peft_config"):
        del model.peft_config


def _load_full(base: Base, folder: Path, trainable: bool) -> torch.nn.Module:
    """Copy fully fine-tuned weights into the base's own parameters, whose dtype and device stay."""
    model: Any = base.model
    try:
        saved = load_model(Checkpoint(str(folder), folder), model.dtype, torch.device("cpu"), kind=type(model))
    except BaseModelError as error:
        raise AdapterError(f"{folder}: {error}") from error
    own, weights = model.state_dict(), saved.state_dict()
    odd = sorted({*own} ^ {*weights} | {name for name in {*own} & {*weights} if own[name].shape != weights[name].shape})
    if odd:
        raise AdapterError(f"{folder}: its weights do not fit {base.name!r}, {len(odd)} differ (first: {odd[0]})")
    model.load_state_dict(weights, strict=True)
    return model.requires_grad_(trainable).train(trainable)
