"""Recipes over several models: what is repeated on each, what a scale leaves out, and what stays as it was."""

import json

import pytest

from gaintune.errors import ConfigError, RunDirectoryError
from gaintune.recipes import Recipe, recipe_named, run_recipe
from gaintune.recipes.scales import ScaleSetup
from support import refused
from support.cli import run

pytestmark = pytest.mark.usefixtures("unrendered")

LEARNS = {"domains": ["pubmedqa"], "watched": ["wikitext"], "methods": ["gain", {"name": "lora", "lr": 0.01}]}
VALUES = {
    "id": "MINE", "title": "t", "source": "s", "asks": "a", "model": "some/small",
    "models": [
        {"model": "some/large", "label": "large",
         "settings": {"domains": ["wikitext"], "watched": ["pubmedqa"], "model": {"quantization": "4bit"}}},
        {"model": "some/huge", "label": "huge"},
    ],
    "table": {"GAIN, %": "run.gain.in_domain"},
    "steps": [
        {"name": "run", "do": "sequence", "settings": LEARNS},
        {"name": "look", "do": "tokens", "settings": {"of": "run", "domains": ["wikitext"]}},
        {"name": "factors", "do": "gains", "settings": {"of": "run"}},
        {"name": "apart", "do": "differences",
         "settings": {"differences": {"gain": ["run.gain.in_domain", "run.lora.in_domain"]}}},
    ],
    "scales": {"smoke": {"look": {"data": {"validation_tokens": 64}}}},
    "claims": [
        {"says": "it learns", "number": "run.gain.in_domain", "expect": {"below": 0}},
        {"says": "only small", "number": "run.gain.in_domain", "expect": {"below": 0}, "model": "some/small"},
        {"says": "only large", "number": "apart.gain", "expect": {"below": 0}, "model": "some/large"},
        {"says": "only paper", "number": "run.lora.in_domain", "expect": {"below": 0}, "scale": "paper"},
    ],
}  # fmt: skip


@pytest.fixture
def several() -> Recipe:
    return Recipe.model_validate(VALUES)


def test_each_further_model_has_every_step_and_claim_under_its_label(several):
    whole = several.at("paper")
    assert [step.name for step in whole.steps[:4]] == ["run", "look", "factors", "apart"]
    assert whole.steps[:4] == several.steps, "the first model's steps are as they were"
    settings = {step.name: step.settings for step in whole.steps}
    large = {"base": "some/large", "domains": ["wikitext"], "watched": ["pubmedqa"], "model": {"quantization": "4bit"}}
    assert settings["run@large"] == {**LEARNS, **large}
    assert settings["run@huge"] == {**LEARNS, "base": "some/huge"}
    look = {"of": "run@large", "domains": ["wikitext"], "base": "some/large", "model": {"quantization": "4bit"}}
    assert settings["look@large"] == look
    assert settings["factors@huge"] == {"of": "run@huge"}
    assert settings["apart@large"]["differences"] == {"gain": ["run@large.gain.in_domain", "run@large.lora.in_domain"]}
    assert whole.settings(whole.steps[5], "smoke")["data"] == {"validation_tokens": 64}
    claimed = [(claim.says, claim.number) for claim in whole.claims]
    assert claimed == [
        ("it learns", "run.gain.in_domain"),
        ("only small", "run.gain.in_domain"),
        ("only paper", "run.lora.in_domain"),
        ("it learns (large)", "run@large.gain.in_domain"),
        ("only large (large)", "apart@large.gain"),
        ("only paper (large)", "run@large.lora.in_domain"),
        ("it learns (huge)", "run@huge.gain.in_domain"),
        ("only paper (huge)", "run@huge.lora.in_domain"),
    ]
    assert "only paper" not in [claim.says for claim in several.at("smoke").claims]


def test_one_base_has_the_first_models_steps_and_says_what_is_left_out(several):
    for small in (several.at("small"), several.at("paper", one_base=True), several.at("paper", ["some/small"])):
        assert small.steps == several.steps and small.models == ()
        assert small.differs == ("left out here, models of the paper: some/large, some/huge",)
    some = several.at("paper", ["huge"])
    assert [step.name for step in some.steps] == ["run@huge", "look@huge", "factors@huge", "apart@huge"]
    assert [claim.says for claim in some.claims] == ["it learns (huge)", "only paper (huge)"]


@pytest.mark.parametrize(("scale", "models", "message"), [
    ("paper", ["tiny"], "no model 'tiny'; there are some/small, some/large, large, some/huge, huge"),
    ("small", ["large"], "models are chosen at scale paper"),
])  # fmt: skip
def test_a_wrong_choice_of_models_is_refused(several, scale, models, message):
    refused(ConfigError, message, several.at, scale, models)


@pytest.mark.parametrize(("change", "message"), [
    ({"models": [{"model": "a/b", "label": "b.7"}]}, "'b.7' is not a usable label"),
    ({"models": [{"model": "a/b", "label": "b"}, {"model": "a/c", "label": "b"}]}, "every label must be different"),
    ({"table": {"x": "ran.gain.in_domain"}}, "table: 'ran.gain.in_domain' does not begin"),
    ({"steps": [{"name": "run", "do": "sequence", "settings": {"base": "a/b"}}]}, "names a base of its own"),
    ({"claims": [{**VALUES["claims"][0], "model": "a/b"}]}, "is about 'a/b', which is none of the models"),
])  # fmt: skip
def test_models_that_cannot_be_are_refused(change, message):
    values = VALUES if "steps" not in change else {**VALUES, "claims": [], "scales": {}, "table": {}}
    refused(ValueError, message, Recipe.model_validate, {**values, **change})


def test_a_recipe_without_the_new_keys_is_recorded_as_before():
    values = {key: value for key, value in VALUES.items() if key not in ("models", "table")}
    recorded = Recipe.model_validate({**values, "claims": VALUES["claims"][:1]}).model_dump(mode="json")
    assert set(recorded) == {"id", "title", "source", "asks", "model", "steps", "scales", "claims"}
    assert set(recorded["claims"][0]) == {"says", "number", "expect", "bound"}


def test_all_models_run_from_the_command_line_or_those_that_are_named(several, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(json.dumps(VALUES))  # JSON is YAML
    command = ("recipe", "run", file, "--scale", "smoke", "--run", tmp_path / "out", "--models")
    said = run(*command, "large, some/small")
    assert "it learns (large)" in said and "(huge)" not in said
    page = (tmp_path / "out" / "results.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| some/")]
    assert [row.split(" |")[0] for row in rows] == ["| some/small", "| some/large"]
    assert "left out here, models of the paper: some/huge" in page
    results = json.loads((tmp_path / "out" / "results.json").read_text())["numbers"]
    ends = [results[f"run@large.{label}.in_domain"] for label in ("gain", "lora")]
    apart = results["apart@large.gain"]
    assert apart[0] == pytest.approx(ends[0][0] - ends[1][0])
    below = ((ends[0][0] - ends[0][1]) ** 2 + (ends[1][2] - ends[1][0]) ** 2) ** 0.5
    assert apart[1] == pytest.approx(apart[0] - below)
    refused(RunDirectoryError, "recipe.json says otherwise", run, *command, "huge")


def test_a_base_of_the_users_own_takes_the_place_of_all_models(several, tmp_path):
    base = run_recipe(several, tmp_path / "one", scale="smoke", models=["some/small"]).folder / "world" / "base"
    result = run_recipe(several, tmp_path / "two", scale="smoke", overrides={"model": {"name": str(base)}})
    assert list(result.outcomes) == ["run", "look", "factors", "apart"]
    assert [finding.claim.says for finding in result.findings] == ["it learns"], "the others are about other bases"


def test_a_steps_quantization_is_for_the_papers_models():
    settings = {"domains": ["pubmedqa"], "methods": ["gain"], "model": {"quantization": "4bit"}}
    for scale, quantization in (("paper", "4bit"), ("small", None)):
        plan = ScaleSetup(scale, "demo", None, {}).plan(settings, origin="here")
        assert plan.model.quantization == quantization
    set_ = ScaleSetup("small", "demo", None, {"model": {"quantization": "8bit"}}).plan(settings, origin="here")
    assert set_.model.quantization == "8bit"


@pytest.mark.parametrize("name", ["D3", "D4", "D5"])
def test_sixty_four_rows_make_an_update_on_a_small_device(name):
    found = recipe_named(name)
    for step in (step for step in found.steps if step.do == "sequence"):
        train = found.settings(step, "paper")["train"]
        assert train["batch_size"] * train["gradient_accumulation"] == 64 and train["gradient_checkpointing"]
        small = found.settings(step, "small")["train"]
        assert small["gradient_accumulation"] == 1 or step.name == "code"
