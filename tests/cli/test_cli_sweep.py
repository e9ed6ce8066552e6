"""The sweep as a person starts it: its tables, files, exit codes and refusals."""

import pandas as pd
import pytest
import yaml

from gaintune.storage import SWEEP, read_json, take_folder
from support import tiny_base, tiny_sweep
from support.cli import gaintune, printed, refusal, words_of


@pytest.fixture
def grid(tmp_path):
    values = tiny_sweep.grid(tiny_base.folder(tmp_path / "base"), tmp_path, rates=[0.01, 0.03])
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "grid.yaml"


def test_a_grid_is_run_compared_and_continued(grid, tmp_path):
    run = tmp_path / "sweep"
    narrow = ("--run", run, "--engine", "sequential", "--set", "plan.evaluate.confidence=0.9")
    done = gaintune("sweep", grid, *narrow)
    assert "4 runs finished, 0 failed" in printed(done) and "gain-ffn minus lora" in printed(done)
    assert "Traceback" not in done.stderr
    names = {f"{stem}.{kind}" for stem in ("sweep", "cells") for kind in ("csv", "parquet")}
    names |= {"grid.yaml", "comparison.md", "comparison.json", "tradeoff.png", "tradeoff.svg"}
    assert names <= {file.name for file in run.iterdir()}
    assert read_json(run / "comparison.json")["confidence"] == 0.9
    before = tiny_sweep.events(run)
    methods = "methods=[gain-ffn, {name: lora, label: bad, targets: [none]}]"
    message = refusal(gaintune("sweep", grid, *narrow, "--set", "seeds=[0]", "--set", methods), code=1)
    assert "2 runs failed" in message and "cannot be attached to this base" in message
    after = tiny_sweep.events(run)
    assert {name: after[name] for name in before} == before
    assert pd.read_csv(run / "sweep.csv")["status"].tolist() == ["finished", "finished", "failed", "failed"]


@pytest.mark.parametrize(("option", "value", "message"), [
    ("--set", "rate=1", "unknown key 'rate'; did you mean 'rates'?"),
    ("--figure", "retention", "no figure is called 'retention'; the figures are in_domain, "),
    ("--target", "21", "target 21: methods are matched at"),
    ("--engine", "slurm", "use loky, ray, dask or sequential"),
])  # fmt: skip
def test_mistakes_are_one_line(grid, option, value, message):
    assert message in refusal(gaintune("sweep", grid, option, value))


def test_help_names_engines_and_files():
    for text in ("loky", "[default: runs/sweep]", "sweep.csv", "exit code 1", "--jobs", "--target"):
        assert text in words_of("sweep")


def test_a_comparison_of_an_earlier_call_is_not_left_beside_another_table(grid, tmp_path):
    run = tmp_path / "sweep"
    with take_folder(run, SWEEP):
        (run / "comparison.md").write_text("of another grid")
    values = yaml.safe_load(grid.read_text()) | {"methods": ["gain"], "rates": [0.01]}
    values["plan"]["data"]["domains"] = values["plan"]["data"]["domains"][:1]  # so there is no earlier domain
    grid.write_text(yaml.safe_dump(values))
    shown = printed(gaintune("sweep", grid, "--run", run, "--engine", "sequential"))
    assert "methods are not compared" in shown and "1 run finished, 0 failed; tables " in shown
    assert (run / "sweep.csv").is_file() and not (run / "comparison.md").exists()
