"""Files and folders that are whole or not there: atomic writes, and manifests of SHA-256 sums, written last."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from gaintune.errors import RunDirectoryError
from gaintune.storage import ownership
from gaintune.storage.ownership import MANIFEST


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, as hexadecimal digits."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def canonical_json(value: Any) -> str:
    """Write JSON with sorted keys and a final newline: equal values give equal bytes. Non-finite numbers raise."""
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def as_yaml(value: Mapping[str, Any]) -> str:
    """Write nested plain values as YAML, their keys in their own order."""
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)


def make_folder(path: Path) -> None:
    """Make a folder and those above it, if they are not there; RunDirectoryError where that cannot be done."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RunDirectoryError(f"folder {path} cannot be made ({error.strerror}); name a writable folder") from None


def _beside(path: Path) -> Path:
    """Return a free name in the same folder, so that what is made there has the mode of the user's umask."""
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that either the old or the whole new file is there, whatever happens meanwhile."""
    make_folder(path.parent)
    temporary = _beside(path)
    try:
        with temporary.open("xb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text as UTF-8, atomically."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write canonical JSON atomically."""
    write_text(path, canonical_json(value))


def read_json(path: Path) -> Any:
    """Read JSON; RunDirectoryError names the file and the line where it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise RunDirectoryError(f"{path}:{error.lineno}: not valid JSON ({error.msg}); restore or delete it") from error
    except UnicodeDecodeError as error:
        raise RunDirectoryError(f"{path}: not text in UTF-8 ({error.reason}); restore or delete it") from error


def write_manifest(folder: Path, editable: Collection[str] = ()) -> None:
    """Write the manifest of the SHA-256 sums of a folder's files, atomically, once all of them are flushed to disk.

    Files named in `editable` are a person's to change, so the manifest names them without a sum.
    """
    paths = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != MANIFEST]
    for file in paths:
        _sync(file)
    names = {file.relative_to(folder).as_posix(): file for file in paths}
    sums = {name: sha256_file(file) for name, file in names.items() if name not in editable}
    named = sorted(name for name in names if name in editable)
    write_json(folder / MANIFEST, {"sha256": sums, **({"editable": named} if named else {})})


@contextlib.contextmanager
def complete_folder(path: Path, *, ours: bool = False, editable: Collection[str] = ()) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path`, with a manifest of SHA-256 sums, only if the block succeeds.

    The manifest is written last, so its presence means that the folder is whole. It has no sums of the files named in
    `editable`, which a person may change later. A `path` that was written in this way is replaced; where only this
    program writes (`ours`), such as in its cache, even if it is damaged.

    Raises:
        RunDirectoryError: `path` is there, and was not written in this way; or it cannot be made.
    """
    ownership.check_replaceable(path, ours=ours)
    make_folder(path.parent)
    temporary = _beside(path)
    temporary.mkdir()
    mode = temporary.stat().st_mode & 0o666
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(mode)  # safetensors lets the owner alone read its files, whatever the umask
        write_manifest(temporary, editable)
        ownership.discard_whole(path, ours=ours)
        temporary.replace(path)
        _sync(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def damage(path: Path) -> str | None:
    """Compare a folder with its manifest: return None when it is whole, else what is wrong, in words. Never raises."""
    manifest = path / MANIFEST
    try:
        if not manifest.is_file():
            return f"{manifest} is missing, so the folder was never finished"
        try:
            value = json.loads(manifest.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):  # neither text nor JSON, or JSON nested without end
            return f"{manifest} is not valid JSON (cut short or changed)"
        sums = value.get("sha256") if isinstance(value, dict) else None
        if not isinstance(sums, dict) or not sums:
            return f"{manifest} lists no SHA-256 sums (cut short or changed)"
        for name, expected in sums.items():
            file, parts = path / name, PurePosixPath(name).parts
            if not parts or parts[0] == "/" or ".." in parts:
                return f"{manifest} lists {name!r}, which is not a file of the folder"
            if not file.is_file():
                return f"{file} is missing"
            if sha256_file(file) != expected:
                return f"{file} does not match its SHA-256 in {MANIFEST} (cut short or changed)"
    except (OSError, ValueError) as error:  # a file that cannot be read, or a name that no file can have
        return f"{path} cannot be checked ({error})"
    return None
