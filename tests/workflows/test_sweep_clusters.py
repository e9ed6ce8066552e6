"""The sweep on real clusters of this machine's processes: two Ray nodes, and Dask workers; one worker is killed."""

import os
from pathlib import Path

import joblib
import pytest

from gaintune.workflows.sweep import run_sweep
from gaintune.workflows.sweep.workers import open_pool
from support import killing, tiny_sweep

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def expected(tiny, tmp_path_factory):
    """A grid, and the figures that it gives in this process."""
    folder = tmp_path_factory.mktemp("expected")
    grid = tiny_sweep.grid(tiny, folder, seeds=[0, 1])
    table = run_sweep(grid, folder / "sweep", engine="sequential")
    return grid, table.frame().set_index("id")["backward_transfer"].to_dict()


@pytest.fixture
def reachable(monkeypatch):
    """Processes that are started see the package and these helpers."""
    paths = [str(Path(tiny_sweep.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))


def figures(table):
    assert [row.error for row in table.failed] == []
    return table.frame().set_index("id")["backward_transfer"].to_dict()


def test_two_ray_nodes_share_a_sweep_and_survive_a_killed_worker(expected, reachable, monkeypatch, tmp_path):
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'gaintune[sweep]'")
    from ray.cluster_utils import Cluster

    grid, values = expected
    (tmp_path / "nodes").mkdir()
    monkeypatch.setenv("NODES", str(tmp_path / "nodes"))
    grid = {**grid, "plan": {**grid["plan"], "model": {**grid["plan"]["model"], "device": "auto"}}}
    # each node says that it has a GPU: Ray takes its word, and tells the worker there which one is its own
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1, num_gpus=1)
        cluster.wait_for_nodes()
        killer = tiny_sweep.Killer(tmp_path / "sweep")
        killer.start()
        options = {"engine": "ray", "jobs": 2, "address": cluster.address, "prepare": tiny_sweep.note_node}
        table = run_sweep(grid, tmp_path / "sweep", **options)
        assert list(figures(table).values()) == pytest.approx(list(values.values()), abs=1e-3)  # ids count the device
        assert killer.killed is not None
        assert [file.read_text() for file in (tmp_path / "nodes").iterdir()] == ["0", "0"]
        assert not ray.is_initialized()  # left as it was found
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_a_dask_cluster_survives_a_killed_worker(expected, reachable, tmp_path):
    pytest.importorskip("distributed", reason="dask is not installed: pip install 'gaintune[sweep]'")
    from distributed import LocalCluster

    grid, values = expected
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        killer = tiny_sweep.Killer(tmp_path / "sweep")
        killer.start()
        table = run_sweep(grid, tmp_path / "sweep", engine="dask", jobs=2, address=cluster.scheduler_address)
        assert figures(table) == pytest.approx(values, abs=1e-3) and killer.killed is not None


def test_dask_starts_workers_of_its_own_and_gives_up_a_run_that_kills_them(expected, reachable, monkeypatch, tmp_path):
    pytest.importorskip("distributed", reason="dask is not installed: pip install 'gaintune[sweep]'")
    from distributed import get_client

    grid, _ = expected
    with monkeypatch.context() as patch:
        patch.setattr(joblib, "cpu_count", lambda: 64)
        patch.delenv("OMP_NUM_THREADS", raising=False)
        with open_pool("dask", 1) as pool:
            assert pool.threads(1) == 64  # its two workers have one thread each for joblib, and share all cores
            (worker, _) = get_client().scheduler_info()["workers"].values()
            assert worker["memory_limit"] == 0  # none of its own: the kernel alone says when memory is out
    grid = {**grid, "methods": ["gain-ffn"], "seeds": [0]}
    table = run_sweep(grid, tmp_path / "sweep", engine="dask", prepare=killing.die)
    assert [row.error for row in table.rows] == ["its worker was killed, twice (out of memory?)"]
