"""What is on disk survives: atomic writes, folders with a manifest written last, and the run directory."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import yaml
from filelock import FileLock, Timeout

from gaintune.errors import GaintuneError, RunDirectoryError, one_line
from gaintune.storage import ownership
from gaintune.storage.diff import differences
from gaintune.storage.files import canonical_json, make_folder, read_json, write_json, write_text
from gaintune.storage.ownership import LOCK, MARKER, SEQUENCE, TAKING, Kind

logger = logging.getLogger(__name__)

PATIENCE = 5.0
"""Seconds of waiting in silence."""


@contextlib.contextmanager
def locked(path: Path, doing: str, *, patience: float = PATIENCE) -> Iterator[None]:
    """Hold a lock file, after whoever holds it; `doing` says what that is, such as 'measuring law'."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=patience)
    except Timeout:
        logger.warning("waiting: another process is %s, and what it finds is used here (it holds %s)", doing, path)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


T = TypeVar("T")


def read_stored(path: Path, parse: Callable[[Any], T]) -> T:
    """Read a JSON file and return what `parse` makes of it.

    Raises:
        RunDirectoryError: the file is damaged, or holds something that `parse` cannot use.
    """
    value = read_json(path)
    try:
        return parse(value)
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        problem = str(error) if isinstance(error, GaintuneError) else f"damaged ({error!r})"
        raise RunDirectoryError(f"{path}: {problem}; restore or delete it") from error


def stage_folder(run: Path, label: str, index: int, domain: str) -> Path:
    """Where a run directory keeps one stage of one method; `index` counts from 0."""
    return run / "stages" / label / f"{index + 1:02d}-{domain}"


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


def close_run(folder: Path, kind: Kind) -> None:
    """Delete a run directory that is no longer wanted; what this program did not write stays, and a warning says so."""
    ownership.discard(folder, kind.names, last=MARKER)
    with contextlib.suppress(OSError):
        folder.rmdir()
    if folder.exists():
        logger.warning("%s is kept: it holds files that this program did not write", folder)


def _leave(folder: Path, kind: Kind) -> None:
    """Remove a run directory that holds nothing but what taking it made."""
    with contextlib.suppress(OSError):
        (folder / "checkpoints").rmdir()  # empty
    if {entry.name for entry in folder.iterdir()} <= {*TAKING}:
        close_run(folder, kind)


def _start_over(folder: Path, kind: Kind) -> None:
    """Clear what a plan left that got no further than its beginning.

    Raises:
        RunDirectoryError: something else lies there too; nothing is deleted.
    """
    stranger = next(ownership.strangers(folder, kind.names), None)
    if stranger is not None:
        raise RunDirectoryError(
            f"{folder} was begun with another plan, and holds {stranger}, which no {kind.noun} wrote: move that "
            "elsewhere, or name another folder"
        )
    ownership.discard(folder, {*kind.names} - {LOCK, MARKER, "plan.yaml"})


@contextlib.contextmanager
def take_folder(folder: Path, kind: Kind) -> Iterator[None]:
    """Hold a folder that is new or of this kind; it is marked as such. One process at a time.

    Raises:
        RunDirectoryError: it is of another kind, holds what this program did not write, or is in use.
    """
    ownership.check_folder(folder, kind)
    make_folder(folder)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise RunDirectoryError(f"{folder} is in use by another process; wait for it or name another folder") from None
    try:
        ownership.check_folder(folder, kind)  # whatever became of it meanwhile
        if ownership.kind_of(folder) is None:
            write_json(folder / MARKER, kind.marker)
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def open_run(
    folder: Path,
    plan: Mapping[str, Any],
    environment: Mapping[str, Any],
    *,
    kind: Kind = SEQUENCE,
    cpu: bool = True,
    fleeting: bool = False,
) -> Iterator[Run]:
    """Take a run directory for a plan: a new one, or the one that plan began. One run at a time.

    Of several processes (`accelerate launch`) the first takes it and the others join when it is ready. One that is
    `fleeting` is gone again if the block fails before anything is trained. A folder that this program did not begin is
    refused before anything in it is touched.

    Raises:
        RunDirectoryError: the directory belongs to another plan, holds something else, or is in use.
    """
    if not first_process():
        _wait_for_all(cpu)
        yield Run(folder, writes=False)
        return
    with _taken(folder, plan, environment, kind) as run:
        try:
            _wait_for_all(cpu)
            yield run
        except BaseException:
            if fleeting and _nothing_finished(folder):
                _leave(folder, kind)
            raise


@contextlib.contextmanager
def _taken(folder: Path, plan: Mapping[str, Any], environment: Mapping[str, Any], kind: Kind) -> Iterator[Run]:
    """Check and lock a run directory in the process that writes."""
    plan_file = folder / "plan.yaml"
    ownership.check_folder(folder, kind)
    if ownership.kind_of(folder) is None and plan_file.exists():  # of an earlier version, or it would have a marker
        _refuse(folder, _other_plan(plan_file, plan))
    with take_folder(folder, kind):
        run = Run(folder)
        if not plan_file.exists():
            write_text(plan_file, as_yaml(plan))
        elif changed := _other_plan(plan_file, plan):
            if not _nothing_finished(folder):
                _refuse(folder, changed)
            _start_over(folder, kind)  # such as after a mistake in the plan: the corrected one is welcome
            write_text(plan_file, as_yaml(plan))
        if (folder / "environment.json").exists():
            then = read_json(folder / "environment.json")
            if moved := differences(json.loads(canonical_json(environment)), then):
                run.event("environment changed", differences=moved)
        else:
            write_json(folder / "environment.json", environment)
        yield run


def as_yaml(plan: Mapping[str, Any]) -> str:
    """Return nested plain values as the YAML in which a run keeps its plan."""
    return yaml.safe_dump(plan, sort_keys=False, allow_unicode=True)


def _stored_plan(plan_file: Path) -> Any:
    """Read the plan that a run directory was begun with; RunDirectoryError where it cannot be read."""
    try:
        return yaml.safe_load(plan_file.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RunDirectoryError(f"{plan_file} cannot be read ({one_line(error)}); restore or delete it") from None


def _other_plan(plan_file: Path, plan: Mapping[str, Any]) -> list[str]:
    """What a stored plan says otherwise."""
    return differences(plan, _stored_plan(plan_file))


def _refuse(folder: Path, changed: list[str]) -> None:
    """Refuse a run directory of another plan."""
    if changed:
        raise RunDirectoryError(
            f"{folder} belongs to another plan ({'; '.join(changed)}); name another folder, go on with that "
            f"plan ({folder / 'plan.yaml'}), or delete the folder"
        )
