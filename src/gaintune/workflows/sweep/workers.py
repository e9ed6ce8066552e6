"""Workers of a sweep: runs over joblib on processes of this machine, a Ray cluster or a Dask cluster.

A worker imports this module first, and torch only after it has taken its device: nothing here imports torch on top.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import math
import os
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import joblib
from filelock import FileLock, Timeout

from gaintune.config import Plan
from gaintune.errors import ConfigError, DivergedError, GaintuneError, SweepError, one_line
from gaintune.models import VISIBLE, take_device, visible_devices
from gaintune.storage import read_stored, write_json

Engine = Literal["loky", "ray", "dask", "sequential"]
ENGINES: tuple[Engine, ...] = get_args(Engine)
CLUSTERS = {"ray": "ray", "dask": "distributed"}  # engine -> the package it needs
BEGUN, PUT_OFF, FINISHED, FAILED = "begun", "put off", "finished", "failed"
LIVES = 2  # how many workers a run may lose before the sweep gives it up
GRACE = 60.0  # seconds to wait for a run directory that another process still holds
KILLED = "its worker was killed, twice (out of memory?)"
_ALONE = threading.Lock()  # a run sets the process's seeds, so a worker with several threads does one run at a time


class WorkersLostError(Exception):
    """Workers died during their jobs, one of them killed; no engine tells which."""


@dataclass(frozen=True)
class Job:
    """One run of the sweep in a folder, as a worker gets it.

    Attributes:
        cwd: folder that relative paths in the plan start from.
        threads: for torch; None leaves them as they are.
        kind: kind of device, such as `cuda`, that the plan means in the process that started the sweep.
        devices: CUDA devices of which the worker takes one, as CUDA_VISIBLE_DEVICES names them; none where its engine
            assigns them.
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
        """The file in which its worker reports its state."""
        return self.folder / "outcomes" / f"{self.id}.json"

    @property
    def state(self) -> str | None:
        """The run's state in this sweep; None before it has begun."""
        return read_outcome(self.outcome).get("state")

    @property
    def lives_lost(self) -> int:
        """How many workers began the run and died, before another one begins it."""
        return int(read_outcome(self.outcome).get("attempts", 0))

    def report(self, state: str, **facts: Any) -> None:
        """Write the run's state."""
        attempts = self.lives_lost + (state == BEGUN)
        write_json(self.outcome, {"state": state, "attempts": attempts, "process": os.getpid(), **facts})


def read_outcome(file: Path) -> dict[str, Any]:
    """Read what workers reported of a run; nothing where none has begun it."""
    return read_stored(file, dict) if file.exists() else {}


def work(job: Job) -> None:
    """Do one run and write its outcome; never raises."""
    with _ALONE, contextlib.chdir(job.cwd):
        if job.lives_lost >= LIVES:  # an engine that restarts lost jobs by itself, as Dask does
            job.report(FAILED, error=KILLED)
            return
        job.report(BEGUN)
        start = time.perf_counter()
        try:
            take_device(job.devices)
            _run(job)
        except Exception as error:
            known = isinstance(error, GaintuneError)
            message = str(error) if known else f"{type(error).__name__}: {one_line(error)}"
            trace = {} if known else {"traceback": traceback.format_exc().splitlines()}
            job.report(FAILED, error=message, diverged=isinstance(error, DivergedError), **trace)
        else:
            job.report(FINISHED, seconds=round(time.perf_counter() - start, 1))


def _run(job: Job) -> None:
    if job.prepare is not None:
        job.prepare()

    import torch

    from gaintune.evaluate import BaseLosses
    from gaintune.models import resolve_device
    from gaintune.workflows.sequence import run_sequence

    kind = resolve_device(job.plan.model.device).type
    if job.kind == "cuda" and kind != "cuda":
        raise SweepError(
            f"model.device={job.plan.model.device} is cuda where the sweep was started and {kind} in this worker "
            f"({VISIBLE} is {os.environ.get(VISIBLE, 'not set')!r} here): give its node or worker a GPU, or set "
            f"plan.model.device={kind} for all"
        )
    if job.threads is not None:
        torch.set_num_threads(min(job.threads, joblib.cpu_count()))  # a share of a cluster may be more than its node
    if job.run.is_dir():  # a lost worker's process may still hold it for a moment
        with contextlib.suppress(Timeout), FileLock(job.run / ".lock", timeout=GRACE):
            pass
    run_sequence(job.plan, job.run, base_losses=BaseLosses(job.folder / "base"))


@dataclass(frozen=True)
class Pool:
    """Workers that are ready, with so many cores together.

    Every worker takes one of `devices`, the CUDA devices of this machine as CUDA_VISIBLE_DEVICES names them; there are
    none where the engine or its cluster assigns them. `gpus` are those of a Ray cluster, for Ray to assign.
    """

    engine: Engine
    cores: int
    devices: tuple[str, ...] = ()
    gpus: int = 0

    def threads(self, jobs: int) -> int | None:
        """Return the threads for each of so many jobs at a time, at most OMP_NUM_THREADS; None leaves them as is."""
        if self.engine == "sequential":
            return None
        limit = os.environ.get("OMP_NUM_THREADS", "")
        share = max(1, self.cores // jobs)
        return min(share, int(limit)) if limit.isdigit() and int(limit) > 0 else share

    def ray_options(self, workers: int) -> dict[str, Any]:
        """Return Ray's options for so many workers: spread over its nodes, with a share of a GPU where it has any.

        They reserve no cores, for which Ray would wait: a node may be lost, or others may use them.
        """
        share = {"num_gpus": 1 / math.ceil(workers / self.gpus)} if self.gpus else {}  # so that all workers fit
        return {"scheduling_strategy": "SPREAD", **share}

    def run(self, work: Callable[[Any], None], items: Sequence[Any], jobs: int) -> None:
        """Call `work` on each item, `jobs` at a time, each in a worker that may be used again for another.

        A WorkersLostError says that a worker died: work of the others may be lost, too; run what is missing again.
        """
        # for joblib one job at a time means this process, which a killed worker would end: so start two workers and
        # hand out one job at a time
        workers = 1 if self.engine == "sequential" else max(2, jobs)
        options: dict[str, Any] = {"n_jobs": workers, "pre_dispatch": jobs, "batch_size": 1}
        remote = {"ray_remote_args": self.ray_options(workers)} if self.engine == "ray" else {}
        with warnings.catch_warnings():
            # joblib restarts a worker after a while, and warns of a possible leak of memory
            warnings.filterwarnings("ignore", message="A worker stopped while some jobs were given to the executor")
            try:
                with joblib.parallel_config(backend=self.engine, **remote):
                    joblib.Parallel(**options)(joblib.delayed(work)(item) for item in items)
            except Exception as error:  # each engine has its own; what a job itself raises, `work` keeps
                raise WorkersLostError(f"{type(error).__name__}: {one_line(error)[:200]}") from error


def check_engine(engine: str, jobs: int, address: str | None = None) -> Engine:
    """Return the engine of a name; ConfigError if there is none, if it is not installed, or if options do not fit."""
    if engine not in ENGINES:
        raise ConfigError(f"engine {engine!r}: use {', '.join(ENGINES[:-1])} or {ENGINES[-1]}")
    package = CLUSTERS.get(engine)
    if package and importlib.util.find_spec(package) is None:
        raise ConfigError(f"engine {engine} needs a package that is not installed: pip install 'gaintune[sweep]'")
    if jobs < 1:
        raise ConfigError(f"jobs is {jobs}: at least one run at a time")
    if engine == "sequential" and jobs > 1:
        raise ConfigError(f"engine sequential does one run after another: leave jobs={jobs} out, or use loky")
    if address and not package:
        raise ConfigError(f"an address is of a Ray or Dask cluster; engine {engine} has none")
    return engine  # type: ignore[return-value]  # checked above


@contextlib.contextmanager
def open_pool(engine: Engine, jobs: int, address: str | None = None, *, cuda: bool | None = False) -> Iterator[Pool]:
    """Connect to a cluster, or start workers here; a cluster that was started for the block is stopped at its end.

    Without an address Ray and Dask use the cluster that this process is connected to, else the one their own settings
    name (RAY_ADDRESS, DASK_SCHEDULER_ADDRESS), else new processes of this machine. `cuda` says whether runs compute on
    CUDA: True, False, or None where this machine has no such device but others may. Workers then get a device each:
    from Ray, or by themselves where they are processes of this machine that were started for the block.

    Raises:
        SweepError: the cluster does not answer, or has fewer cores than jobs.
    """
    if engine in ("sequential", "loky"):
        yield Pool(engine, joblib.cpu_count(), devices=_devices_here() if cuda and engine == "loky" else ())
    else:
        with (_ray if engine == "ray" else _dask)(jobs, address, cuda) as pool:
            needed = max(jobs, 2) if engine == "ray" else jobs  # see Pool.run
            if pool.cores < needed:
                raise SweepError(
                    f"the {engine} cluster has {pool.cores} cores, {needed} are needed: lower jobs, or add nodes"
                )
            yield pool


def _devices_here() -> tuple[str, ...]:
    import torch

    return visible_devices(torch.cuda.device_count())


@contextlib.contextmanager
def _ray(jobs: int, address: str | None, cuda: bool | None) -> Iterator[Pool]:
    import ray
    from ray.util.joblib import register_ray

    mine = not ray.is_initialized()
    if mine:
        known = address or os.environ.get("RAY_ADDRESS")
        local: dict[str, Any] = {} if known else {"num_cpus": max(jobs, joblib.cpu_count()), "include_dashboard": False}
        try:
            ray.init(address=address, log_to_driver=False, **local)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise SweepError(f"no Ray cluster at {known or 'this machine'} ({one_line(error)[:200]})") from None
    register_ray()
    try:
        resources = ray.cluster_resources()
        gpus = 0 if cuda is False else int(resources.get("GPU", 0))
        if cuda and not gpus:
            raise SweepError("the Ray cluster has no GPU, and this process has: start its nodes with GPUs, or set "
                             "plan.model.device=cpu")  # fmt: skip
        yield Pool("ray", int(resources.get("CPU", 0)), gpus=gpus)
    finally:
        if mine:
            ray.shutdown()


@contextlib.contextmanager
def _dask(jobs: int, address: str | None, cuda: bool | None) -> Iterator[Pool]:
    import dask.config
    from distributed import Client, get_client

    client, mine, devices, here = None, True, (), 0
    if address is None:
        with contextlib.suppress(ValueError):  # this process is connected to none
            client, mine = get_client(), False
    if client is None:
        known = address or dask.config.get("scheduler-address", None)
        local: dict[str, Any] = {"n_workers": max(2, jobs), "threads_per_worker": 1, "dashboard_address": None}
        local |= {"silence_logs": logging.ERROR, "memory_limit": None}  # its own limit kills at a share of the memory
        environment = dict(os.environ)
        try:
            client = Client(address=known) if known else Client(**local)
        except OSError as error:
            raise SweepError(f"no Dask scheduler at {known or 'this machine'} ({one_line(error)[:200]})") from None
        for name in set(os.environ) - set(environment):  # Dask leaves its workers' OMP_NUM_THREADS=1 behind
            del os.environ[name]
        os.environ.update(environment)
        if not known:
            here = joblib.cpu_count()  # its workers have one thread each so that joblib sees so many; they share all
            devices = _devices_here() if cuda else ()
    try:
        cores: dict[str, int] = client.ncores()  # type: ignore[assignment]  # only asynchronous clients give a coroutine
        yield Pool("dask", max(sum(cores.values()), here), devices=devices)
    finally:
        if mine:
            client.close()
