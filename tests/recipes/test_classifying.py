"""Classifiers in a recipe: every cell trained once with its own options, what is kept, and means, spreads and pairs."""

import json
import math
from statistics import mean, stdev

import pytest

from gaintune.adapters import read_record
from gaintune.errors import ConfigError, RunDirectoryError
from gaintune.progress import Silent
from gaintune.recipes import Recipe, recipe_named, run_recipe
from gaintune.recipes import smoke as tiny
from gaintune.recipes.outcome import Context
from gaintune.recipes.scales import ScaleSetup
from gaintune.recipes.steps import classify as report
from gaintune.recipes.steps.classify import DECODER, ClassificationStudy, ClassifierScores
from support import STUDY_DATA

DATA = STUDY_DATA
SETTINGS = {
    "tasks": ["sst2", {"name": "cola", "methods": {"disel": {"gate_bias": -1.0}}, "train": {"epochs": 2}}],
    "texts": ["wikitext"],
    "methods": [{"name": "disel", "lr": 0.01, "gate_bias": -7.0}],
    "ranks": [2, 4],
    "train": {"batch_size": 16, "lr": 0.01},
    "text": {"train_tokens": 64, "validation_tokens": 96, "block_size": 32},
}


def recipe(**changes) -> Recipe:
    step = {"name": "glue", "do": "classify", "settings": {**SETTINGS, **changes}}
    return Recipe.model_validate(
        {"id": "D2", "title": "t", "source": "s", "asks": "a", "model": "m", "steps": [step], "claims": []}
    )


def test_every_cell_is_trained_once_with_the_options_of_its_task(tmp_path):
    first = run_recipe(recipe(), tmp_path / "run", scale="smoke").outcomes["glue"]
    folder = tmp_path / "run" / "glue" / "classifiers"
    made = {
        (task, rank): read_record(folder / task / f"disel-r{rank}" / "seed-0" / "adapter")
        for task in ("sst2", "cola")
        for rank in (2, 4)
    }
    assert {key: record.settings["method"]["gate_bias"] for key, record in made.items()} == {
        ("sst2", 2): -7.0, ("sst2", 4): -7.0, ("cola", 2): -1.0, ("cola", 4): -1.0
    }  # fmt: skip
    assert {key: record.settings["method"]["rank"] for key, record in made.items()} == {key: key[1] for key in made}
    assert {key: record.settings["train"]["epochs"] for key, record in made.items()} == {
        key: 2 if key[0] == "cola" else 1 for key in made
    }
    times = {file: file.stat().st_mtime_ns for file in folder.rglob("*.safetensors")}
    (folder / "cola" / "disel-r2" / "seed-0" / "scores.json").unlink()  # as if stopped after the training
    kept = json.loads((folder / "cola" / "kept.json").read_text())
    del kept["disel-r2/seed-0"]
    (folder / "cola" / "kept.json").write_text(json.dumps(kept))
    again = run_recipe(recipe(), tmp_path / "run", scale="smoke").outcomes["glue"]
    assert again.numbers == first.numbers
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*.safetensors")} == times
    accuracies = [first.numbers[f"disel-r2.{task}.accuracy"].value for task in ("sst2", "cola")]
    assert first.numbers["disel-r2.accuracy"].value == pytest.approx(mean(accuracies))
    assert first.numbers["disel.retention"].low is None, "one seed has no interval"
    changes = [kept["disel-r4/seed-0"]["change"], kept["base"]["change"]]
    assert changes[0] != 0.0 == changes[1]
    rows = tmp_path / "run" / "world" / "data" / "glue" / "cola" / "validation.jsonl"
    rows.write_text(rows.read_text().replace('"label": 1', '"label": 0'))
    with pytest.raises(RunDirectoryError, match=r"rows\.json says otherwise: .*cola"):
        run_recipe(recipe(), tmp_path / "run", scale="smoke")


def test_a_decoder_is_measured_under_its_own_head_and_says_so(tmp_path):
    base = tiny.base(tmp_path / "decoder")
    changes = {"tasks": ["mrpc"], "ranks": [2]}
    outcome = run_recipe(
        recipe(methods=[{"name": "lora", "lr": 0.01}], **changes),
        tmp_path / "run",
        scale="smoke",
        overrides={"model": {"name": str(base)}},
    ).outcomes["glue"]
    assert DECODER in outcome.notes
    assert outcome.numbers["lora.retention"].value != 0
    assert outcome.numbers["lora.perplexity"].value != outcome.numbers["base.perplexity"].value


def measured() -> list[ClassifierScores]:
    """Two methods, one with two ranks; two tasks, three seeds."""
    rows = []
    for seed in range(3):
        for task, level in (("cola", 80.0), ("mrpc", 90.0)):
            for rank in (4, 8):
                rows.append(ClassifierScores(task, "lora", rank, seed, level + rank + seed, 10.0 + rank, 20.0 + seed))
            rows.append(ClassifierScores(task, "full", None, seed, level + 2 * seed, 30.0, 50.0 + seed))
    return rows


def test_means_are_over_tasks_and_ranks_and_intervals_over_seeds():
    found = report.numbers(measured(), 9.0, 0.95)
    assert found["base.perplexity"].value == 9.0
    assert found["lora.accuracy"].value == pytest.approx(mean([91.0, 92.0, 93.0]))
    assert found["lora-r8.cola.accuracy"].value == pytest.approx(89.0)
    assert found["full.accuracy"].value == pytest.approx(87.0)
    reach = 4.302652729696142 * stdev([91.0, 92.0, 93.0]) / math.sqrt(3)  # Student's t, two degrees of freedom
    assert found["lora.accuracy"].high == pytest.approx(92.0 + reach)
    assert found["full-minus-lora.retention"].value == pytest.approx(30.0)
    assert found["full-minus-lora.retention"].low == pytest.approx(30.0), "the seeds' own part is paired away"
    difference = found["full-minus-lora.accuracy"]
    assert (difference.value, difference.high - difference.value) == (pytest.approx(-5.0), pytest.approx(reach))
    assert "full-r8.accuracy" not in found
    tables = report.tables(measured(), 9.0)
    assert tables["Mean over tasks; mean and standard deviation over 3 seeds"].loc["lora, rank 8"].tolist() == [
        "94.00 ± 1.00", "18.00 ± 0.00", "21.00 ± 1.00",
    ]  # fmt: skip


def test_the_figure_and_a_row_for_each_classifier_are_written(tmp_path):
    report.write(measured(), 9.0, tmp_path / "made")
    lines = (tmp_path / "made" / "classifiers.csv").read_text().splitlines()
    assert lines[0] == "task,label,rank,seed,accuracy,perplexity,change"
    assert len(lines) == 1 + len(measured())
    figure = report.figure(measured(), 9.0)
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == ["4", "8"]
    assert [line.get_label() for line in axes.get_lines() if not line.get_label().startswith("_")] == [
        "lora", "full", "pretrained",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": ["cola"]}, "unknown key 'task'"),
        ({"tasks": [{"name": "cola", "methods": {"dizel": {}}}]}, "task cola: no method is called 'dizel'"),
        ({"texts": []}, "give methods, and texts"),
        ({"classify": {"max_len": 3}}, "max_len"),
    ],
)
def test_a_wrong_step_is_refused_in_words(changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        run_recipe(recipe(**changes), tmp_path / "run", scale="smoke")


def test_a_scale_without_rows_leaves_the_step_out(tmp_path):
    setup = ScaleSetup("small", "demo", None, {})
    study = ClassificationStudy(recipe().steps[0].settings, Context("glue", tmp_path, setup, {}, Silent()))
    assert (study.tasks, study.missing) == ({}, ["sst2", "cola"])


@pytest.mark.study_data
@pytest.mark.skipif(not DATA.is_dir(), reason=f"the study datasets are not in {DATA}")
def test_the_small_scale_is_a_plan_over_the_study_rows(tmp_path):
    found = recipe_named("D2")
    context = Context("glue", tmp_path, ScaleSetup("small", "demo", DATA, {}), {}, Silent())
    runs = list(ClassificationStudy(found.settings(found.steps[0], "small"), context).runs())
    assert len(runs) == 2 * 3 * 2
    assert {run.plan.data.domains[0].source for run in runs} == {str(DATA / "glue" / n) for n in ("sst2", "cola")}
    assert {run.plan.train.seed for run in runs} == {0, 1}
