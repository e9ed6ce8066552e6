"""A grid of independent runs over workers: restartable, and none of them stops the others by failing."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from gaintune.config import Plan
from gaintune.data.blocks import load_domain
from gaintune.differences import differences
from gaintune.errors import GaintuneError, RunDirectoryError, SweepError, one_line
from gaintune.evaluate.base_losses import BaseLosses
from gaintune.evaluate.records import Matrix
from gaintune.grid import Grid, PlannedRun, grid_yaml, planned_runs, read_grid
from gaintune.models import base_fingerprint, load_tokenizer
from gaintune.progress import Progress, Silent
from gaintune.runs import canonical_json, make_folder, read_json, write_json, write_text
from gaintune.sequence import describe_inputs, run_sequence
from gaintune.sweep_engine import Engine, Pool, WorkersLostError, check_engine, open_pool
from gaintune.sweep_table import SweepRow, SweepTable

logger = logging.getLogger(__name__)

LOOK_EVERY = 0.5
"""Seconds between two looks at what the workers have written."""
BEGUN, PUT_OFF, FINISHED, FAILED = "begun", "put off", "finished", "failed"
LIVES = 2
"""How many workers a run may lose before it is given up."""
GRACE = 60.0
"""Seconds to wait for a run directory that another process still holds."""
KILLED = "its worker was killed, twice (out of memory?)"
_ALONE = threading.Lock()  # a run sets the process's seeds, so a worker of several threads does one at a time


@dataclass(frozen=True)
class Job:
    """One run as a worker gets it; `cwd` is what relative paths in its plan start from."""

    id: str
    plan: Plan
    folder: Path
    cwd: Path
    threads: int | None
    prepare: Callable[[], None] | None

    @property
    def run(self) -> Path:
        """The run directory."""
        return self.folder / "runs" / self.id

    @property
    def outcome(self) -> Path:
        """Where its worker says how far it came."""
        return self.folder / "outcomes" / f"{self.id}.json"


def run_sweep(
    grid: Grid | Mapping[str, Any] | str | Path,
    folder: str | Path,
    *,
    engine: Engine = "loky",
    jobs: int = 1,
    address: str | None = None,
    progress: Progress | None = None,
    prepare: Callable[[], None] | None = None,
) -> SweepTable:
    """Run what is missing of a grid, each run a sequence in a directory of its own, and write the table of all.

    A run that fails is told of in the table and tried again by the next call, like one that was stopped; the others go
    on. A worker that is killed takes down what runs beside it on some engines: all that is put off to the end and done
    there one run at a time, where a worker killed again is that run's failure.

    Args:
        grid: a `Grid`, nested values, or the path of a YAML grid.
        folder: of the sweep; runs of a smaller grid in it are kept and used. All workers must see it.
        engine: `loky` (processes of this machine), `ray`, `dask`, or `sequential` (in this process).
        jobs: runs at a time; each has the cores' share of threads.
        address: of a Ray or Dask cluster; see `gaintune.sweep_engine.open_pool`.
        progress: where to show progress; nowhere unless given.
        prepare: called by every worker before a run, such as to quiet libraries; must be importable.

    Returns:
        A row for each run of the grid, as in sweep.csv; `failed` are the rows of those that did not finish.

    Raises:
        ConfigError: a grid, engine or method that cannot be used, before anything is run.
        DataError: texts that cannot be used, likewise.
        RunDirectoryError: the folder holds runs over other texts or another base, or is in use.
        SweepError: the engine's workers cannot work at all.
    """
    chosen = check_engine(engine, jobs, address)
    settled, shown, path = read_grid(grid), progress or Silent(), Path(folder).absolute()
    runs = planned_runs(settled)
    with _taken(path):
        missing = [run for run in runs if _matrix(path, run) is None]
        shown.note(f"{len(runs)} runs, {len(runs) - len(missing)} of them finished")
        if missing:
            _check_inputs(path, runs, missing)
        write_text(path / "grid.yaml", grid_yaml(settled))
        if missing:
            with open_pool(chosen, min(jobs, len(missing)), address) as pool:
                _run_all(path, missing, pool, min(jobs, len(missing)), shown, prepare)
        table = SweepTable(tuple(_row(path, run) for run in runs))
        table.write(path)
    return table


@contextlib.contextmanager
def _taken(folder: Path) -> Iterator[None]:
    """One sweep at a time in a folder."""
    if (folder / "plan.yaml").exists():
        raise RunDirectoryError(f"{folder} is a run, not a sweep: name another folder")
    make_folder(folder)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise RunDirectoryError(f"{folder} is in use by another sweep; wait for it or name another folder") from None
    try:
        yield
    finally:
        lock.release()


def _matrix(folder: Path, run: PlannedRun) -> Matrix | None:
    """The numbers of a run if it is finished."""
    file = folder / "runs" / run.id / "matrix.json"
    if not file.exists():
        return None
    matrix = Matrix.from_dict(read_json(file))
    return None if matrix.partial else matrix


def _check_inputs(folder: Path, runs: Sequence[PlannedRun], missing: Sequence[PlannedRun]) -> None:
    """Read base and texts once, so that mistakes show before the workers start; refuse to mix them with others."""
    described: dict[int, dict[str, Any]] = {}
    wanted = {run.id for run in missing}
    for run in runs:
        file = folder / "runs" / run.id / "inputs.json"
        if run.budget not in described and (run.id in wanted or file.exists()):
            tokenizer = load_tokenizer(run.plan.model)
            domains = [load_domain(domain, run.plan.data, tokenizer) for domain in run.plan.data.measured]
            values = describe_inputs(base_fingerprint(run.plan.model), domains)
            described[run.budget] = json.loads(canonical_json(values))
        if file.exists() and (changed := differences(described[run.budget], read_json(file))):
            raise RunDirectoryError(
                f"{file} says otherwise: {'; '.join(changed)}. A sweep is one base and one set of texts: name another "
                "folder for others"
            )


def _run_all(
    folder: Path,
    missing: Sequence[PlannedRun],
    pool: Pool,
    jobs: int,
    shown: Progress,
    prepare: Callable[[], None] | None,
) -> None:
    """Do what is missing; what was under way when workers were lost comes last, one at a time."""
    todo = [Job(run.id, run.plan, folder, Path.cwd(), pool.threads(jobs), prepare) for run in missing]
    for job in todo:
        job.outcome.unlink(missing_ok=True)
    with _watched(list(todo), shown):
        lost = _work_through(pool, todo, jobs)
        while lost:
            for job in lost:
                _tell(job, PUT_OFF)
            for job in _work_through(pool, lost, 1, until_lost=True):
                _tell(job, FAILED, error=KILLED)
            lost = [job for job in lost if _state(job) == PUT_OFF]


def _work_through(pool: Pool, jobs: Sequence[Job], at_a_time: int, *, until_lost: bool = False) -> list[Job]:
    """Do jobs; those that were under way when a worker was lost come back, the others go on, or stop `until_lost`."""
    lost: list[Job] = []
    todo = list(jobs)
    while todo:
        broken, asked = None, len(todo)
        try:
            pool.run(work, todo, at_a_time)
        except WorkersLostError as error:
            broken = error
        under_way = [job for job in todo if _state(job) == BEGUN]
        lost += under_way
        todo = [job for job in todo if _state(job) in (None, PUT_OFF)]
        if under_way:
            logger.warning(
                "a worker was lost (%s); its runs are done again when the others are over, one at a time: %s",
                broken, ", ".join(job.id for job in under_way),
            )  # fmt: skip
            if until_lost:
                break
        elif broken is not None:
            if len(todo) == asked:
                raise SweepError(f"the {pool.engine} workers cannot work ({broken})") from broken
        elif todo and (unseen := _unseen(todo)):
            raise SweepError(
                f"workers finished {len(unseen)} runs of which nothing is in {jobs[0].folder}: all nodes must share it"
            )
        else:
            break
    return lost


def _unseen(jobs: Sequence[Job]) -> list[Job]:
    """Jobs whose outcome does not appear: a network file system may take a while to show what another node wrote."""
    end = time.monotonic() + GRACE
    while (unseen := [job for job in jobs if _state(job) in (None, PUT_OFF)]) and time.monotonic() < end:
        time.sleep(LOOK_EVERY)
    return unseen


@contextlib.contextmanager
def _watched(jobs: Sequence[Job], shown: Progress) -> Iterator[None]:
    """Show how many runs are over, as their outcomes appear on disk: no engine tells it in a better way."""
    done = threading.Event()

    def look() -> None:
        with shown.task("sweep", len(jobs), "runs") as advance:
            left, last = list(jobs), False
            while left and not last:
                last = done.wait(LOOK_EVERY)
                still = [job for job in left if _state(job) not in (FINISHED, FAILED)]
                if len(still) < len(left):
                    advance(len(left) - len(still))
                left = still

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def _state(job: Job) -> str | None:
    """How far a run came in this sweep; None before it has begun."""
    return read_json(job.outcome)["state"] if job.outcome.exists() else None


def _lives_lost(job: Job) -> int:
    """How many workers began a run and are gone; asked before another one begins it."""
    return read_json(job.outcome)["attempts"] if job.outcome.exists() else 0


def _tell(job: Job, state: str, **facts: Any) -> None:
    attempts = _lives_lost(job) + (state == BEGUN)
    write_json(job.outcome, {"state": state, "attempts": attempts, "process": os.getpid(), **facts})


def work(job: Job) -> None:
    """What a worker does with one run: never raises, and writes how it went."""
    with _ALONE, contextlib.chdir(job.cwd):
        if _lives_lost(job) >= LIVES:  # an engine that starts lost jobs anew by itself, as Dask does
            _tell(job, FAILED, error=KILLED)
            return
        _tell(job, BEGUN)
        start = time.perf_counter()
        try:
            if job.threads is not None:
                torch.set_num_threads(job.threads)
            if job.prepare is not None:
                job.prepare()
            if job.run.is_dir():  # whoever held it is about to be gone, such as the worker that was lost with it
                with contextlib.suppress(Timeout), FileLock(job.run / ".lock", timeout=GRACE):
                    pass
            run_sequence(job.plan, job.run, base_losses=BaseLosses(job.folder / "base"))
        except Exception as error:
            known = isinstance(error, GaintuneError)
            message = str(error) if known else f"{type(error).__name__}: {one_line(error)}"
            trace = {} if known else {"traceback": traceback.format_exc().splitlines()}
            _tell(job, FAILED, error=message, **trace)
        else:
            _tell(job, FINISHED, seconds=round(time.perf_counter() - start, 1))


def _row(folder: Path, run: PlannedRun) -> SweepRow:
    """What is on disk of a run."""
    matrix = _matrix(folder, run)
    outcome = folder / "outcomes" / f"{run.id}.json"
    error = None
    if matrix is None:
        error = read_json(outcome).get("error", "stopped before it was finished") if outcome.exists() else "not run yet"
    return SweepRow(run, folder / "runs" / run.id, matrix, error)
