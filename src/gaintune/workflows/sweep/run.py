"""A grid of independent runs over workers, and their table: restartable, and no failed run stops the others."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from gaintune import storage
from gaintune.config import Plan, read_plan
from gaintune.errors import RunDirectoryError, SweepError
from gaintune.models import resolve_device
from gaintune.progress import Progress, Silent
from gaintune.report import tidy
from gaintune.results import FIGURES, Matrix, MethodRun, stored_run
from gaintune.workflows.sequence import load_inputs
from gaintune.workflows.sweep import workers
from gaintune.workflows.sweep.grid import Grid, PlannedRun, grid_yaml, planned_runs, read_grid
from gaintune.workflows.sweep.workers import Engine, Job, Pool

logger = logging.getLogger(__name__)

POLL = 0.5  # seconds between two readings of what the workers have written
FACTS = ("numbers", "device")  # of a finished run
INTEGERS = ("rank", "trainable_parameters")  # with gaps, where a method has no rank or a run is not finished


@dataclass(frozen=True)
class SweepRow:
    """One run of a grid: `matrix` has its numbers if it is finished, else `error` says why it is not.

    `diverged` says that it cannot be finished with its settings: a loss or a gradient was not finite.
    """

    run: PlannedRun
    folder: Path
    matrix: Matrix | None
    error: str | None
    diverged: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """The run's settings in the grid, as columns."""
        values = {**vars(self.run), "domains": " ".join(self.run.domains), "train_tokens": self.run.budget}
        return {name: value for name, value in values.items() if name not in ("plan", "budget")}

    @property
    def numbers(self) -> str | None:
        """The name of the precision (`Precision.name`) of a finished run; None for an unfinished run."""
        return None if self.matrix is None else self.matrix.methods[0].info["numbers"]

    @property
    def device(self) -> str | None:
        """The name of the device that a finished run was begun on; None for an unfinished run."""
        if self.matrix is None:
            return None
        return storage.read_stored(self.folder / "environment.json", lambda environment: environment["device"])

    def figures(self) -> dict[str, Any]:
        """Return the summary in %, each figure with the ends of its interval over blocks; {} for an unfinished run."""
        if self.matrix is None:
            return {}
        (method,) = self.matrix.methods
        parameters = method.info.get("trainable_parameters")
        values: dict[str, Any] = {"numbers": self.numbers, "device": self.device, "trainable_parameters": parameters}
        for name in FIGURES:
            interval = getattr(method.summary, name)
            for column, end in ((name, "value"), (f"{name}_low", "low"), (f"{name}_high", "high")):
                values[column] = None if interval is None else getattr(interval, end)
        return values

    def losses(self) -> MethodRun:
        """Read what was measured in a finished run, block by block."""
        assert self.matrix is not None
        (method,) = self.matrix.methods
        return stored_run(storage.Run(self.folder), method)


@dataclass(frozen=True)
class SweepTable:
    """Every run of a grid."""

    rows: tuple[SweepRow, ...]

    @property
    def finished(self) -> tuple[SweepRow, ...]:
        """The runs that have numbers."""
        return tuple(row for row in self.rows if row.matrix is not None)

    @property
    def failed(self) -> tuple[SweepRow, ...]:
        """The runs that have none."""
        return tuple(row for row in self.rows if row.matrix is None)

    def frame(self) -> pd.DataFrame:
        """Make a row for each run: its settings, `finished` or `failed`, its figures, its error."""
        measured = [f"{name}{end}" for name in FIGURES for end in ("", "_low", "_high")]
        rows = [
            {
                **row.settings,
                "status": "failed" if row.matrix is None else "finished",
                **{**dict.fromkeys((*FACTS, "trainable_parameters", *measured)), **row.figures()},
                "error": row.error,
            }
            for row in self.rows
        ]
        return _typed(pd.DataFrame(rows), measured).astype(dict.fromkeys((*FACTS, "error"), "string"))

    def cells(self) -> pd.DataFrame:
        """Make a row for each domain measured after each stage of each finished run; changes in % of the base."""
        frames = [tidy(row.matrix).drop(columns="method").assign(**row.settings) for row in self.finished if row.matrix]
        if not frames:
            return pd.DataFrame()
        frame = pd.concat(frames, ignore_index=True)
        first = list(self.finished[0].settings)
        names = [str(name) for name in frame.columns]
        percents = [name for name in names if name.endswith("_percent")]
        return _typed(frame[[*first, *(name for name in names if name not in first)]], percents)

    def write(self, folder: Path) -> None:
        """Write sweep.csv and cells.csv, and both as Parquet."""
        for name, frame in (("sweep", self.frame()), ("cells", self.cells())):
            storage.write_text(folder / f"{name}.csv", frame.to_csv(index=False, lineterminator="\n"))
            buffer = io.BytesIO()
            frame.to_parquet(buffer, index=False)
            storage.write_bytes(folder / f"{name}.parquet", buffer.getvalue())


def _typed(frame: pd.DataFrame, numbers: list[str]) -> pd.DataFrame:
    """Give columns the same types whatever is missing, so that tables of several sweeps can be joined."""
    whole = {name: "Int64" for name in INTEGERS if name in frame}
    return frame.astype({**whole, **{name: "float64" for name in numbers if name in frame}})


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

    A failed run is a row of the table; the others go on, and the next call tries it again, like a stopped run. On some
    engines a killed worker ends the runs beside it: these are put off to the end and done one at a time. A run that
    kills a worker again fails.

    Args:
        grid: a `Grid`, nested values, or the path of a YAML grid.
        folder: folder of the sweep; runs of a smaller grid in it are kept and used, also those that differ only in
            keys that leave their numbers alone, such as model.device. All workers must see it.
        engine: `loky` (processes of this machine), `ray`, `dask`, or `sequential` (in this process).
        jobs: runs at a time; each has its share of the cores' threads.
        address: address of a Ray or Dask cluster; default: the cluster this process is connected to, else the one that
            RAY_ADDRESS or DASK_SCHEDULER_ADDRESS names, else one of this machine's processes.
        progress: progress display.
        prepare: called by every worker before a run, such as to quiet libraries; must be importable.

    Returns:
        A row for each run of the grid, as in sweep.csv; `failed` are the rows of unfinished runs.

    Raises:
        ConfigError: a grid, engine or method that cannot be used, before anything is run.
        DataError: texts that cannot be used, before anything is run.
        RunDirectoryError: the folder holds runs over other texts or another base, something else, or is in use.
        SweepError: the engine's workers cannot work at all.
    """
    chosen = workers.check_engine(engine, jobs, address)
    grid, shown, path = read_grid(grid), progress or Silent(), Path(folder).absolute()
    runs = planned_runs(grid)
    with storage.take_folder(path, storage.SWEEP):
        if _other_grid(path, grid) and storage.nothing_finished(path):
            storage.start_over(path, storage.SWEEP, ("grid.yaml",))
        runs = tuple(_adopted(path, runs))
        missing = [run for run in runs if _matrix(path, run) is None]
        _check_plans(path, runs)
        shown.note(f"{len(runs)} runs, {len(runs) - len(missing)} of them finished")
        if missing:
            _check_inputs(path, runs, missing)
        storage.write_text(path / "grid.yaml", grid_yaml(grid))
        if missing:
            jobs, device = min(jobs, len(missing)), grid.plan.model.device
            kind = resolve_device(device).type
            cuda = True if kind == "cuda" else None if device == "auto" else False  # None: if the workers have it
            with workers.open_pool(chosen, jobs, address, cuda=cuda) as pool:
                common = (path, Path.cwd(), pool.threads(jobs), prepare, kind, pool.devices)
                _run_all(pool, [Job(run.id, run.plan, *common) for run in missing], jobs, shown)
        table = SweepTable(tuple(_row(path, run) for run in runs))
        table.write(path)
    return table


def _other_grid(folder: Path, grid: Grid) -> bool:
    """Tell whether a folder was begun with another grid."""
    file = folder / "grid.yaml"
    return file.exists() and file.read_text(encoding="utf-8") != grid_yaml(grid)


def _adopted(folder: Path, runs: Sequence[PlannedRun]) -> Iterator[PlannedRun]:
    """Yield the runs, each under the id of a run on disk that differs only in keys that leave its numbers alone."""
    planned = {run.id for run in runs}
    others = {file.parent.name: file for file in sorted(folder.glob("runs/*/plan.yaml"))}
    plans = {name: _values(read_plan(file)) for name, file in others.items() if name not in planned}
    for run in runs:
        values = {} if run.id in others else _values(run.plan)
        same = next((name for name, plan in plans.items() if values and not storage.number_changes(values, plan)), None)
        yield run if same is None else replace(run, id=same)


def _values(plan: Plan) -> dict[str, Any]:
    return plan.model_dump(mode="json")


def _matrix(folder: Path, run: PlannedRun) -> Matrix | None:
    """Read the numbers of a run if it is finished."""
    file = folder / "runs" / run.id / "matrix.json"
    matrix = storage.read_stored(file, Matrix.from_dict) if file.exists() else None
    return None if matrix is None or matrix.partial else matrix


def _row(folder: Path, run: PlannedRun) -> SweepRow:
    """Read what is on disk of a run."""
    own, matrix = folder / "runs" / run.id, _matrix(folder, run)
    if matrix is not None:
        return SweepRow(run, own, matrix, None)
    outcome = workers.read_outcome(folder / "outcomes" / f"{run.id}.json") or {"error": "not run yet"}
    error = outcome.get("error", "stopped before it was finished")
    return SweepRow(run, own, None, error, outcome.get("diverged", False))


def _check_plans(folder: Path, runs: Sequence[PlannedRun]) -> None:
    """Refuse runs of another plan under the same id: those of a version with another default for some key."""
    for run in runs:
        file = folder / "runs" / run.id / "plan.yaml"
        if file.exists() and (changed := storage.number_changes(_values(run.plan), _values(read_plan(file)))):
            raise RunDirectoryError(
                f"{file} says otherwise: {'; '.join(changed)}. A default has changed since that run: set it as it was, "
                "or name another folder"
            )


def _check_inputs(folder: Path, runs: Sequence[PlannedRun], missing: Sequence[PlannedRun]) -> None:
    """Read base and texts once, to show mistakes before the workers start; refuse to mix them with others."""
    described: dict[int, dict[str, Any]] = {}
    wanted = {run.id for run in missing}
    for run in runs:
        file = folder / "runs" / run.id / "inputs.json"
        begun = file.exists() and not storage.nothing_finished(file.parent)  # else it starts over with other inputs
        if run.budget not in described and (run.id in wanted or begun):
            described[run.budget] = json.loads(storage.canonical_json(load_inputs(run.plan)[1]))
        if begun and (changed := storage.differences(described[run.budget], storage.read_json(file))):
            raise RunDirectoryError(
                f"{file} says otherwise: {'; '.join(changed)}. A sweep is one base and one set of texts: name another "
                "folder for others"
            )


def _run_all(pool: Pool, todo: Sequence[Job], jobs: int, shown: Progress) -> None:
    """Do jobs; runs that were under way when workers died come last, one at a time."""
    for job in todo:
        job.outcome.unlink(missing_ok=True)
    with _watched(todo, shown):
        lost = _work_through(pool, todo, jobs)
        while lost:
            for job in lost:
                job.report(workers.PUT_OFF)
            for job in _work_through(pool, lost, 1, until_lost=True):
                job.report(workers.FAILED, error=workers.KILLED)
            lost = [job for job in lost if job.state == workers.PUT_OFF]


def _work_through(pool: Pool, jobs: Sequence[Job], at_a_time: int, *, until_lost: bool = False) -> list[Job]:
    """Do jobs and return those under way when a worker died; the others go on, or stop there with `until_lost`."""
    lost: list[Job] = []
    todo = list(jobs)
    while todo:
        broken, before = None, len(todo)
        try:
            pool.run(workers.work, todo, at_a_time)
        except workers.WorkersLostError as error:
            broken = error
        under_way = [job for job in todo if job.state == workers.BEGUN]
        lost += under_way
        todo = _unbegun(todo)
        if under_way:
            logger.warning(
                "a worker was lost (%s); its runs are done again when the others are over, one at a time: %s",
                broken, ", ".join(job.id for job in under_way),
            )  # fmt: skip
            if until_lost:
                break
        elif broken is not None:
            if len(todo) == before:
                raise SweepError(f"the {pool.engine} workers cannot work ({broken})") from broken
        elif todo and (unseen := _unseen(todo)):
            raise SweepError(
                f"workers finished {len(unseen)} runs of which nothing is in {jobs[0].folder}: all nodes must share it"
            )
        else:
            break
    return lost


def _unbegun(jobs: Sequence[Job]) -> list[Job]:
    return [job for job in jobs if job.state in (None, workers.PUT_OFF)]


def _unseen(jobs: Sequence[Job]) -> Sequence[Job]:
    """Wait for outcomes, since a network file system may show another node's files late; return jobs without any."""
    end = time.monotonic() + workers.GRACE
    while (jobs := _unbegun(jobs)) and time.monotonic() < end:
        time.sleep(POLL)
    return jobs


@contextlib.contextmanager
def _watched(jobs: Sequence[Job], shown: Progress) -> Iterator[None]:
    """Show how many runs are over, as their outcomes appear on disk: no engine reports it in a better way."""
    done = threading.Event()

    def watch() -> None:
        with shown.task("sweep", len(jobs), "runs") as advance:
            left, last = list(jobs), False
            while left and not last:
                last = done.wait(POLL)
                still = [job for job in left if job.state not in (workers.FINISHED, workers.FAILED)]
                if len(still) < len(left):
                    advance(len(left) - len(still))
                left = still

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
