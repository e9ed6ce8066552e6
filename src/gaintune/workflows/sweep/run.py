"""A grid of independent runs over workers: restartable, and none of them stops the others by failing."""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gaintune.config import read_plan
from gaintune.data import load_domain
from gaintune.errors import RunDirectoryError, SweepError
from gaintune.models import base_fingerprint, load_tokenizer, resolve_device
from gaintune.progress import Progress, Silent
from gaintune.results import Matrix
from gaintune.storage import (
    SWEEP,
    canonical_json,
    differences,
    read_json,
    read_stored,
    take_folder,
    write_text,
)
from gaintune.workflows.sequence import describe_inputs
from gaintune.workflows.sweep.engine import Engine, Pool, WorkersLostError, check_engine, open_pool
from gaintune.workflows.sweep.grid import Grid, PlannedRun, grid_yaml, planned_runs, read_grid
from gaintune.workflows.sweep.table import SweepRow, SweepTable
from gaintune.workflows.sweep.worker import BEGUN, FAILED, FINISHED, GRACE, KILLED, PUT_OFF, Job, state, tell, work

logger = logging.getLogger(__name__)

LOOK_EVERY = 0.5
"""Seconds between two looks at what the workers have written."""


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
        address: of a Ray or Dask cluster; see `gaintune.workflows.sweep.engine.open_pool`.
        progress: where to show progress; nowhere unless given.
        prepare: called by every worker before a run, such as to quiet libraries; must be importable.

    Returns:
        A row for each run of the grid, as in sweep.csv; `failed` are the rows of those that did not finish.

    Raises:
        ConfigError: a grid, engine or method that cannot be used, before anything is run.
        DataError: texts that cannot be used, likewise.
        RunDirectoryError: the folder holds runs over other texts or another base, something else, or is in use.
        SweepError: the engine's workers cannot work at all.
    """
    chosen = check_engine(engine, jobs, address)
    settled, shown, path = read_grid(grid), progress or Silent(), Path(folder).absolute()
    runs = planned_runs(settled)
    with take_folder(path, SWEEP):
        missing = [run for run in runs if _matrix(path, run) is None]
        _check_plans(path, runs)
        shown.note(f"{len(runs)} runs, {len(runs) - len(missing)} of them finished")
        if missing:
            _check_inputs(path, runs, missing)
        write_text(path / "grid.yaml", grid_yaml(settled))
        if missing:
            with open_pool(chosen, min(jobs, len(missing)), address, cuda=_on_cuda(runs[0])) as pool:
                _run_all(path, missing, pool, min(jobs, len(missing)), shown, prepare)
        table = SweepTable(tuple(_row(path, run) for run in runs))
        table.write(path)
    return table


def _matrix(folder: Path, run: PlannedRun) -> Matrix | None:
    """The numbers of a run if it is finished."""
    file = folder / "runs" / run.id / "matrix.json"
    if not file.exists():
        return None
    matrix = read_stored(file, Matrix.from_dict)
    return None if matrix.partial else matrix


def _check_plans(folder: Path, runs: Sequence[PlannedRun]) -> None:
    """Refuse runs of another plan under the same id: those of a version in which something had another default."""
    for run in runs:
        file = folder / "runs" / run.id / "plan.yaml"
        if file.exists() and (
            changed := differences(run.plan.model_dump(mode="json"), read_plan(file).model_dump(mode="json"))
        ):
            raise RunDirectoryError(
                f"{file} says otherwise: {'; '.join(changed)}. A default has changed since that run: set it as it was, "
                "or name another folder"
            )


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


def _on_cuda(run: PlannedRun) -> bool | None:
    """Whether a grid's runs, which have one base, compute on CUDA; None where they do if their worker has it."""
    device = run.plan.model.device
    return True if resolve_device(device).type == "cuda" else None if device == "auto" else False


def _run_all(
    folder: Path,
    missing: Sequence[PlannedRun],
    pool: Pool,
    jobs: int,
    shown: Progress,
    prepare: Callable[[], None] | None,
) -> None:
    """Do what is missing; what was under way when workers were lost comes last, one at a time."""
    todo = [
        Job(run.id, run.plan, folder, Path.cwd(), pool.threads(jobs), prepare,
            kind=resolve_device(run.plan.model.device).type, devices=pool.devices)
        for run in missing
    ]  # fmt: skip
    for job in todo:
        job.outcome.unlink(missing_ok=True)
    with _watched(list(todo), shown):
        lost = _work_through(pool, todo, jobs)
        while lost:
            for job in lost:
                tell(job, PUT_OFF)
            for job in _work_through(pool, lost, 1, until_lost=True):
                tell(job, FAILED, error=KILLED)
            lost = [job for job in lost if state(job) == PUT_OFF]


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
        under_way = [job for job in todo if state(job) == BEGUN]
        lost += under_way
        todo = [job for job in todo if state(job) in (None, PUT_OFF)]
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
    while (unseen := [job for job in jobs if state(job) in (None, PUT_OFF)]) and time.monotonic() < end:
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
                still = [job for job in left if state(job) not in (FINISHED, FAILED)]
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


def _row(folder: Path, run: PlannedRun) -> SweepRow:
    """What is on disk of a run."""
    matrix = _matrix(folder, run)
    outcome = folder / "outcomes" / f"{run.id}.json"
    place = folder / "runs" / run.id
    if matrix is not None:
        return SweepRow(run, place, matrix, None)
    told: dict[str, Any] = read_stored(outcome, dict) if outcome.exists() else {"error": "not run yet"}
    error = told.get("error", "stopped before it was finished")
    return SweepRow(run, place, None, error, told.get("diverged", False))
