"""Every experiment runs at scale smoke, gives the numbers that its claims name, and is continued when run again."""

import json
import re

import pandas as pd
import pytest

from gaintune.errors import ConfigError, RunDirectoryError
from gaintune.recipes import Recipe, recipe_named, recipes, run_recipe
from gaintune.recipes.scales import LISTS, names_in, stem_of
from gaintune.recipes.schema import Expectation, read_recipe

AGAIN = ("G3", "G9", "G16", "G17", "D2", "D5")
"""One of each kind that measures or keeps what others do not: benchmarks, answers, sweep, landscape and so on."""
CHANCE = (("curve.", "matched."), (".left", ".outside"))
"""How numbers begin or end that a tiny random model may not have: nothing was learnt that could be compared, or its
weights fill every direction."""


@pytest.mark.parametrize("name", list(recipes()))
def test_an_experiment_runs_and_decides_its_claims(name, tmp_path):
    recipe = recipe_named(name)
    result = run_recipe(recipe, tmp_path / "run", scale="smoke", allow_code_execution=True)
    assert [finding.claim for finding in result.findings] == list(recipe.claims)
    assert recipe.claims
    assert all(not outcome.left_out for outcome in result.outcomes.values())
    table = pd.read_csv(tmp_path / "run" / "results.csv")
    assert table.value.notna().all()
    assert set(table.step) == {step.name for step in recipe.steps if result.outcomes[step.name].numbers}
    text = (tmp_path / "run" / "results.md").read_text(encoding="utf-8")
    assert all(finding.claim.says in text and finding.verdict in text for finding in result.findings)
    assert list((tmp_path / "run" / "figures").glob("*.png"))
    for step in recipe.steps:
        outcome = result.outcomes[step.name]
        told = " ".join(outcome.notes)
        for key in LISTS:
            whole, here = (names_in(recipe.settings(step, scale), key) for scale in ("paper", "smoke"))
            silent = [each for each in whole if each not in here and stem_of(each) not in map(stem_of, here)]
            lacking = [each for each in silent if not re.search(rf" {re.escape(stem_of(each))}(?![\w.-])", told)]
            assert not lacking, (step.name, key, told)
        strange = [each for each in outcome.without if not each.startswith(CHANCE[0]) and not each.endswith(CHANCE[1])]
        assert not strange, outcome.without
    if name in AGAIN:
        made = {file: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob("*.safetensors")}
        written = (tmp_path / "run" / "results.json").read_bytes()
        again = run_recipe(recipe, tmp_path / "run", scale="smoke", allow_code_execution=True)
        assert again.findings == result.findings
        assert (tmp_path / "run" / "results.json").read_bytes() == written
        assert {file: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob("*.safetensors")} == made


def test_a_recipe_run_again_is_continued_and_gives_the_same(tmp_path):
    first = run_recipe("G13", tmp_path / "run", scale="smoke")
    adapter = first.outcomes["run"].adapters["ia3/pubmedqa"]
    made = {file: file.stat().st_mtime_ns for file in adapter.iterdir()}
    written = (tmp_path / "run" / "results.json").read_bytes()
    again = run_recipe("G13", tmp_path / "run", scale="smoke")
    assert again.findings == first.findings
    assert {file: file.stat().st_mtime_ns for file in adapter.iterdir()} == made
    assert (tmp_path / "run" / "results.json").read_bytes() == written


def test_a_folder_of_another_scale_or_of_something_else_is_refused(tmp_path):
    run_recipe("D1", tmp_path / "run", scale="smoke")
    with pytest.raises(RunDirectoryError, match="scale"):
        run_recipe("D1", tmp_path / "run", scale="small")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(RunDirectoryError, match="no recipe began it"):
        run_recipe("D1", tmp_path / "mine", scale="smoke")


def test_numbers_are_those_of_the_run_itself(tmp_path):
    result = run_recipe("G13", tmp_path / "run", scale="smoke")
    matrix = json.loads((tmp_path / "run" / "run" / "matrix.json").read_text())
    numbers = result.outcomes["run"].numbers
    for method in matrix["methods"]:
        label, last = method["label"], method["stages"][-1]["cells"]["pubmedqa"]["change"]
        assert numbers[f"{label}.backward_transfer"].value == method["summary"]["backward_transfer"]["value"]
        assert numbers[f"{label}.pubmedqa"].value == last


def test_an_unknown_experiment_names_those_there_are():
    with pytest.raises(ConfigError, match="no recipe 'G99'; there are G"):
        recipe_named("G99")


SMALLEST = {
    "id": "G2",
    "title": "t",
    "source": "s",
    "asks": "a",
    "model": "m",
    "steps": [{"name": "run", "do": "sequence", "settings": {"domains": ["pubmedqa"], "methods": ["gain"]}}],
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": [{"name": "run", "do": "dance"}]}, "unknown kind 'dance'"),
        ({"steps": [{"name": "run", "do": "sequence", "settings": {"domian": []}}]}, "unknown key 'domian'"),
        (
            {"steps": [{"name": "run", "do": "sequence", "settings": {"domains": ["nowhere"]}}]},
            "'nowhere' is no name of the catalogue",
        ),
        (
            {"claims": [{"says": "x", "number": "run.lora.in_domain", "expect": {"below": 0}}]},
            "no number 'lora.in_domain'",
        ),
        ({"steps": [{"name": "look", "do": "gates", "settings": {"of": "run"}}]}, "`of` names the step"),
    ],
)
def test_a_wrong_recipe_is_refused_in_words(change, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        run_recipe(Recipe.model_validate({**SMALLEST, **change}), tmp_path / "run", scale="smoke")


def test_a_claim_that_no_number_meets_is_refused():
    with pytest.raises(ValueError, match="no number is above 3 and below 1"):
        Expectation(above=3, below=1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id: G2\ntitel: x\n", "unknown key 'titel'; did you mean 'title'"),
        ("id: [\n", "recipe.yaml:2"),
        ("id: G2\ntitle: a\nid: G3\n", "recipe.yaml:3: .*'id' stands there twice, first on line 1"),
    ],
)
def test_a_recipe_file_with_a_mistake_says_where(text, message, tmp_path):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_recipe(tmp_path / "recipe.yaml")
