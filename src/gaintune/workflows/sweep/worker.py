"""What a worker of a sweep does with one run, and how it tells the others.

A worker imports this first, and torch only after it has taken its device; so nothing here may import torch.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import joblib
from filelock import FileLock, Timeout

from gaintune.config import Plan
from gaintune.errors import DivergedError, GaintuneError, SweepError, one_line
from gaintune.models import VISIBLE, take_device
from gaintune.storage import read_stored, write_json

BEGUN, PUT_OFF, FINISHED, FAILED = "begun", "put off", "finished", "failed"
LIVES = 2
"""How many workers a run may lose before it is given up."""
GRACE = 60.0
"""Seconds to wait for a run directory that another process still holds."""
KILLED = "its worker was killed, twice (out of memory?)"
_ALONE = threading.Lock()  # a run sets the process's seeds, so a worker of several threads does one at a time


@dataclass(frozen=True)
class Job:
    """One run as a worker gets it.

    Attributes:
        id: of the run.
        plan: what it follows.
        folder: of the sweep.
        cwd: what relative paths in the plan start from.
        threads: for torch; None leaves them as they are.
        prepare: called before the run.
        kind: of device, such as `cuda`, that the plan means in the process that started the sweep.
        devices: CUDA devices of which the worker takes one, as CUDA_VISIBLE_DEVICES names them; none where its engine
            gives it what it may see.
    """

    id: str
    plan: Plan
    folder: Path
    cwd: Path
    threads: int | None = None
    prepare: Callable[[], None] | None = None
    kind: str = "cpu"
    devices: tuple[str, ...] = ()

    @property
    def run(self) -> Path:
        """The run directory."""
        return self.folder / "runs" / self.id

    @property
    def outcome(self) -> Path:
        """Where its worker says how far it came."""
        return self.folder / "outcomes" / f"{self.id}.json"


def state(job: Job) -> str | None:
    """How far a run came in this sweep; None before it has begun."""
    return read_stored(job.outcome, lambda outcome: outcome["state"]) if job.outcome.exists() else None


def _lives_lost(job: Job) -> int:
    """How many workers began a run and are gone; asked before another one begins it."""
    return read_stored(job.outcome, lambda outcome: int(outcome["attempts"])) if job.outcome.exists() else 0


def tell(job: Job, now: str, **facts: Any) -> None:
    """Write how far a run came."""
    attempts = _lives_lost(job) + (now == BEGUN)
    write_json(job.outcome, {"state": now, "attempts": attempts, "process": os.getpid(), **facts})


def work(job: Job) -> None:
    """Do one run: never raises, and writes how it went."""
    with _ALONE, contextlib.chdir(job.cwd):
        if _lives_lost(job) >= LIVES:  # an engine that starts lost jobs anew by itself, as Dask does
            tell(job, FAILED, error=KILLED)
            return
        tell(job, BEGUN)
        start = time.perf_counter()
        try:
            take_device(job.devices)
            _run(job)
        except Exception as error:
            known = isinstance(error, GaintuneError)
            message = str(error) if known else f"{type(error).__name__}: {one_line(error)}"
            trace = {} if known else {"traceback": traceback.format_exc().splitlines()}
            tell(job, FAILED, error=message, diverged=isinstance(error, DivergedError), **trace)
        else:
            tell(job, FINISHED, seconds=round(time.perf_counter() - start, 1))


def _run(job: Job) -> None:
    if job.prepare is not None:
        job.prepare()

    import torch

    from gaintune.evaluate import BaseLosses
    from gaintune.models import resolve_device
    from gaintune.workflows.sequence import run_sequence

    found = resolve_device(job.plan.model.device).type
    if job.kind == "cuda" and found != "cuda":
        raise SweepError(
            f"model.device={job.plan.model.device} is cuda where the sweep was started and {found} in this worker "
            f"({VISIBLE} is {os.environ.get(VISIBLE, 'not set')!r} here): give its node or worker a GPU, or set "
            f"plan.model.device={found} for all"
        )
    if job.threads is not None:
        torch.set_num_threads(min(job.threads, joblib.cpu_count()))  # a share of a cluster may be more than its node
    if job.run.is_dir():  # whoever held it is about to be gone, such as the worker that was lost with it
        with contextlib.suppress(Timeout), FileLock(job.run / ".lock", timeout=GRACE):
            pass
    run_sequence(job.plan, job.run, base_losses=BaseLosses(job.folder / "base"))
