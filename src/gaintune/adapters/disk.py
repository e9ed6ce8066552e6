"""Load adapters from disk onto a base and save them: PEFT's folder and a record of the base, written whole.

An adapter loads completely or raises an error, and `attached` gives the base back as it was.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from huggingface_hub import ModelCard
from safetensors import SafetensorError, safe_open
from torch import nn

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
from gaintune.errors import AdapterError, BaseModelError, ConfigError, one_line
from gaintune.models import Base, Checkpoint, base_fingerprint, is_hub_id, load_model, probe, save_model
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

    Warns where an adapter was trained on one of the domains of `data` with another split or template. Raises as
    `load_adapter` does.
    """
    adapter_labels(folders)  # refuses an adapter that is named twice
    records = [read_record(folder) for folder in folders]  # reports a missing folder before it fetches a base
    fingerprint = base_fingerprint(model) if folders else ""
    for folder, record in zip(folders, records, strict=True):
        check_adapter(folder, model.name, fingerprint, allow_other_base=allow_other_base)
        if record is not None and data is not None:
            warn_of_other_rows(folder, record.data, data)


def save_adapter(
    model: nn.Module, folder: str | Path, record: AdapterRecord, *, keep: Callable[[Path], None] | None = None
) -> None:
    """Write a PeftModel's active adapter, or all weights of a plain model, with its record.

    The folder appears only when it is complete. It replaces an older adapter; anything else at its path is refused. The
    same adapter gives the same bytes in every process. `keep` writes more files into it, such as a penalty's state.
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


def copy_adapter(source: Path, folder: Path, *, keep: Callable[[Path], None] | None = None) -> None:
    """Write a copy of a saved adapter, such as a snapshot, to another folder; `keep` as in `save_adapter`."""
    with files.complete_folder(folder, editable=(CARD,)) as temporary:
        shutil.copytree(source, temporary, dirs_exist_ok=True)
        if keep is not None:
            keep(temporary)


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
    config |= {"base_model_name_or_path": record.base_name, "revision": record.base_revision}
    for key, value in config.items():  # PEFT turns sets into lists in an order that changes with the process
        if isinstance(getattr(model.peft_config[name], key, None), set):
            config[key] = sorted(value)
    files.write_json(folder / CONFIG, config)


def _name_base_in_card(file: Path, base_name: str) -> None:
    """Name the base in PEFT's card by its hub id; a path or an embedded model's name means nothing to a reader."""
    if not file.is_file():
        return
    named = is_hub_id(base_name)
    card = ModelCard.load(file)
    data: Any = card.data
    data.base_model = base_name if named else None
    own = [f"base_model:adapter:{base_name}"] if named else []
    data.tags = sorted(own + [tag for tag in data.tags or () if not tag.startswith("base_model:")]) or None
    card.save(file)


def load_adapter(
    base: Base, folder: str | Path, *, trainable: bool = False, allow_other_base: bool = False
) -> nn.Module:
    """Load a saved adapter onto a base and return the adapted model; `base.model` is changed in place.

    A folder of method 'full' replaces the weights of `base.model`. With `trainable` the adapter (for 'full', every
    weight) can train further; `allow_other_base` loads it although it was trained on another base.

    Raises:
        AdapterError: incomplete, damaged, of an unknown kind, or not the keys this base and config call for.
        BaseMismatchError: it was trained on another base.
    """
    folder = Path(folder)
    _check_for(base, folder, allow_other_base)
    record = read_record(folder)
    if record is not None and record.whole:
        return _load_full(base, folder, trainable)
    return _load_peft(base, folder, trainable)


def add_adapter(model: PeftModel, base: Base, folder: str | Path, name: str, *, allow_other_base: bool = False) -> None:
    """Add a saved adapter, under a name and not active, to a model that `load_adapter` made; raises as that does."""
    folder = Path(folder)
    _check_for(base, folder, allow_other_base)
    saved = _saved_tensors(folder)
    with _loading(folder, base):
        model.load_adapter(str(folder), name, torch_device=str(base.model.device))
    try:
        _require_tensors(model, name, saved, folder, base)
    except AdapterError:
        model.delete_adapter(name)
        raise


def _check_for(base: Base, folder: Path, allow_other_base: bool) -> None:
    """Check a folder before it is loaded onto a base, and warn where it may belong to another one."""
    doubt = check_adapter(folder, base.name, base.fingerprint, allow_other_base=allow_other_base)
    if doubt:
        logger.warning("%s", doubt)


def _load_peft(base: Base, folder: Path, trainable: bool) -> nn.Module:
    from peft import PeftModel

    saved, device = _saved_tensors(folder), str(base.model.device)
    try:
        with _loading(folder, base):
            model = PeftModel.from_pretrained(base.model, str(folder), is_trainable=trainable, torch_device=device)
            _require_tensors(model, "default", saved, folder, base)
    except AdapterError:
        strip_adapters(base.model)
        raise
    if not trainable:
        model.requires_grad_(False)  # PEFT leaves some methods' adapters open
    return model


def _saved_tensors(folder: Path) -> set[str]:
    """Return the names of an adapter's tensors, if its kind is known and all of them can be read and are finite."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kind = read_config(folder).get("peft_type")
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        known = ", ".join(sorted(str(getattr(entry, "value", entry)) for entry in PEFT_TYPE_TO_CONFIG_MAPPING))
        raise AdapterError(f"{folder / CONFIG}: unknown peft_type {kind!r}; this installation knows {known}")
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


@contextlib.contextmanager
def _loading(folder: Path, base: Base) -> Iterator[None]:
    """Raise AdapterError for any error of PEFT's, such as for a wrong shape, name or config."""
    try:
        yield
    except AdapterError:
        raise
    except Exception as error:
        raise AdapterError(f"{folder}: PEFT cannot load it onto {base.name!r} ({one_line(error)[:400]})") from error


def _require_tensors(model: PeftModel, name: str, saved: set[str], folder: Path, base: Base) -> None:
    """Refuse saved tensors that the model does not use, and a model that lacks some."""
    from peft import get_peft_model_state_dict

    wanted = set(get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False))
    groups = {"missing": wanted - saved, "unexpected": saved - wanted - set(model.state_dict())}
    if problems := [f"{len(names)} {what} (first: {min(names)})" for what, names in groups.items() if names]:
        raise AdapterError(
            f"{folder}: its tensors are not those its config calls for on {base.name!r}: {', '.join(problems)}"
        )


def strip_adapters(model: nn.Module) -> None:
    """Remove every adapter layer from a base; its weights stay as they are."""
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


def _load_full(base: Base, folder: Path, trainable: bool) -> nn.Module:
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


@contextlib.contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Disable a `PeftModel`'s adapter for the block; ConfigError for another model."""
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        raise ConfigError("only a PeftModel has an adapter to switch off; measure the two models one by one")
    with model.disable_adapter():
        yield


@contextlib.contextmanager
def attached(base: Base, folder: Path, *, allow_other_base: bool = False) -> Iterator[tuple[nn.Module, bool]]:
    """Attach an adapter to a base for the block; the base is then as it was, even if loading failed halfway.

    Yields:
        The adapted model, and whether it computes exactly what the base does while the adapter is disabled.

    Raises:
        AdapterError, BaseMismatchError: as `load_adapter`.
    """
    from peft import PeftModel

    before = probe(base.model)
    model: nn.Module | None = None
    try:
        model = load_adapter(base, folder, allow_other_base=allow_other_base)
        same_when_off = False
        if isinstance(model, PeftModel):
            with model.disable_adapter():
                same_when_off = torch.equal(probe(model), before)
        yield model, same_when_off
    finally:
        if isinstance(model, PeftModel) and hasattr(model.base_model, "unload"):  # a prompt has no layers to take out
            cast(Any, model.base_model).unload()
        strip_adapters(base.model)  # the rest of an adapter that was loaded halfway
        # without a PeftModel the weights themselves may have changed, in rows that no probe reads
        if not isinstance(model, PeftModel) or not torch.equal(probe(base.model), before):
            checkpoint = Checkpoint(base.name, base.folder, base.revision)  # never quantized where weights can change
            # the model's own class needs no second permission to run a base's own code
            saved = load_model(checkpoint, base.model.dtype, torch.device("cpu"), kind=type(base.model))
            base.model.load_state_dict(saved.state_dict(), strict=True)
