"""Adapters on disk: PEFT's folder with a record of its base, written whole and loaded loudly or not at all."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from huggingface_hub import ModelCard
from safetensors import SafetensorError, safe_open

from gaintune.adapters.record import (
    CONFIG,
    RECORD,
    WEIGHTS,
    AdapterRecord,
    adapter_labels,
    check_adapter,
    read_config,
    read_record,
    warn_of_other_rows,
)
from gaintune.config import DataConfig, ModelConfig
from gaintune.errors import AdapterError, BaseModelError, one_line
from gaintune.models import Base, Checkpoint, base_fingerprint, is_hub_id, load_model, save_model
from gaintune.storage import files

if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.getLogger(__name__)

CARD = "README.md"
FORMAT = 1


def check_adapters(
    folders: Sequence[Path], model: ModelConfig, data: DataConfig | None = None, *, allow_other_base: bool = False
) -> None:
    """Check adapters and the base they are meant for by their files alone, before any model is loaded.

    Args:
        folders: the adapters.
        model: the base.
        data: domains to measure or to learn: warns where an adapter has learnt one with another split or template.
        allow_other_base: let adapters pass that were trained on another base.

    Raises:
        AdapterError, BaseMismatchError: as `load_adapter` would.
    """
    adapter_labels(folders)  # refuses an adapter that is named twice
    records = [read_record(folder) for folder in folders]  # a folder that is not there is said before a base is fetched
    fingerprint = base_fingerprint(model) if folders else ""
    for folder, record in zip(folders, records, strict=True):
        check_adapter(folder, model.name, fingerprint, allow_other_base=allow_other_base)
        if record is not None and data is not None:
            warn_of_other_rows(folder, record.data, data)


def save_adapter(
    model: torch.nn.Module,
    folder: str | Path,
    record: AdapterRecord,
    *,
    keep: Callable[[Path], None] | None = None,
) -> None:
    """Write a PeftModel's active adapter, or the whole of a plain model, with its record.

    The folder appears only when it is whole; an adapter that is there is replaced, anything else refused. The same
    adapter gives the same bytes, whatever the process. `keep` writes further files into it, such as what a penalty must
    remember.
    """
    from peft import PeftModel

    with files.complete_folder(Path(folder), editable=(CARD,)) as temporary:
        if isinstance(model, PeftModel):
            _save_peft(model, temporary, record)
        else:
            save_model(cast(Any, model), temporary)
        if keep is not None:
            keep(temporary)
        files.write_json(temporary / RECORD, {"format": FORMAT, **record.to_dict()})


def _save_peft(model: PeftModel, folder: Path, record: AdapterRecord) -> None:
    name = str(model.active_adapter)
    # Embeddings are frozen here; left to itself PEFT asks the hub about the base to find out.
    model.save_pretrained(str(folder), selected_adapters=[name], save_embedding_layers=False)
    if name != "default":  # PEFT puts other names into a subfolder
        for file in (folder / name).iterdir():
            file.rename(folder / file.name)
        (folder / name).rmdir()
    _name_base_in_card(folder / CARD, record.base_name)
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = record.base_name
    config["revision"] = record.base_revision
    for key, value in config.items():  # PEFT turns sets into lists in an order that changes with the process
        if isinstance(getattr(model.peft_config[name], key, None), set):
            config[key] = sorted(value)
    files.write_json(folder / CONFIG, config)


def _name_base_in_card(file: Path, base_name: str) -> None:
    """Let PEFT's card name the base by its hub id; a path of this machine or 'demo' means nothing to a reader."""
    if not file.is_file():
        return
    named = is_hub_id(base_name)
    card = ModelCard.load(file)
    data: Any = card.data
    data.base_model = base_name if named else None
    tags = [tag for tag in data.tags or () if not tag.startswith("base_model:")]
    data.tags = sorted([*tags, *([f"base_model:adapter:{base_name}"] if named else ())]) or None
    card.save(file)


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
    doubt = check_adapter(folder, base.name, base.fingerprint, allow_other_base=allow_other_base)
    if doubt:
        logger.warning("%s", doubt)
    record = read_record(folder)
    if record is not None and record.whole:
        return _load_full(base, folder, trainable)
    return _load_peft(base, folder, trainable)


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


def add_adapter(model: PeftModel, base: Base, folder: str | Path, name: str, *, allow_other_base: bool = False) -> None:
    """Put one more saved adapter beside those on a model that `load_adapter` made, under a name and not active.

    Raises:
        AdapterError, BaseMismatchError: as `load_adapter` does, and for another method's adapter.
    """
    folder = Path(folder)
    doubt = check_adapter(folder, base.name, base.fingerprint, allow_other_base=allow_other_base)
    if doubt:
        logger.warning("%s", doubt)
    saved = _known_tensors(folder)
    try:
        model.load_adapter(str(folder), name, torch_device=str(base.model.device))
    except Exception as error:
        raise _refusal(folder, base, error) from error
    problem = _wrong_keys(model, name, saved)
    if problem:
        model.delete_adapter(name)
        raise AdapterError(f"{folder}: its tensors are not those its config calls for on {base.name!r}: {problem}")


def _load_peft(base: Base, folder: Path, trainable: bool) -> torch.nn.Module:
    from peft import PeftModel

    saved = _known_tensors(folder)
    try:
        model = PeftModel.from_pretrained(
            base.model, str(folder), is_trainable=trainable, torch_device=str(base.model.device)
        )
        problem = _wrong_keys(model, "default", saved)
    except Exception as error:
        strip_adapters(base.model)
        raise _refusal(folder, base, error) from error
    if problem:
        strip_adapters(base.model)
        raise AdapterError(f"{folder}: its tensors are not those its config calls for on {base.name!r}: {problem}")
    if not trainable:
        model.requires_grad_(False)  # PEFT leaves some methods' adapters open
    return model


def _known_tensors(folder: Path) -> set[str]:
    """The names of an adapter's tensors, once its kind is found to be known."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kind = read_config(folder).get("peft_type")
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        known = ", ".join(sorted(str(getattr(entry, "value", entry)) for entry in PEFT_TYPE_TO_CONFIG_MAPPING))
        raise AdapterError(f"{folder / CONFIG}: unknown peft_type {kind!r}; this installation knows {known}")
    return _read_tensors(folder)


def _refusal(folder: Path, base: Base, error: Exception) -> AdapterError:
    """PEFT raises whatever the wrong shape, name or config happens to break."""
    return AdapterError(f"{folder}: PEFT cannot load it onto {base.name!r} ({one_line(error)[:400]})")


def _wrong_keys(model: PeftModel, name: str, saved: set[str]) -> str:
    """Which saved tensors the model has no place for, and which it lacks, in words; nothing where all is well."""
    from peft import get_peft_model_state_dict

    wanted = set(get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False))
    unexpected = sorted(saved - wanted - set(model.state_dict()))
    groups = (("missing", sorted(wanted - saved)), ("unexpected", unexpected))
    return ", ".join(f"{len(names)} {what} (first: {names[0]})" for what, names in groups if names)


def strip_adapters(model: torch.nn.Module) -> None:
    """Take every adapter layer out of a base again, which leaves its weights as they are."""
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
