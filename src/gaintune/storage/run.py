"""The run directory: taken for one plan, locked, and continued; several processes of a run share it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import yaml
from filelock import FileLock, Timeout

from gaintune.errors import GaintuneError, RunDirectoryError, one_line
from gaintune.storage import ownership
from gaintune.storage.files import as_yaml, canonical_json, make_folder, read_json, write_json, write_text
from gaintune.storage.ownership import LOCK, MARKER, SEQUENCE, TAKING, Kind

logger = logging.getLogger(__name__)

T = TypeVar("T")
PATIENCE = 5.0  # seconds before a process that waits says so


@contextlib.contextmanager
def locked(path: Path, doing: str, *, patience: float = PATIENCE) -> Iterator[None]:
    """Hold a lock file once it is free; `doing` says what its holder does, such as 'measuring law'."""
    lock = FileLock(path)
    try:
        held = lock.acquire(timeout=patience)
    except Timeout:
        logger.warning("waiting: another process is %s, and what it finds is used here (it holds %s)", doing, path)
        held = lock.acquire()
    with held:
        yield


def read_stored(path: Path, parse: Callable[[Any], T]) -> T:
    """Read a JSON file and return what `parse` makes of it; RunDirectoryError where it is damaged or `parse` fails."""
    value = read_json(path)
    try:
        return parse(value)
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        problem = str(error) if isinstance(error, GaintuneError) else f"damaged ({error!r})"
        raise RunDirectoryError(f"{path}: {problem}; restore or delete it") from error


def process_count() -> int:
    """Return how many processes work on this run: one, or as many as `accelerate launch` started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def first_process() -> bool:
    """Tell whether this process writes: the only one, or rank 0 of those that `accelerate launch` started."""
    return os.environ.get("RANK", "0") == "0"


def _wait_for_all(cpu: bool = False) -> None:
    """Wait for the other processes of this run, if there are any."""
    if process_count() > 1:
        from accelerate import PartialState

        PartialState(cpu=cpu).wait_for_everyone()


@dataclass(frozen=True)
class Run:
    """A run directory, which holds everything of a sequence; of several processes on one run, the first one writes."""

    folder: Path
    writes: bool = True

    @property
    def matrix(self) -> Path:
        """File of all numbers of the run."""
        return self.folder / "matrix.json"

    def base(self, precision: str, domain: str) -> Path:
        """Return the file of the base's losses on one domain, in the precision (such as bf16) of a method."""
        return self.folder / "base" / precision / f"{domain}.json"

    def stage(self, label: str, index: int, domain: str) -> Path:
        """Return the folder of one stage of one method; `index` counts from 0."""
        return self.folder / "stages" / label / f"{index + 1:02d}-{domain}"

    def event(self, event: str, **fields: Any) -> None:
        """Add one line to events.jsonl: what happened and when (UTC)."""
        record = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "event": event, **fields}
        if self.writes:
            with (self.folder / "events.jsonl").open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(record, sort_keys=True) + "\n")

    def write_json(self, path: Path, value: Any) -> None:
        """Write a file of the run, if this process writes."""
        if self.writes:
            write_json(path, value)

    def wait(self) -> None:
        """Wait until every process of the run has come here."""
        _wait_for_all()

    def write_once(self, name: str, value: Mapping[str, Any], advice: str) -> None:
        """Write a file that must not change during a run; RunDirectoryError lists how the existing one differs."""
        path = self.folder / name
        value = json.loads(canonical_json(value))
        if not path.exists():
            self.write_json(path, value)
        elif changed := differences(value, read_json(path)):
            raise RunDirectoryError(f"{path} says otherwise: {'; '.join(changed)}. {advice}")


def _nothing_finished(folder: Path) -> bool:
    """Tell whether a run directory holds no training result of any kind yet."""
    return not any(folder.glob("stages/*/*/adapter")) and not any(folder.rglob("checkpoint-*"))


def close_run(folder: Path, kind: Kind) -> None:
    """Delete a run directory that is no longer wanted; what this program did not write stays, and a warning says so."""
    ownership.discard(folder, kind.names, last=MARKER)
    with contextlib.suppress(OSError):
        folder.rmdir()
    if folder.exists():
        logger.warning("%s is kept: it holds files that this program did not write", folder)


def _remove_unused(folder: Path, kind: Kind) -> None:
    """Remove a run directory that holds nothing but what was written to take it."""
    with contextlib.suppress(OSError):
        (folder / "checkpoints").rmdir()  # empty
    if {entry.name for entry in folder.iterdir()} <= {*TAKING}:
        close_run(folder, kind)


def _start_over(folder: Path, kind: Kind) -> None:
    """Clear what a plan without results left; RunDirectoryError, and nothing is deleted, if something else is there."""
    if stranger := next(ownership.strangers(folder, kind.names), None):
        raise RunDirectoryError(
            f"{folder} was begun with another plan, and holds {stranger}, which no {kind.noun} wrote: move that "
            "elsewhere, or name another folder"
        )
    ownership.discard(folder, {*kind.names} - {LOCK, MARKER, "plan.yaml"})


@contextlib.contextmanager
def take_folder(folder: Path, kind: Kind) -> Iterator[None]:
    """Hold a folder that is new or of this kind, and mark it as such. One process at a time.

    Raises:
        RunDirectoryError: it is of another kind, holds what this program did not write, or is in use.
    """
    ownership.check_folder(folder, kind)
    make_folder(folder)
    try:
        held = FileLock(folder / LOCK).acquire(blocking=False)
    except Timeout:
        raise RunDirectoryError(f"{folder} is in use by another process; wait for it or name another folder") from None
    with held:
        ownership.check_folder(folder, kind)  # it may have changed meanwhile
        if ownership.kind_of(folder) is None:
            write_json(folder / MARKER, kind.marker)
        yield


@contextlib.contextmanager
def open_run(
    folder: Path,
    plan: Mapping[str, Any],
    environment: Mapping[str, Any],
    *,
    kind: Kind = SEQUENCE,
    cpu: bool = True,
    remove_if_unused: bool = False,
) -> Iterator[Run]:
    """Take a run directory for a plan: a new one, or the one that plan began. One run at a time.

    Of several processes (`accelerate launch`) the first takes it and the others join when it is ready. With
    `remove_if_unused` the directory is removed again if the block fails before anything is trained. A folder that this
    program did not begin is refused before anything in it is touched.

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
            if remove_if_unused and _nothing_finished(folder):
                _remove_unused(folder, kind)
            raise


@contextlib.contextmanager
def _taken(folder: Path, plan: Mapping[str, Any], environment: Mapping[str, Any], kind: Kind) -> Iterator[Run]:
    """Check and lock a run directory in the process that writes."""
    plan_file, environment_file = folder / "plan.yaml", folder / "environment.json"
    ownership.check_folder(folder, kind)
    if ownership.kind_of(folder) is None and plan_file.exists():  # of an earlier version, or it would have a marker
        _refuse(folder, _changes(plan_file, plan))
    with take_folder(folder, kind):
        run = Run(folder)
        if not plan_file.exists():
            write_text(plan_file, as_yaml(plan))
        elif changed := _changes(plan_file, plan):
            if not _nothing_finished(folder):
                _refuse(folder, changed)
            _start_over(folder, kind)  # such as after a mistake in the plan: the corrected plan is welcome
            write_text(plan_file, as_yaml(plan))
        if not environment_file.exists():
            write_json(environment_file, environment)
        elif moved := differences(json.loads(canonical_json(environment)), read_json(environment_file)):
            run.event("environment changed", differences=moved)
        yield run


def _changes(plan_file: Path, plan: Mapping[str, Any]) -> list[str]:
    """Compare a plan with the one that a run directory was begun with; RunDirectoryError if that cannot be read."""
    try:
        stored = yaml.safe_load(plan_file.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RunDirectoryError(f"{plan_file} cannot be read ({one_line(error)}); restore or delete it") from None
    return differences(plan, stored)


def _refuse(folder: Path, changed: list[str]) -> None:
    """Refuse a run directory of another plan."""
    if changed:
        raise RunDirectoryError(
            f"{folder} belongs to another plan ({'; '.join(changed)}); name another folder, go on with that "
            f"plan ({folder / 'plan.yaml'}), or delete the folder"
        )


HASH = re.compile(r"[0-9a-f]{40,}")


def differences(ours: Any, theirs: Any, key: str = "") -> list[str]:
    """List the dotted keys at which two nested values differ, with both values; entries of a list go by their names."""
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        pairs = [(f"{key}.{name}" if key else str(name), name) for name in sorted({*ours, *theirs})]
        return [line for path, name in pairs for line in differences(ours.get(name), theirs.get(name), path)]
    if ours == theirs:
        return []
    if isinstance(ours, list) and isinstance(theirs, list):
        names = [_name(entry) for entry in ours]
        if None not in names and names == [_name(entry) for entry in theirs]:
            entries = zip(names, ours, theirs, strict=True)
            return [line for name, one, other in entries for line in differences(one, other, f"{key}.{name}")]
    return [f"{key}: {_short(theirs)} there, {_short(ours)} now"]


def _name(entry: Any) -> str | None:
    """Return the name of a list's entry: a method's label or a domain's name."""
    name = (entry.get("label") or entry.get("name")) if isinstance(entry, Mapping) else None
    return None if name is None else str(name)


def _short(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, Mapping):
        return _name(value) or f"{len(value)} keys"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_short, value))}]"
    return f"'{value[:12]}...'" if isinstance(value, str) and HASH.fullmatch(value) else repr(value)
