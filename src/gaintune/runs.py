"""What is on disk survives: atomic writes, folders with a manifest written last, locks, and event logs."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gaintune.errors import RunDirectoryError

MANIFEST = "manifest.json"


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as hexadecimal digits."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def canonical_json(value: Any) -> str:
    """JSON text with sorted keys and a final newline: the same value gives the same bytes. Non-finite numbers raise."""
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is either the old one or the whole new one, whatever happens meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write canonical JSON atomically."""
    write_text(path, canonical_json(value))


def read_json(path: Path) -> Any:
    """Read JSON, naming the file and the line when it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise RunDirectoryError(f"{path}:{error.lineno}: not valid JSON ({error.msg}); restore or delete it") from error


@contextlib.contextmanager
def complete_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path`, with a manifest of SHA-256 sums, only if the block succeeds.

    An existing `path` is replaced. The manifest is written last, so its presence means that the folder is whole.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        files = sorted(entry for entry in temporary.rglob("*") if entry.is_file())
        for file in files:
            _sync(file)
        sums = {file.relative_to(temporary).as_posix(): sha256_file(file) for file in files}
        write_json(temporary / MANIFEST, {"sha256": sums})
        temporary.chmod(0o755)
        if path.exists():
            shutil.rmtree(path)
        temporary.replace(path)
        _sync(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def damage(path: Path) -> str | None:
    """Compare a folder with its manifest: None when whole, else what is wrong with it, in words."""
    manifest = path / MANIFEST
    if not manifest.is_file():
        return f"{manifest} is missing, so the folder was never finished"
    for name, expected in read_json(manifest)["sha256"].items():
        file = path / name
        if not file.is_file():
            return f"{file} is missing"
        if sha256_file(file) != expected:
            return f"{file} does not match its SHA-256 in {MANIFEST} (cut short or changed)"
    return None


def append_event(path: Path, event: str, **fields: Any) -> None:
    """Append one line to an event log: what happened and when (UTC)."""
    record = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "event": event, **fields}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as handle:
        handle.write(json.dumps(record, sort_keys=True) + "\n")
