"""Benchmarks on the command line: what is printed, kept and refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gaintune.cli.app import app
from gaintune.cli.evaluate import _short, benchmark_tables
from gaintune.errors import ConfigError, DataError
from gaintune.evaluate.benchmarks import BenchmarkConfig, BenchmarkReport, BenchmarkScore
from gaintune.evaluate.benchmarks.records import TaskFacts, compare_scores, with_group_difference
from support import tiny_base, tiny_domains

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
    assert list(_short(["runs/law", "runs/base"]).values()) == ["runs/law", "runs/base"]
    assert _short(["runs/base"]) == {"runs/base": "runs/base"}
    assert _short([]) == {}


def test_domains_and_benchmarks_in_one_go(work, arguments):
    sizes = ("--validation-tokens", 256, "--block-size", 32, "--set", "data.train_tokens=512")
    found = json.loads(run(*arguments, "--domain", f"prose={work / 'prose.jsonl'}", *sizes, "--limit", 3, "--json"))
    assert [figure["domain"] for figure in found["domains"]] == ["prose", "prose"]
    assert found["benchmarks"]["base"][0]["rows"] == 3


def test_domains_are_read_before_the_benchmarks_are_asked(work, arguments, tmp_path):
    with pytest.raises(DataError, match="no such file"):
        run(*arguments, "--domain", f"prose={work / 'nowhere.jsonl'}")
    assert not list((tmp_path / "cache").glob("benchmarks/*")), "nothing was asked"


def test_scores_are_not_kept_where_that_is_said(arguments, tmp_path):
    run(*arguments, "--no-cache")
    assert not list((tmp_path / "cache").glob("benchmarks/*"))


def score(metric, value, items, **changes):
    facts = TaskFacts("rows", "test", 0, "1")
    return BenchmarkScore("quiz", metric, value, None, items, len(items), "mean", True, facts, **changes)


def test_every_difference_has_its_unit_and_a_score_the_same_one_in_every_row():
    config = BenchmarkConfig.model_validate({"tasks": "quiz", "bootstrap_samples": 20})
    base = (score("acc", 0.5, (0.0, 1.0)), score("length", 0.75, (0.5, 1.0)))
    mine = (score("acc", 1.0, (1.0, 1.0)), score("length", 2.5, (2.0, 3.0)))
    report = BenchmarkReport(("quiz",), base, {"mine": mine}, compare_scores(base, mine, "mine", config), {})
    shown, *_ = benchmark_tables(report)
    *_, scores, differences = (list(column.cells) for column in shown.columns)
    assert [str(each) for each in scores] == ["50.00 %", "100.00 %", "0.75", "2.50"]
    assert str(differences[1]).startswith("+50.00") and str(differences[1]).endswith(" points")
    assert str(differences[3]).startswith("+1.75") and "points" not in str(differences[3])
    assert "points" not in str(shown.columns[-1].header)


def test_a_group_that_is_a_plain_mean_over_its_tasks_has_a_difference_too():
    config = BenchmarkConfig.model_validate({"tasks": "quiz", "bootstrap_samples": 50})
    base = [
        replace(score("acc", 0.5, (0.0, 1.0)), task="a"),
        replace(score("acc", 0.25, (0.0, 0.0, 1.0, 0.0)), task="b"),
    ]
    mine = [replace(base[0], value=1.0, items=(1.0, 1.0)), base[1]]
    facts = {"task": "both", "items": (), "rows": 6, "aggregation": "other", "members": ("a", "b")}
    base.append(replace(base[0], value=0.375, **facts))
    mine.append(replace(mine[0], value=0.625, **facts))
    *_, group = compare_scores(base, mine, "mine", config)
    assert group.difference is None
    told = with_group_difference(group, base, mine, config)
    assert (told.difference.value, told.unit) == (pytest.approx(25.0), "points")
    weighted = replace(group, adapted=replace(group.adapted, value=0.5))
    assert with_group_difference(weighted, base, mine, config).difference is None


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
