"""Snapshots measured over training equal adapters measured one by one; benchmarks are averaged row by row."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from gaintune.analysis import RetentionOptions, Subject, survey_retention, write_result
from gaintune.analysis.retention.report import figure, markdown, result, sides, table
from gaintune.analysis.retention.survey import counting_score, scores_of
from gaintune.config import build_plan
from gaintune.errors import AdapterError, ConfigError
from gaintune.evaluate import compare_adapters
from gaintune.evaluate.benchmarks import BenchmarkConfig, BenchmarkScore, read_config, run_benchmarks
from gaintune.evaluate.benchmarks.records import TaskFacts
from gaintune.models import load_base
from gaintune.training import snapshots_of
from gaintune.workflows import adapt
from support import refused, tiny_base, tiny_domains
from support.files import write_rows
from support.killing import Nothing


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A LoRA and a fully trained adaptation with their snapshots, and the plan that measures them."""
    folder = tmp_path_factory.mktemp("retention")
    base, bf16 = tiny_base.folder(folder / "base", max_position_embeddings=1024), {"dtype": "bf16"}
    values = tiny_domains.plan(base, folder, train={"snapshot_steps": 3}, model=bf16)
    prose, code = values["data"]["domains"]
    values["data"]["domains"] = [prose]
    for method in ("lora", "full"):
        adapt({**values, "methods": [method]}, folder / method)
    values["data"]["watched"] = [code]
    return folder, build_plan(values)


def test_every_snapshot_is_measured_as_an_adapter_of_its_own(place, tmp_path):
    folder, plan = place
    found = survey_retention(plan, [folder / "lora", folder / "full"], cache=tmp_path / "measured")
    assert (found.target, found.texts) == (("prose",), ("code",))
    assert [trajectory.label for trajectory in found.trajectories] == ["lora", "full"]
    paths = [path for name in ("lora", "full") for path in snapshots_of(folder / name).values()]
    expected = {(each.domain, each.label): each for each in compare_adapters(plan, paths)}
    for trajectory in found.trajectories:
        assert [snapshot.step for snapshot in trajectory.snapshots] == [0, 3, 6, 8]
        assert found.change(trajectory, trajectory.snapshots[0], ["prose"]).value == 0.0
        for snapshot in trajectory.snapshots[1:]:
            path = str(snapshots_of(folder / trajectory.label)[snapshot.step])
            for domain in ("prose", "code"):
                change, alone = found.change(trajectory, snapshot, [domain]), expected[domain, path]
                assert snapshot.losses[domain].perplexity == alone.perplexity
                assert (change.value, change.low, change.high) == (alone.change, alone.low, alone.high)
            both = found.change(trajectory, snapshot, ["prose", "code"])
            means = [found.change(trajectory, snapshot, [domain]).value for domain in ("prose", "code")]
            assert both.value == pytest.approx(np.mean(means))
        changes = [found.change(trajectory, snapshot, ["prose"]).value for snapshot in trajectory.snapshots]
        assert found.best(trajectory).step == [0, 3, 6, 8][int(np.argmin(changes))]
    again = survey_retention(plan, [folder / "lora"], every=2, cache=tmp_path / "measured", progress=Nothing())
    assert [snapshot.step for snapshot in again.trajectories[0].snapshots] == [0, 6, 8]
    assert again.trajectories[0].snapshots[-1] == found.trajectories[0].snapshots[-1]
    write_result("retention", result(found, Subject(), RetentionOptions()), tmp_path / "out")
    names = {f"retention.{kind}" for kind in ("csv", "md", "json", "png", "svg")}
    assert {file.name for file in (tmp_path / "out").iterdir()} == names
    saved = json.loads((tmp_path / "out" / "retention.json").read_text())
    last = expected["code", str(snapshots_of(folder / "full")[8])]
    assert saved["courses"][1]["moments"][3]["domains"]["code"]["change"]["value"] == last.change
    rows = table(found)
    assert len(rows) == 2 * 4 * 2 and set(rows["kind"]) == {"target", "text"}
    assert "| lora | last | 8 |" in markdown(found)


def test_adapters_without_snapshots_odd_counts_and_unknown_benchmarks_are_refused_before_a_measurement(place):
    (folder, plan), survey = place, partial(survey_retention, progress=Nothing())
    refused(AdapterError, "no snapshots of it were kept", survey, plan, [folder / "base"])
    refused(ConfigError, "every is 0", survey, plan, [folder / "lora"], every=0)
    refused(ConfigError, "each once", survey, plan, [folder / "lora", folder / "lora"])
    pytest.importorskip("lm_eval")
    refused(ConfigError, "arc_esay", survey, plan, [folder / "lora"], benchmarks={"tasks": ["arc_esay"]})


def score(task, items, metric="acc"):
    facts = TaskFacts("made up", "test", 0, "1")
    return BenchmarkScore(task, metric, float(np.mean(items)), 0.01, tuple(items), len(items), "mean", True, facts)


def test_benchmarks_are_averaged_over_tasks_and_paired_over_rows():
    generator = np.random.default_rng(0)
    tasks = {"gsm8k": 40, "arc_easy": 60, "boolq": 200}
    base = [score(task, generator.integers(0, 2, rows).astype(float)) for task, rows in tasks.items()]
    model = [score(each.task, np.abs(np.array(each.items) - (generator.random(each.rows) < 0.1))) for each in base]
    config = BenchmarkConfig(tasks=tuple(tasks))
    found = scores_of(base, model, list(tasks), ["gsm8k"], config)
    by_task = {one.task: 100 * (np.mean(two.items) - np.mean(one.items)) for one, two in zip(base, model, strict=True)}
    assert found.target == pytest.approx(100 * model[0].value)
    assert found.target_change.value == pytest.approx(by_task["gsm8k"])
    assert found.retention == pytest.approx(np.mean([100 * model[1].value, 100 * model[2].value]))
    change = found.retention_change
    assert change.value == pytest.approx(np.mean([by_task["arc_easy"], by_task["boolq"]]))
    pairs = list(zip(base, model, strict=True))[1:]
    error = np.sqrt(sum(np.var(100 * np.subtract(two.items, one.items)) / one.rows for one, two in pairs)) / 2
    assert (change.high - change.low) / 2 == pytest.approx(1.96 * error, rel=0.1)
    same = scores_of(base, base, list(tasks), [], config)
    assert same.target is None and same.retention_change.value == same.retention_change.high == 0.0


def test_the_papers_metric_counts():
    both = [score("hellaswag", [1.0, 0.0], "acc"), score("hellaswag", [1.0, 1.0], "acc_norm")]
    assert counting_score(both, "hellaswag").metric == "acc_norm"
    assert counting_score([score("boolq", [1.0], "acc,none")], "boolq").metric == "acc,none"
    other = [score("wikitext", [40.0], "word_perplexity")]
    refused(ConfigError, "no metric that is a share of rows", counting_score, other, "wikitext")


def test_snapshots_are_measured_on_benchmarks_of_target_and_retention(place, tmp_path):
    pytest.importorskip("lm_eval")
    folder, plan = place
    words = [chr(97 + n) * 4 for n in range(26)]
    choices = [{"text": [word, "b" * (n + 1)], "label": ["A", "B"]} for n, word in enumerate(words)]
    write_rows(tmp_path / "arc_easy.jsonl", [
        {"question": f"Which is {word}?", "choices": choices[n], "answerKey": "AB"[n % 2]}
        for n, word in enumerate(words)
    ])  # fmt: skip
    write_rows(tmp_path / "boolq.jsonl", [
        {"passage": f"All of {word}.", "question": f"is it {word}", "label": n % 2} for n, word in enumerate(words)
    ])  # fmt: skip
    asked = {"tasks": ["arc_easy", "boolq"], "source": "local", "data": [str(tmp_path)], "bootstrap_samples": 100}
    options = {"every": 4, "benchmark_cache": tmp_path / "cache"}
    found = survey_retention(plan, [folder / "lora"], benchmarks=asked, target_tasks=["boolq"], **options)
    (trajectory,) = found.trajectories
    start, end = trajectory.snapshots
    assert (start.step, end.step) == (0, 8)
    report = run_benchmarks(load_base(plan.model), {"it": snapshots_of(folder / "lora")[8]}, read_config(asked))
    assert end.scores.target == pytest.approx(100 * report.score("boolq", "acc", "it").value)
    assert end.scores.retention == pytest.approx(100 * report.score("arc_easy", "acc_norm", "it").value)
    assert start.scores == found.base.scores
    assert start.scores.target == pytest.approx(100 * report.score("boolq", "acc").value)
    assert start.scores.target_change.value == start.scores.retention_change.value == 0.0
    differences = {(each.task, each.metric): each.difference for each in report.comparisons}
    assert end.scores.target_change.value == pytest.approx(differences["boolq", "acc"].value)
    write_result("retention", result(found, Subject(), RetentionOptions()), tmp_path / "out")
    assert set(table(found)["kind"]) == {"target", "text", "benchmark", "mean of benchmarks"}
    names = [[side.name.partition(":")[0] for side in pair] for pair in sides(found)]
    assert names == [["target", "other texts"], ["target task", "benchmarks"]]
    assert [[side.read(trajectory, end) for side in pair] for pair in sides(found)] == [
        [found.change(trajectory, end, ["prose"]), found.change(trajectory, end, ["code"])],
        [end.scores.target_change, end.scores.retention_change],
    ]
    without = replace(found, texts=(), base=replace(found.base, scores=replace(found.base.scores, retention=None)))
    assert [side.name.partition(":")[0] for pair in sides(without) for side in pair] == ["target task", "target"]
    alone = replace(found, texts=(), base=replace(found.base, scores=None))
    assert [len(figure(each).axes) for each in (found, without, alone)] == [6, 3, 1]
    wrong = (survey_retention, plan, [folder / "lora"])
    refused(ConfigError, "target gsm8k is none of the benchmarks", *wrong, benchmarks=asked, target_tasks=["gsm8k"])
