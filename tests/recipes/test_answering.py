"""Answers in a recipe: learnt rows apart from asked ones, and the numbers that `evaluate --choices` gives."""

import json

import pytest

from gaintune.data import read_choices
from gaintune.errors import ConfigError, RunDirectoryError
from gaintune.evaluate import compare_choices
from gaintune.progress import Silent
from gaintune.recipes import Recipe, run_recipe
from gaintune.recipes.outcome import Context
from gaintune.recipes.scales import ScaleSetup
from gaintune.recipes.steps.answers import answers, local_questions
from support import STUDY_DATA

DATA = STUDY_DATA
SETTINGS = {
    "learn": "finphrase",
    "ask": ["finphrase", "sst2"],
    "methods": [{"name": "gain", "lr": 0.05}, {"name": "lora", "rank": 4, "targets": "all-linear", "lr": 0.02}],
    "data": {"block_size": 128, "train_tokens": 1024, "validation_tokens": 256},
    "train": {"epochs": 6},
}


def recipe(**changes) -> Recipe:
    step = {"name": "ask", "do": "answers", "settings": {**SETTINGS, **changes}}
    return Recipe.model_validate(
        {"id": "G9", "title": "t", "source": "s", "asks": "a", "model": "m", "steps": [step], "claims": []}
    )


def test_answers_are_learnt_and_asked_on_other_rows(tmp_path):
    outcome = run_recipe(recipe(), tmp_path / "run", scale="smoke").outcomes["ask"]
    rows = tmp_path / "run" / "ask" / "questions"
    learnt = [json.loads(line) for line in (rows / "finphrase-learnt" / "train.jsonl").read_text().splitlines()]
    asked = read_choices("finphrase", rows / "finphrase.jsonl")
    assert len(learnt) == 32
    assert len(asked) == 12
    assert not {row["prompt"] for row in learnt} & {row.prompt for row in asked}
    assert set(outcome.adapters) == {"gain/finphrase", "lora/finphrase"}
    numbers = outcome.numbers
    assert numbers["lora.in_domain"].value < -5, "the answers were learnt"
    sets = {name: rows / f"{name}.jsonl" for name in ("finphrase", "sst2")}
    figures = compare_choices(outcome.plan, list(outcome.adapters.values()), sets=sets)
    for label, one in zip(["base", "gain", "lora"] * 2, figures, strict=True):
        assert numbers[f"{label}.{one.domain}.accuracy"].value == 100 * one.accuracy.value
        if one.change is not None:
            assert numbers[f"{label}.{one.domain}"].low == 100 * one.change.low
    difference = numbers["lora-minus-gain.sst2"]
    assert difference.value == pytest.approx(
        numbers["lora.sst2.accuracy"].value - numbers["gain.sst2.accuracy"].value, abs=1e-9
    )
    assert numbers["gain-minus-lora.sst2"].value == -difference.value
    times = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}
    assert run_recipe(recipe(), tmp_path / "run", scale="smoke").outcomes["ask"].numbers == numbers
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")} == times
    place = tmp_path / "run" / "world" / "data" / "questions" / "sst2" / "validation.jsonl"
    place.write_text(place.read_text().replace('"label": 1', '"label": 0'))
    kept = {file: file.read_bytes() for file in rows.rglob("*.jsonl")}
    with pytest.raises(RunDirectoryError, match=r"questions\.json says otherwise: .*sst2"):
        run_recipe(recipe(), tmp_path / "run", scale="smoke")
    assert {file: file.read_bytes() for file in rows.rglob("*.jsonl")} == kept, "what was asked is still there"


def test_a_wrong_set_is_refused_in_words(tmp_path):
    with pytest.raises(ConfigError, match=r"`learn` names a set of questions.*: pubmedqa, finphrase, sst2, medqa"):
        run_recipe(recipe(learn="riddles"), tmp_path / "run", scale="smoke")


def test_without_rows_the_step_is_left_out_and_says_which(tmp_path):
    context = Context("ask", tmp_path, ScaleSetup("small", "demo", None, {}), {}, Silent())
    outcome = answers(dict(SETTINGS), context).expected
    assert outcome.left_out
    assert outcome.notes[0].endswith("(give --data FOLDER): finphrase, sst2")


@pytest.mark.study_data
@pytest.mark.skipif(not DATA.is_dir(), reason=f"the study datasets are not in {DATA}")
def test_the_study_folder_holds_all_sets_but_pubmedqas_answers():
    setup = ScaleSetup("small", "demo", DATA, {})
    assert local_questions(setup, "finphrase") == DATA / "domains" / "finphrase"
    assert local_questions(setup, "sst2") == DATA / "domains" / "sst2"
    assert local_questions(setup, "medqa") == DATA / "benchmarks" / "medqa"
    assert local_questions(setup, "pubmedqa") is None
