"""Independent jobs over joblib on processes of this machine, a Ray cluster or a Dask cluster."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import joblib

from gaintune.errors import ConfigError, SweepError, one_line
from gaintune.models import visible_devices

Engine = Literal["loky", "ray", "dask", "sequential"]
ENGINES: tuple[Engine, ...] = get_args(Engine)
CLUSTERS = {"ray": "ray", "dask": "distributed"}


class WorkersLostError(Exception):
    """The workers are gone in the middle of their jobs, one of them killed; nobody else says which."""


@dataclass(frozen=True)
class Pool:
    """Workers that are ready.

    Attributes:
        engine: what runs them.
        cores: of all of them together.
        devices: CUDA devices of this machine, as CUDA_VISIBLE_DEVICES names them, of which every worker is to take one;
            none where there are none, or where the engine or whoever started its cluster shares them out.
        gpus: of a Ray cluster, for it to share out.
    """

    engine: Engine
    cores: int
    devices: tuple[str, ...] = ()
    gpus: int = 0

    def threads(self, jobs: int) -> int | None:
        """Threads for each of so many jobs at a time, at most OMP_NUM_THREADS; None leaves them as they are."""
        if self.engine == "sequential":
            return None
        limit = os.environ.get("OMP_NUM_THREADS", "")
        share = max(1, self.cores // jobs)
        return min(share, int(limit)) if limit.isdigit() and int(limit) > 0 else share

    def asked(self, workers: int) -> dict[str, Any]:
        """What Ray is asked for so many workers: to spread them over its nodes, and a share of a GPU where it has any.

        No cores, which Ray would wait for: a node may be lost, or others have them.
        """
        # so many to a device that all of them find a place
        share = {"num_gpus": 1 / math.ceil(workers / self.gpus)} if self.gpus else {}
        return {"scheduling_strategy": "SPREAD", **share}

    def run(self, work: Callable[[Any], None], items: Sequence[Any], jobs: int) -> None:
        """Call `work` on each item, `jobs` at a time, each in a worker that may be used again for another.

        Raises:
            WorkersLostError: a worker died. What the others were doing may be lost, too; ask for what is missing again.
        """
        # joblib takes one job at a time to mean this process, where a killed worker would be the end of everything: so
        # two workers, and one job handed out at a time
        workers = 1 if self.engine == "sequential" else max(2, jobs)
        remote = {"ray_remote_args": self.asked(workers)} if self.engine == "ray" else {}
        options: dict[str, Any] = {"n_jobs": workers, "pre_dispatch": jobs, "batch_size": 1}
        with warnings.catch_warnings():
            # a worker is started anew after a while, which joblib warns of as a possible leak of memory
            warnings.filterwarnings("ignore", message="A worker stopped while some jobs were given to the executor")
            try:
                with joblib.parallel_config(backend=self.engine, **remote):
                    joblib.Parallel(**options)(joblib.delayed(work)(item) for item in items)
            except Exception as error:  # each engine has its own; what a job itself raises, `work` keeps
                raise WorkersLostError(f"{type(error).__name__}: {one_line(error)[:200]}") from error


def check_engine(engine: str, jobs: int, address: str | None = None) -> Engine:
    """The engine by name.

    Raises:
        ConfigError: no such engine, one that is not installed, or options that do not fit it.
    """
    if engine not in ENGINES:
        raise ConfigError(f"engine {engine!r}: use {', '.join(ENGINES[:-1])} or {ENGINES[-1]}")
    package = CLUSTERS.get(engine)
    if package and importlib.util.find_spec(package) is None:
        raise ConfigError(f"engine {engine} needs a package that is not there: pip install 'gaintune[sweep]'")
    if jobs < 1:
        raise ConfigError(f"jobs is {jobs}: at least one run at a time")
    if engine == "sequential" and jobs > 1:
        raise ConfigError(f"engine sequential does one run after another: leave jobs={jobs} out, or use loky")
    if address and not package:
        raise ConfigError(f"an address is of a Ray or Dask cluster; engine {engine} has none")
    return engine  # type: ignore[return-value]  # looked up above


@contextlib.contextmanager
def open_pool(engine: Engine, jobs: int, address: str | None = None, *, cuda: bool | None = False) -> Iterator[Pool]:
    """Connect to a cluster, or start workers here; a cluster that was started for this is stopped at the end.

    Without an address Ray and Dask use the cluster that this process is connected to, else the one their own settings
    name (RAY_ADDRESS, DASK_SCHEDULER_ADDRESS), else one of this machine's processes. `cuda` says whether runs
    compute on CUDA: True, False, or None where this machine has no such device but others may. Workers then get a
    device each: from Ray, or by themselves where they are processes of this machine that were started for this.

    Raises:
        SweepError: the cluster does not answer, or has fewer cores than jobs.
    """
    if engine == "sequential":
        yield Pool(engine, joblib.cpu_count())
    elif engine == "loky":
        yield Pool(engine, joblib.cpu_count(), devices=_devices_here() if cuda else ())
    else:
        with (_ray if engine == "ray" else _dask)(jobs, address, cuda) as pool:
            needed = max(jobs, 2) if engine == "ray" else jobs  # its pool of one is this process
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
        with contextlib.suppress(ValueError):  # there is none
            client, mine = get_client(), False
    if client is None:
        known = address or dask.config.get("scheduler-address", None)
        local: dict[str, Any] = {"n_workers": max(2, jobs), "threads_per_worker": 1, "dashboard_address": None}
        local |= {"silence_logs": logging.ERROR, "memory_limit": None}  # its own kills at a share of the memory
        environment = dict(os.environ)
        try:
            client = Client(address=known) if known else Client(**local)
        except OSError as error:
            raise SweepError(f"no Dask scheduler at {known or 'this machine'} ({one_line(error)[:200]})") from None
        for name in set(os.environ) - set(environment):  # OMP_NUM_THREADS=1 for its workers, which it leaves here
            del os.environ[name]
        os.environ.update(environment)
        if not known:
            here = joblib.cpu_count()  # its workers have one thread each so that joblib sees so many; they share all
            devices = _devices_here() if cuda else ()
    try:
        cores: dict[str, int] = client.ncores()  # type: ignore[assignment]  # a coroutine of asynchronous clients alone
        yield Pool("dask", max(sum(cores.values()), here), devices=devices)
    finally:
        if mine:
            client.close()
