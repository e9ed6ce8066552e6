"""The sweep as a person starts it: its tables, files, exit codes and refusals."""

import pandas as pd
import pytest
import yaml
from test_cli import gaintune, refused

from gaintune.storage import SWEEP, read_json, take_folder
from support import tiny_base, tiny_sweep


@pytest.fixture
def grid(tmp_path):
    values = tiny_sweep.grid(tiny_base.folder(tmp_path / "base"), tmp_path, rates=[0.01, 0.03])
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "grid.yaml"


def test_a_grid_is_run_compared_and_continued(grid, tmp_path):
    run = tmp_path / "sweep"
    narrow = ("--set", "plan.evaluate.confidence=0.9")
    done = gaintune("sweep", grid, "--run", run, "--engine", "sequential", *narrow)
    assert done.returncode == 0, done.stderr
    told = " ".join(done.stdout.split())
    assert "4 runs finished, 0 failed" in told
    assert "gain-ffn minus lora" in told
    assert "Traceback" not in done.stderr
    names = {f"{stem}.{kind}" for stem in ("sweep", "cells") for kind in ("csv", "parquet")}
    names |= {"grid.yaml", "comparison.md", "comparison.json", "tradeoff.png", "tradeoff.svg"}
    assert names <= {file.name for file in run.iterdir()}
    assert read_json(run / "comparison.json")["confidence"] == 0.9
    before = tiny_sweep.events(run)
    done = gaintune(
        "sweep", grid, "--run", run, "--set", "seeds=[0]", "--set", "methods=[gain-ffn, {name: lora, label: bad, "
        "targets: [none]}]", "--engine", "sequential", *narrow
    )  # fmt: skip
    message = refused(done, code=1)
    assert "2 runs failed" in message and "cannot be attached to this base" in message
    after = tiny_sweep.events(run)
    assert {name: after[name] for name in before} == before
    assert pd.read_csv(run / "sweep.csv")["status"].tolist() == ["finished", "finished", "failed", "failed"]


def test_mistakes_are_one_line(grid):
    assert "unknown key 'rate'; did you mean 'rates'?" in refused(gaintune("sweep", grid, "--set", "rate=1"))
    told = refused(gaintune("sweep", grid, "--figure", "retention"))
    assert "no figure is called 'retention'; the figures are in_domain, " in told
    assert "target 21: methods are matched at" in refused(gaintune("sweep", grid, "--target", "21"))
    assert "use loky, ray, dask or sequential" in refused(gaintune("sweep", grid, "--engine", "slurm"))


def test_help_names_engines_and_files():
    told = " ".join(gaintune("sweep", "--help").stdout.replace("│", " ").split())
    for text in ("loky", "[default: runs/sweep]", "sweep.csv", "exit code 1", "--jobs", "--target"):
        assert text in told


def test_a_comparison_of_an_earlier_call_is_not_left_beside_another_table(grid, tmp_path):
    run = tmp_path / "sweep"
    with take_folder(run, SWEEP):
        (run / "comparison.md").write_text("of another grid")
    values = yaml.safe_load(grid.read_text()) | {"methods": ["gain"], "rates": [0.01]}
    values["plan"]["data"]["domains"] = values["plan"]["data"]["domains"][:1]  # so there is no earlier domain
    grid.write_text(yaml.safe_dump(values))
    done = gaintune("sweep", grid, "--run", run, "--engine", "sequential")
    assert done.returncode == 0, done.stderr
    told = " ".join(done.stdout.split())
    assert "methods are not compared" in told and "1 run finished, 0 failed; tables " in told
    assert (run / "sweep.csv").is_file() and not (run / "comparison.md").exists()
