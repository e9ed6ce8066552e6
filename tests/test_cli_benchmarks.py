"""Benchmarks on the command line: what is printed, kept and refused."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import tiny_base
import tiny_domains
from gaintune.cli import app
from gaintune.cli_benchmarks import _short
from gaintune.errors import ConfigError

pytest.importorskip("lm_eval", reason="benchmarks need lm-eval: pip install 'gaintune[benchmarks]'")

NUMBERS = ("--set", "model.dtype=fp32", "--set", "model.device=cpu", "--set", "evaluate.bootstrap_samples=50")


def run(*arguments) -> str:
    done = CliRunner(env={"COLUMNS": "220", "NO_COLOR": "1"}).invoke(app, [str(each) for each in arguments])
    if done.exception is not None:
        raise done.exception
    return done.stdout


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A tiny model, an adapter that the command line made, and rows of one benchmark."""
    folder = tmp_path_factory.mktemp("work")
    tiny_base.folder(folder / "base", max_position_embeddings=512)
    prose, _ = tiny_domains.write(folder)
    sizes = ("--train-tokens", 512, "--validation-tokens", 256, "--block-size", 32, "--lr", 0.05)
    where = ("--model", folder / "base", "--domain", f"prose={prose}", "--out", folder / "adapter")
    run("adapt", "--method", "gain-ffn", *where, *sizes, *NUMBERS)
    rows = [
        {"query": f"Question: what comes after {n}?\nAnswer:", "choices": [str(n + 1), str(n), "many"], "gold": 0}
        for n in range(8)
    ]
    (folder / "rows").mkdir()
    (folder / "rows" / "arc_easy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def arguments(work, tmp_path, monkeypatch):
    monkeypatch.setenv("GAINTUNE_CACHE", str(tmp_path / "cache"))
    local = ("--benchmark-source", "local", "--benchmark-data", work / "rows")
    return ("evaluate", work / "base", "--adapter", work / "adapter", "--benchmarks", "arc_easy", *local, *NUMBERS)


def test_scores_differences_and_rows_are_printed_and_kept(work, arguments, tmp_path):
    printed = run(*arguments)
    assert all(word in printed for word in ("benchmark", "acc_norm", "base", "±", "against the base"))
    assert f"arc_easy: 8 given rows of {work / 'rows' / 'arc_easy.jsonl'}; 0 worked examples" in printed
    assert len(list((tmp_path / "cache" / "benchmarks").glob("*.json"))) == 2
    report = json.loads(run(*arguments, "--json"))["benchmarks"]
    assert report["asked"] == ["arc_easy"]
    assert [score["metric"] for score in report["base"]] == ["acc", "acc_norm"]
    assert report["base"][0]["rows"] == 8
    (accuracy, _) = report["comparisons"]
    assert accuracy["label"] == str(work / "adapter")
    assert accuracy["unit"] == "points"
    expected = 100 * (accuracy["adapted"] - accuracy["base"])
    assert accuracy["difference"]["value"] == pytest.approx(expected)
    assert f"{100 * accuracy['base']:.2f} ± " in printed
    assert f"{accuracy['difference']['value']:+.2f} [" in printed


def test_adapters_are_told_apart_by_what_differs_in_their_paths():
    assert _short(["runs/a/lora/05/adapter", "runs/a/gain/05/adapter"]) == {
        "runs/a/lora/05/adapter": "lora",
        "runs/a/gain/05/adapter": "gain",
    }
    assert list(_short(["runs/a", "runs/a/b", "other"]).values()) == ["runs/a", "runs/a/b", "other"]
    assert list(_short(["runs/a", "runs/a/b"]).values()) == ["a", "a/b"]
    assert _short(["runs/a/adapter"]) == {"runs/a/adapter": "adapter"}
    assert _short([]) == {}


def test_domains_and_benchmarks_in_one_go(work, arguments):
    sizes = ("--validation-tokens", 256, "--block-size", 32, "--set", "data.train_tokens=512")
    found = json.loads(run(*arguments, "--domain", f"prose={work / 'prose.jsonl'}", *sizes, "--limit", 3, "--json"))
    assert [figure["domain"] for figure in found["domains"]] == ["prose", "prose"]
    assert found["benchmarks"]["base"][0]["rows"] == 3


def test_what_does_not_go_together_is_refused(work, arguments, monkeypatch):
    with pytest.raises(ConfigError, match="--limit is for benchmarks"):
        run("evaluate", work / "base", "--limit", 3)
    with pytest.raises(ConfigError, match="--allow-code-execution is for benchmarks"):
        run("evaluate", work / "base", "--allow-code-execution")
    with pytest.raises(ConfigError, match="leave --masked and --choices out"):
        run(*arguments, "--masked")
    with pytest.raises(ConfigError, match="benchmarks: source"):
        run(*arguments, "--benchmark-source", "elsewhere")
    with pytest.raises(ConfigError, match="--allow-code-execution"):
        run("evaluate", work / "base", "--benchmarks", "humaneval", "--benchmark-source", "local")
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None)
    with pytest.raises(ConfigError, match=r"pip install 'gaintune\[benchmarks\]'"):
        run(*arguments)
