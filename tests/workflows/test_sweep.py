"""The sweep: what is missing is computed and nothing else, and neither a failed run nor a killed worker ends it."""

import json
import shutil
import threading
from pathlib import Path

import pandas as pd
import pytest
import torch
from filelock import FileLock

from gaintune.config import build_plan
from gaintune.data import load_domain
from gaintune.errors import ConfigError, RunDirectoryError, SweepError
from gaintune.evaluate import BaseLosses
from gaintune.models import load_tokenizer
from gaintune.results import DomainLoss
from gaintune.storage import read_json
from gaintune.workflows import run_sequence
from gaintune.workflows.sweep import read_grid, run_sweep
from gaintune.workflows.sweep.grid import planned_runs
from gaintune.workflows.sweep.workers import Job, Pool, work
from support import killing, refused, tiny_sweep
from support.files import contents


@pytest.fixture(scope="module")
def swept(tiny, tmp_path_factory):
    """A finished sweep of four runs, done one after another in this process: its grid, folder and table."""
    folder = tmp_path_factory.mktemp("swept")
    grid = tiny_sweep.grid(tiny, folder, rates={"gain-ffn": [0.01, 0.03], "lora": [0.01, 0.03]})
    return grid, folder / "sweep", run_sweep(grid, folder / "sweep", engine="sequential")


@pytest.fixture
def copy(swept, tmp_path):
    """The same in a folder of its own, to be damaged."""
    grid, folder, _ = swept
    shutil.copytree(folder, tmp_path / "sweep")
    return grid, tmp_path / "sweep"


def test_every_run_is_a_row_with_its_numbers(swept):
    grid, folder, table = swept
    assert len(table.finished) == 4 and not table.failed
    assert [row.run.id for row in table.rows] == [run.id for run in planned_runs(read_grid(grid))]
    frame = pd.read_csv(folder / "sweep.csv")
    pd.testing.assert_frame_equal(pd.read_parquet(folder / "sweep.parquet"), table.frame(), check_dtype=False)
    assert (frame["status"] == "finished").all() and frame["id"].nunique() == 4
    assert set(frame["numbers"]) == {"float32"} and set(frame["device"]) == {"cpu"}
    for row in frame.itertuples():
        matrix = read_json(folder / "runs" / row.id / "matrix.json")["methods"][0]
        assert matrix["summary"]["in_domain"]["value"] == pytest.approx(row.in_domain)
        assert matrix["summary"]["backward_transfer"]["low"] == pytest.approx(row.backward_transfer_low)
        assert matrix["info"]["lr"] == row.lr and row.domains == "prose code"
    cells = pd.read_csv(folder / "cells.csv")
    assert len(cells) == 4 * 2 * 2
    diagonal = cells[cells["place"] == "learning"].groupby("id")["change_percent"].mean()
    assert diagonal.to_dict() == pytest.approx(frame.set_index("id")["in_domain"].to_dict())


def test_a_run_of_a_sweep_is_the_run_of_its_plan_and_the_base_is_measured_once(swept, tmp_path):
    _, folder, table = swept
    row = table.rows[3]
    run_sequence(row.run.plan, tmp_path / "alone")
    times = {"events.jsonl", ".lock"}
    assert contents(folder / "runs" / row.run.id, times) == contents(tmp_path / "alone", times)
    assert len(list((folder / "base").glob("*.json"))) == 2  # two domains, though four runs measured them


def test_shared_losses_are_measured_once_for_all_that_decides_them(swept, tmp_path):
    plan = swept[2].rows[0].run.plan
    tokenizer = load_tokenizer(plan.model)
    prose, code = (load_domain(domain, plan.data, tokenizer) for domain in plan.data.domains)
    shared, measured = BaseLosses(tmp_path), []

    def get(domain, **changes):
        def measure():
            measured.append(domain.name)
            return DomainLoss((1.5,), (10,), (20,))

        facts = {"fingerprint": "f", "numbers": "float32", "device": "cpu", "batch_size": 4, **changes}
        return shared.get(domain, measure, **facts)

    assert get(prose) == get(prose) == DomainLoss((1.5,), (10,), (20,))
    threads = [threading.Thread(target=get, args=(code,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert measured == ["prose", "code"]
    for change in ({"fingerprint": "g"}, {"numbers": "bfloat16"}, {"device": "cuda"}, {"batch_size": 2}):
        get(prose, **change)
    assert len(measured) == 6


def test_a_rerun_computes_only_what_is_missing(copy):
    grid, folder = copy
    before, done = tiny_sweep.numbers(folder), tiny_sweep.events(folder)
    gone = sorted(done)[2]
    (folder / "run.json").unlink()  # as a version left it that wrote none
    shutil.rmtree(folder / "runs" / gone)
    assert not run_sweep(grid, folder, engine="sequential").failed
    assert tiny_sweep.numbers(folder) == before
    after = tiny_sweep.events(folder)
    assert {name for name in after if after[name] != done[name]} == {gone}
    again = run_sweep({**grid, "seeds": [0, 1], "rates": 0.01}, folder, engine="sequential")  # a grown grid
    assert len(again.finished) == 4
    assert {name: text for name, text in tiny_sweep.events(folder).items() if name in after} == after
    assert len(tiny_sweep.events(folder)) == 4 + 2


def test_keys_that_leave_numbers_alone_take_finished_runs_as_they_are(copy, tiny, tmp_path):
    grid, folder = copy
    before, done = tiny_sweep.numbers(folder), tiny_sweep.events(folder)
    plan = {**grid["plan"], "train": {**grid["plan"]["train"], "batch_size": 2, "gradient_accumulation": 2}}
    table = run_sweep({**grid, "plan": plan, "seeds": [0, 1], "rates": 0.01}, folder, engine="sequential")
    assert len(table.finished) == 4 and sum(row.run.id in before for row in table.rows) == 2
    assert {name: text for name, text in tiny_sweep.events(folder).items() if name in done} == done
    assert {row.run.lr for row in table.rows} == {0.01} and len(tiny_sweep.numbers(folder)) == 4 + 2
    other = {**grid["plan"], "train": {**grid["plan"]["train"], "batch_size": 2}}  # twice the updates: other runs
    again = run_sweep({**grid, "plan": other, "rates": 0.01}, folder, engine="sequential")
    assert not {row.run.id for row in again.rows} & {*before, *(row.run.id for row in table.rows)}


def test_another_grid_clears_a_sweep_in_which_nothing_was_trained(tiny, tmp_path):
    grid = {**tiny_sweep.grid(tiny, tmp_path), "methods": [{"name": "lora", "targets": ["no_such_module"]}]}
    assert run_sweep(grid, tmp_path / "sweep", engine="sequential").failed
    table = run_sweep({**grid, "methods": ["gain-ffn"]}, tmp_path / "sweep", engine="sequential")
    assert [path.name for path in (tmp_path / "sweep" / "runs").iterdir()] == [row.run.id for row in table.finished]


def test_a_failed_run_is_reported_and_the_others_go_on(tiny, tmp_path):
    grid = tiny_sweep.grid(tiny, tmp_path)
    grid["methods"] = [{"name": "lora", "label": "nowhere", "targets": ["no_such_module"]}, *grid["methods"]]
    table = run_sweep(grid, tmp_path / "sweep", engine="sequential")
    assert [row.run.label for row in table.failed] == ["nowhere"]
    assert "cannot be attached to this base" in table.failed[0].error
    assert [row.run.label for row in table.finished] == ["gain-ffn", "lora"]
    frame = pd.read_csv(tmp_path / "sweep" / "sweep.csv").set_index("label")
    assert frame["status"].to_dict() == {"nowhere": "failed", "gain-ffn": "finished", "lora": "finished"}
    assert pd.isna(frame.loc["nowhere", "in_domain"])
    done = tiny_sweep.events(tmp_path / "sweep")
    again = run_sweep(grid, tmp_path / "sweep", engine="sequential")  # it alone is tried again
    assert len(again.failed) == 1
    after = tiny_sweep.events(tmp_path / "sweep")
    assert {name for name in after if after[name] != done[name]} == {again.failed[0].run.id}


@pytest.mark.timeout(900)
def test_a_killed_worker_loses_nothing(swept, tmp_path):
    grid, reference, _ = swept
    grid, folder = {**grid, "rates": 0.01}, tmp_path / "sweep"
    killer = tiny_sweep.Killer(folder)
    killer.start()
    table = run_sweep(grid, folder, engine="loky", jobs=2)
    assert killer.killed is not None and [row.error for row in table.failed] == []
    outcome = read_json(folder / "outcomes" / f"{killer.killed}.json")
    assert (outcome["state"], outcome["attempts"]) == ("finished", 2)
    started = [json.loads(line)["event"] for line in tiny_sweep.events(folder)[killer.killed].splitlines()]
    assert started.count("method started") == 2
    assert started.count("learnt") == 2  # the first domain's adapter was kept
    expected = pd.read_csv(reference / "sweep.csv").set_index("id")["backward_transfer"]
    found = table.frame().set_index("id")["backward_transfer"]
    assert found.to_dict() == pytest.approx(expected[found.index].to_dict(), abs=1e-3)  # threads may differ


@pytest.mark.timeout(900)
def test_a_run_that_kills_every_worker_is_given_up(tiny, tmp_path):
    grid = tiny_sweep.grid(tiny, tmp_path, methods=["gain-ffn"])
    table = run_sweep(grid, tmp_path / "sweep", engine="loky", jobs=2, prepare=killing.die)
    assert [row.error for row in table.rows] == ["its worker was killed, twice (out of memory?)"]


def test_other_texts_are_not_mixed_into_a_sweep(copy):
    grid, folder = copy
    file = Path(grid["plan"]["data"]["domains"][0].partition("=")[2])
    text = file.read_text()
    try:
        file.write_text(text.replace("the", "teh"))
        assert not run_sweep(grid, folder, engine="sequential").failed  # nothing is missing, nothing is read
        with pytest.raises(RunDirectoryError, match=r"inputs\.json says otherwise: domains\.prose\.content_hash"):
            run_sweep({**grid, "seeds": [0, 7]}, folder, engine="sequential")
    finally:
        file.write_text(text)


def test_a_run_of_a_version_with_other_defaults_is_not_taken_for_this_one(copy):
    grid, folder = copy
    file = next((folder / "runs").glob("*/plan.yaml"))
    file.write_text(file.read_text().replace("clip: 1.0", "clip: 2.0"))  # a default: ids do not count it
    with pytest.raises(RunDirectoryError, match=r"plan\.yaml says otherwise: train\.clip.*A default has changed"):
        run_sweep(grid, folder, engine="sequential")


def test_a_worker_without_the_gpu_of_whoever_started_it_does_not_fall_back_to_its_cpu(tiny, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this process would find a GPU")
    plan = tiny_sweep.grid(tiny, tmp_path)["plan"]
    plan["model"]["device"] = "auto"
    job = Job("run", build_plan(plan), tmp_path / "sweep", tmp_path, kind="cuda")
    work(job)
    outcome = read_json(job.outcome)
    assert outcome["state"] == "failed" and not job.run.exists()
    assert "is cuda where the sweep was started and cpu in this worker" in outcome["error"]


def test_what_cannot_work_is_refused_before_anything_is_run(swept, tmp_path):
    grid, folder, table = swept
    for options, message in (
        ({"engine": "slurm"}, "use loky, ray, dask or sequential"),
        ({"engine": "sequential", "jobs": 2}, "one run after another"),
        ({"jobs": 0}, "at least one run"),
        ({"address": "auto"}, "engine loky has none"),
    ):
        refused(ConfigError, message, run_sweep, grid, tmp_path / "a", **options)
    assert not (tmp_path / "a").exists()
    refused(RunDirectoryError, "is a run, not a sweep", run_sweep, grid, table.rows[0].folder, engine="sequential")
    with FileLock(folder / ".lock"), pytest.raises(RunDirectoryError, match="in use by another process"):
        run_sweep(grid, folder, engine="sequential")


def test_workers_that_cannot_start_are_one_message(swept, tmp_path):
    grid, _, _ = swept
    with pytest.raises(SweepError, match="loky workers cannot work"):
        run_sweep(grid, tmp_path / "sweep", jobs=2, prepare=threading.Lock().acquire)  # cannot be sent to a process


def test_threads_are_shared_out_and_ray_spreads_runs_over_shares_of_its_gpus(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [Pool("loky", 8).threads(jobs) for jobs in (1, 3, 8, 20)] == [8, 2, 1, 1]
    assert Pool("sequential", 8).threads(1) is None
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert Pool("dask", 64).threads(4) == 2
    assert Pool("ray", 32).ray_options(2) == {"scheduling_strategy": "SPREAD"}
    assert [Pool("ray", 32, gpus=2).ray_options(workers)["num_gpus"] for workers in (2, 3, 5)] == [1, 1 / 2, 1 / 3]
