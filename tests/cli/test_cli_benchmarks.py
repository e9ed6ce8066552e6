"""Benchmarks on the command line: what is printed, kept and refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from gaintune.cli.evaluate import _short, benchmark_tables
from gaintune.errors import ConfigError, DataError
from gaintune.evaluate.benchmarks import BenchmarkConfig, BenchmarkReport, BenchmarkScore
from gaintune.evaluate.benchmarks.records import TaskFacts, compare_scores
from gaintune.evaluate.benchmarks.run import with_group_difference
from support import refused, tiny_base, tiny_domains
from support.cli import QUICK, run
from support.files import write_rows


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A tiny model, an adapter that the command line made, and rows of one benchmark."""
    folder = tmp_path_factory.mktemp("work")
    tiny_base.folder(folder / "base", max_position_embeddings=512)
    prose, _ = tiny_domains.write(folder)
    sizes = ("--train-tokens", 512, "--validation-tokens", 256, "--block-size", 32, "--lr", 0.05)
    where = ("--model", folder / "base", "--domain", f"prose={prose}", "--out", folder / "adapter")
    run("adapt", "--method", "gain-ffn", *where, *sizes, *QUICK)
    rows = [
        {"query": f"Question: what comes after {n}?\nAnswer:", "choices": [str(n + 1), str(n), "many"], "gold": 0}
        for n in range(8)
    ]
    write_rows(folder / "rows" / "arc_easy.jsonl", rows)
    return folder


@pytest.fixture
def arguments(work, tmp_path, monkeypatch):
    monkeypatch.setenv("GAINTUNE_CACHE", str(tmp_path / "cache"))
    local = ("--benchmark-source", "local", "--benchmark-data", work / "rows")
    return ("evaluate", work / "base", "--adapter", work / "adapter", "--benchmarks", "arc_easy", *local, *QUICK)


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
    assert (accuracy["label"], accuracy["unit"]) == (str(work / "adapter"), "points")
    assert accuracy["difference"]["value"] == pytest.approx(100 * (accuracy["adapted"] - accuracy["base"]))
    assert f"{100 * accuracy['base']:.2f} ± " in printed
    assert f"{accuracy['difference']['value']:+.2f} [" in printed


def test_adapters_are_named_by_what_differs_in_their_paths():
    for paths, names in (
        (["runs/a/lora/05/adapter", "runs/a/gain/05/adapter"], ["lora", "gain"]),
        (["runs/a", "runs/a/b", "other"], ["runs/a", "runs/a/b", "other"]),
        (["runs/a", "runs/a/b"], ["a", "a/b"]),
        (["runs/a/adapter"], ["adapter"]),
        (["runs/law", "runs/base"], ["runs/law", "runs/base"]),
        (["runs/base"], ["runs/base"]),
        ([], []),
    ):
        assert _short(paths) == dict(zip(paths, names, strict=True))


def test_domains_and_benchmarks_in_one_go(work, arguments):
    sizes = ("--validation-tokens", 256, "--block-size", 32, "--set", "data.train_tokens=512")
    found = json.loads(run(*arguments, "--domain", f"prose={work / 'prose.jsonl'}", *sizes, "--limit", 3, "--json"))
    assert [figure["domain"] for figure in found["domains"]] == ["prose", "prose"]
    assert found["benchmarks"]["base"][0]["rows"] == 3


def test_domains_are_read_before_the_benchmarks_and_scores_are_not_kept_without_a_cache(work, arguments, tmp_path):
    refused(DataError, "no such file", run, *arguments, "--domain", f"prose={work / 'nowhere.jsonl'}")
    assert not list((tmp_path / "cache").glob("benchmarks/*")), "nothing was asked"
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
    changed = with_group_difference(group, base, mine, config)
    assert (changed.difference.value, changed.unit) == (pytest.approx(25.0), "points")
    weighted = replace(group, adapted=replace(group.adapted, value=0.5))
    assert with_group_difference(weighted, base, mine, config).difference is None


def test_options_that_do_not_go_together_are_refused(work, arguments, monkeypatch):
    refused(ConfigError, "--limit is for benchmarks", run, "evaluate", work / "base", "--limit", 3)
    with pytest.raises(ConfigError, match="--allow-code-execution is for benchmarks"):
        run("evaluate", work / "base", "--allow-code-execution")
    refused(ConfigError, "leave --masked and --choices out", run, *arguments, "--masked")
    refused(ConfigError, "benchmarks: source", run, *arguments, "--benchmark-source", "elsewhere")
    with pytest.raises(ConfigError, match="--allow-code-execution"):
        run("evaluate", work / "base", "--benchmarks", "humaneval", "--benchmark-source", "local")
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None)
    refused(ConfigError, r"pip install 'gaintune\[benchmarks\]'", run, *arguments)
