"""What is on disk survives: atomic writes, folders with a manifest written last, and the run directory."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from gaintune.config.plan import Plan, plan_yaml
from gaintune.storage.differences import differences
from gaintune.errors import RunDirectoryError

MANIFEST = "manifest.json"
TAKING = {"plan.yaml", "environment.json", "inputs.json", "events.jsonl", ".lock"}


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as hexadecimal digits."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def canonical_json(value: Any) -> str:
    """JSON text with sorted keys and a final newline: the same value gives the same bytes. Non-finite numbers raise."""
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def make_folder(path: Path) -> None:
    """Make a folder and those above it, if they are not there; RunDirectoryError where that cannot be done."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RunDirectoryError(
            f"folder {path} cannot be made ({error.strerror}); name one where files can be written"
        ) from None


def _beside(path: Path) -> Path:
    """A name that is free, in the same folder: what is made under it has the mode that the user's umask gives."""
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that it is either the old one or the whole new one, whatever happens meanwhile."""
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
    """Read JSON, naming the file and the line when it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise RunDirectoryError(f"{path}:{error.lineno}: not valid JSON ({error.msg}); restore or delete it") from error


def write_manifest(folder: Path) -> None:
    """Flush every file of a folder to disk, then write the manifest of their SHA-256 sums, last and atomically."""
    files = sorted(entry for entry in folder.rglob("*") if entry.is_file() and entry.name != MANIFEST)
    for file in files:
        _sync(file)
    sums = {file.relative_to(folder).as_posix(): sha256_file(file) for file in files}
    write_json(folder / MANIFEST, {"sha256": sums})


def stage_folder(run: Path, label: str, index: int, domain: str) -> Path:
    """Where a run directory keeps one stage of one method; `index` counts from 0."""
    return run / "stages" / label / f"{index + 1:02d}-{domain}"


@contextlib.contextmanager
def complete_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path`, with a manifest of SHA-256 sums, only if the block succeeds.

    An existing `path` is replaced. The manifest is written last, so its presence means that the folder is whole.
    """
    make_folder(path.parent)
    temporary = _beside(path)
    temporary.mkdir()
    mode = temporary.stat().st_mode & 0o666
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(mode)  # safetensors writes for the owner's eyes only, whatever the umask says
        write_manifest(temporary)
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


def _wait_for_all(cpu: bool = False) -> None:
    """Meet the other processes of this run; nothing to do for a process on its own."""
    if process_count() > 1:
        from accelerate import PartialState

        PartialState(cpu=cpu).wait_for_everyone()


def process_count() -> int:
    """How many processes work on this run: one, or as many as `accelerate launch` started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def first_process() -> bool:
    """Whether this is the process that writes: the only one, or rank 0 of those that `accelerate launch` started."""
    return os.environ.get("RANK", "0") == "0"


@dataclass(frozen=True)
class Run:
    """A run directory: where everything of a sequence lies. Of several processes on one run, the first one writes."""

    folder: Path
    writes: bool = True

    @property
    def matrix(self) -> Path:
        """All numbers of the run."""
        return self.folder / "matrix.json"

    def base(self, numbers: str, domain: str) -> Path:
        """Losses of the untouched base on one domain, in the numbers (such as bf16) a method computes with."""
        return self.folder / "base" / numbers / f"{domain}.json"

    def stage(self, label: str, index: int, domain: str) -> Path:
        """Folder of one stage of one method; `index` counts from 0."""
        return stage_folder(self.folder, label, index, domain)

    def event(self, event: str, **fields: Any) -> None:
        """Append one line to events.jsonl: what happened and when (UTC)."""
        if not self.writes:
            return
        record = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "event": event, **fields}
        with (self.folder / "events.jsonl").open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(record, sort_keys=True) + "\n")

    def write_json(self, path: Path, value: Any) -> None:
        """Write a file of the run, in the process that writes."""
        if self.writes:
            write_json(path, value)

    def wait(self) -> None:
        """Wait until every process of the run is here."""
        _wait_for_all()

    def settle(self, name: str, value: Mapping[str, Any], advice: str) -> None:
        """Write a file that must never change during a run, or check that it has not.

        Raises:
            RunDirectoryError: the file says something else; each difference is named.
        """
        path = self.folder / name
        value = json.loads(canonical_json(value))
        if not path.exists():
            self.write_json(path, value)
        elif changed := differences(value, read_json(path)):
            raise RunDirectoryError(f"{path} says otherwise: {'; '.join(changed)}. {advice}")


def _nothing_finished(folder: Path) -> bool:
    """Whether no training result of any kind lies in a run directory yet."""
    return not any(folder.glob("stages/*/*/adapter")) and not any(folder.rglob("checkpoint-*"))


def _leave(folder: Path) -> None:
    """Remove a run directory that holds nothing but what taking it made."""
    with contextlib.suppress(OSError):
        (folder / "checkpoints").rmdir()  # empty
    if {entry.name for entry in folder.iterdir()} <= TAKING:
        shutil.rmtree(folder)


def _start_over(folder: Path) -> None:
    """Clear what a plan left that got no further than its beginning."""
    for entry in folder.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != ".lock":
            entry.unlink()


@contextlib.contextmanager
def open_run(
    folder: Path, plan: Plan, environment: Mapping[str, Any], *, cpu: bool = True, fleeting: bool = False
) -> Iterator[Run]:
    """Take a run directory for a plan: a new one, or the one that plan began. One run at a time.

    Of several processes (`accelerate launch`) the first takes it and the others join when it is ready. One that is
    `fleeting` is gone again if the block fails before anything is trained.

    Raises:
        RunDirectoryError: the directory belongs to another plan, holds something else, or is in use.
    """
    if not first_process():
        _wait_for_all(cpu)
        yield Run(folder, writes=False)
        return
    with _taken(folder, plan, environment) as run:
        try:
            _wait_for_all(cpu)
            yield run
        except BaseException:
            if fleeting and _nothing_finished(folder):
                _leave(folder)
            raise


@contextlib.contextmanager
def _taken(folder: Path, plan: Plan, environment: Mapping[str, Any]) -> Iterator[Run]:
    """Check and lock a run directory in the process that writes."""
    plan_file = folder / "plan.yaml"
    if folder.exists() and not folder.is_dir():
        raise RunDirectoryError(f"{folder} is a file; name a folder for the run")
    if folder.exists() and not plan_file.exists() and any(entry.name != ".lock" for entry in folder.iterdir()):
        raise RunDirectoryError(f"{folder} is not empty and has no plan.yaml, so it is not a run; name another folder")
    make_folder(folder)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise RunDirectoryError(f"{folder} is in use by another process; wait for it or name another folder") from None
    try:
        run = Run(folder)
        if plan_file.exists():
            changed = differences(plan.model_dump(mode="json"), yaml.safe_load(plan_file.read_text(encoding="utf-8")))
            if changed and _nothing_finished(folder):
                _start_over(folder)  # such as after a mistake in the plan: the corrected one is welcome
                write_text(plan_file, plan_yaml(plan))
            elif changed:
                raise RunDirectoryError(
                    f"{folder} belongs to another plan ({'; '.join(changed)}); name another folder, go on with that "
                    f"plan ({plan_file}), or delete the folder"
                )
            if (folder / "environment.json").exists():
                then = read_json(folder / "environment.json")
                if moved := differences(json.loads(canonical_json(environment)), then):
                    run.event("environment changed", differences=moved)
        else:
            write_text(plan_file, plan_yaml(plan))
        if not (folder / "environment.json").exists():
            write_json(folder / "environment.json", environment)
        yield run
    finally:
        lock.release()
