"""The run directory: taken for one plan, locked, and continued; several processes of a run share it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
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
SAME_NUMBERS = ("model.device", "model.device_map", "train.gradient_checkpointing", "evaluate.batch_size")
"""Keys of a plan that change a run's numbers by rounding at most, so that it may continue with other values."""
BATCHES = ("train.batch_size", "train.gradient_accumulation", "train.effective_batch")
"""Keys that may change, too, while the rows of an update stay the same."""


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

    def write_inputs(self, inputs: Mapping[str, Any], advice: str) -> None:
        """Write inputs.json once; a sequence without results starts over if its inputs have changed."""
        path = self.folder / "inputs.json"
        changed = differences(json.loads(canonical_json(inputs)), read_json(path)) if path.exists() else []
        if changed and nothing_finished(self.folder):  # such as a broken base that was repaired
            if not self.writes:  # the first process starts over
                return
            start_over(self.folder, SEQUENCE, ("plan.yaml", "environment.json", "events.jsonl"))
            self.event("inputs changed", differences=changed, started_over=True)
        self.write_once("inputs.json", inputs, advice)

    def write_once(self, name: str, value: Mapping[str, Any], advice: str) -> None:
        """Write a file that must not change during a run; RunDirectoryError lists how the existing one differs."""
        path = self.folder / name
        value = json.loads(canonical_json(value))
        if not path.exists():
            self.write_json(path, value)
        elif changed := differences(value, read_json(path)):
            raise RunDirectoryError(f"{path} says otherwise: {'; '.join(changed)}. {advice}")


def nothing_finished(folder: Path) -> bool:
    """Tell whether a run directory, or a folder of several, holds no training result of any kind yet."""
    return not any(folder.rglob("stages/*/*/adapter")) and not any(folder.rglob("checkpoint-*"))


def _finished_methods(plan: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
    """Return a sequence's plan with only the methods that have a training result in `folder`."""
    methods = plan.get("methods") if isinstance(plan, Mapping) else None
    if not isinstance(methods, list):
        return plan
    stages = [(method, folder / "stages" / str(_name(method))) for method in methods]
    begun = [method for method, own in stages if any(own.glob("*/adapter")) or any(own.rglob("checkpoint-*"))]
    return {**plan, "methods": begun}


def _discard_unfinished_methods(folder: Path, plan: Mapping[str, Any]) -> None:
    """Delete the files of a plan's methods that have no training result."""
    finished = _finished_methods(plan, folder)["methods"]
    labels = {str(_name(method)) for method in plan["methods"] if method not in finished}
    own = [name for name in SEQUENCE.names if name.startswith("stages/*/")]
    ownership.discard(folder, [name.replace("*", label, 1) for label in labels for name in own])


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


def start_over(folder: Path, kind: Kind, keep: Collection[str] = ()) -> None:
    """Clear what a plan without results left, except files to keep, the lock and the marker.

    Raises:
        RunDirectoryError: something else is there, too. Nothing is deleted then.
    """
    if stranger := next(ownership.strangers(folder, kind.names), None):
        raise RunDirectoryError(
            f"{folder} was begun with another plan, and holds {stranger}, which no {kind.noun} wrote: move that "
            "elsewhere, or name another folder"
        )
    ownership.discard(folder, {*kind.names} - {LOCK, MARKER, *keep})


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
            if remove_if_unused and nothing_finished(folder):
                _remove_unused(folder, kind)
            raise


@contextlib.contextmanager
def _taken(folder: Path, plan: Mapping[str, Any], environment: Mapping[str, Any], kind: Kind) -> Iterator[Run]:
    """Check and lock a run directory in the process that writes."""
    plan_file, environment_file = folder / "plan.yaml", folder / "environment.json"
    ownership.check_folder(folder, kind)
    if ownership.kind_of(folder) is None and plan_file.exists():  # of an earlier version, or it would have a marker
        _refuse(folder, number_changes(plan, _stored(plan_file)))
    with take_folder(folder, kind):
        run = Run(folder)
        if not plan_file.exists():
            write_text(plan_file, as_yaml(plan))
        elif changed := differences(plan, stored := _stored(plan_file)):
            other = number_changes(plan, stored)
            if over := bool(other) and nothing_finished(folder):
                # such as after a mistake in the plan: the corrected plan is welcome
                start_over(folder, kind, ("plan.yaml", "events.jsonl"))
            elif other and kind == SEQUENCE:
                _refuse(folder, number_changes(plan, stored, folder=folder))
                _discard_unfinished_methods(folder, stored)
            else:
                _refuse(folder, other)
            write_text(plan_file, as_yaml(plan))
            run.event("plan changed", differences=changed, started_over=over)
        if not environment_file.exists():
            write_json(environment_file, environment)
        elif moved := differences(json.loads(canonical_json(environment)), read_json(environment_file)):
            run.event("environment changed", differences=moved)
        yield run


def _stored(plan_file: Path) -> dict[str, Any]:
    """Read the plan that a run directory was begun with; RunDirectoryError if it cannot be read."""
    try:
        return yaml.safe_load(plan_file.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RunDirectoryError(f"{plan_file} cannot be read ({one_line(error)}); restore or delete it") from None


def _refuse(folder: Path, changed: list[str]) -> None:
    """Refuse a run directory of another plan."""
    if changed:
        raise RunDirectoryError(
            f"{folder} belongs to another plan ({'; '.join(changed)}); name another folder, go on with that "
            f"plan ({folder / 'plan.yaml'}), or delete the folder"
        )


def number_changes(ours: Mapping[str, Any], theirs: Mapping[str, Any], *, folder: Path | None = None) -> list[str]:
    """List the differences of two plans as `differences` does, without those that leave a run's numbers alone.

    With the `folder` of a sequence, also ignore methods that have no training result there.
    """
    if folder is not None and (folder / "stages").is_dir():
        ours, theirs = (_finished_methods(plan, folder) for plan in (ours, theirs))
    sections = [plan.get("train") if isinstance(plan, Mapping) else None for plan in (ours, theirs)]
    now, then = (rows_per_update(train, process_count()) for train in sections)
    free = SAME_NUMBERS + (BATCHES if now == then else ())
    keys = {line: line.partition(": ")[0] for line in differences(ours, theirs)}
    return [line for line, key in keys.items() if not any(f"{key}.".startswith(f"{name}.") for name in free)]


def rows_per_update(train: Any, processes: int = 1) -> int | None:
    """Return the rows of an update of all processes as a plan's section `train` says; None if it does not say so."""
    train = train if isinstance(train, Mapping) else {}
    if train.get("effective_batch") is not None:
        return train["effective_batch"]
    batch, added = train.get("batch_size"), train.get("gradient_accumulation")
    return batch * added * processes if isinstance(batch, int) and isinstance(added, int) else None


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
