"""Every experiment runs at scale smoke, gives the numbers that its claims name, and is continued when run again."""

import contextlib
import functools
import json
import math
import re

import pandas as pd
import pytest
import yaml
from scipy.stats import binomtest

from gaintune.config import ModelConfig
from gaintune.errors import ConfigError, RunDirectoryError
from gaintune.evaluate.benchmarks import BenchmarkConfig, counting_score
from gaintune.evaluate.benchmarks.run import measure_benchmarks
from gaintune.models import load_base
from gaintune.recipes import Recipe, recipe_named, recipes, run_recipe, shown
from gaintune.recipes import smoke as tiny
from gaintune.recipes.scales import LISTS, names_in, stem_of
from gaintune.recipes.schema import Expectation, read_recipe
from support import drawing, refused
from support.cli import run

AGAIN = ("G3", "G9", "G13", "G16", "G17", "D2", "D5")
"""One of each kind that measures or keeps what others do not: benchmarks, answers, sweep, landscape and so on."""
RENDERED = ("G9", "G13", "D2")  # of a sequence, and the two kinds of figures that recipes alone draw
LONG = ("D3", "G2")  # sequences and benchmarks, as in ten others
ALL_MODELS = ("G8",)  # of the recipes with several models this one runs them all here, the others the first
CHANCE = (("curve.", "matched."), (".left", ".outside"))
"""How numbers begin or end that a tiny random model may lack: its training is too weak to compare, or its weights fill
every direction."""


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Run an experiment at scale smoke, once for all tests, and return its folder and its result."""

    @functools.cache
    def run(name):
        folder = tmp_path_factory.mktemp(name) / "run"
        with contextlib.nullcontext() if name in RENDERED else drawing.unrendered():
            return folder, run_recipe(name, folder, scale="smoke", models=models_of(name), allow_code_execution=True)

    return run


def models_of(name):
    """Return the first model of a recipe with several, unless all of them run here."""
    found = recipe_named(name)
    return [found.model] if found.models and name not in ALL_MODELS else []


@pytest.mark.parametrize("name", [pytest.param(each, marks=[pytest.mark.slow] * (each in LONG)) for each in recipes()])
def test_an_experiment_runs_and_decides_its_claims(name, ran):
    folder, result = ran(name)
    recipe = result.recipe
    assert recipe == recipe_named(name).at("smoke", models_of(name))
    assert [finding.claim for finding in result.findings] == list(recipe.claims) != []
    assert all(not outcome.left_out for outcome in result.outcomes.values())
    table = pd.read_csv(folder / "results.csv")
    assert table.value.notna().all()
    assert set(table.step) == {step.name for step in recipe.steps if result.outcomes[step.name].numbers}
    text = (folder / "results.md").read_text(encoding="utf-8")
    assert all(finding.claim.says in text and finding.verdict in text for finding in result.findings)
    assert all(difference in text for difference in recipe.differs)
    assert list((folder / "figures").glob("*.png"))
    for step in recipe.steps:
        outcome = result.outcomes[step.name]
        notes = " ".join(outcome.notes)
        for key in LISTS:
            whole, here = (names_in(recipe.settings(step, scale), key) for scale in ("paper", "smoke"))
            silent = [each for each in whole if each not in here and stem_of(each) not in map(stem_of, here)]
            lacking = [each for each in silent if not re.search(rf" {re.escape(stem_of(each))}(?![\w.-])", notes)]
            assert not lacking, (step.name, key, notes)
        strange = [each for each in outcome.without if not each.startswith(CHANCE[0]) and not each.endswith(CHANCE[1])]
        assert not strange, outcome.without


@pytest.mark.usefixtures("unrendered")
@pytest.mark.parametrize("name", AGAIN)
def test_a_recipe_run_again_is_continued_and_gives_the_same(name, ran):
    folder, result = ran(name)
    made = {file: file.stat().st_mtime_ns for file in folder.rglob("*.safetensors")}
    names = ("results.json", "results.csv", "results.md")
    written = [(folder / name).read_bytes() for name in names]
    again = run_recipe(name, folder, scale="smoke", models=models_of(name), allow_code_execution=True)
    assert again.findings == result.findings
    assert [(folder / name).read_bytes() for name in names] == written
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*.safetensors")} == made


def test_a_folder_of_another_scale_or_of_something_else_is_refused(tmp_path, ran):
    refused(RunDirectoryError, "scale", run_recipe, "D1", ran("D1")[0], scale="small")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    refused(RunDirectoryError, "no recipe began it", run_recipe, "D1", tmp_path / "mine", scale="smoke")


def test_a_recipes_numbers_are_those_of_its_run(ran):
    folder, result = ran("G13")
    matrix = json.loads((folder / "run" / "matrix.json").read_text())
    numbers = result.outcomes["run"].numbers
    for method in matrix["methods"]:
        label, last = method["label"], method["stages"][-1]["cells"]["pubmedqa"]["change"]
        assert numbers[f"{label}.backward_transfer"].value == method["summary"]["backward_transfer"]["value"]
        assert numbers[f"{label}.pubmedqa"].value == last


def test_every_model_has_its_steps_its_verdicts_and_a_row_of_the_table(ran):
    folder, result = ran("G8")
    text, found = (folder / "results.md").read_text(), recipe_named("G8")
    assert [finding.verdict for finding in result.findings if finding.number is None] == []
    bases = set()
    for model, step in ((found.model, "run"), *((one.model, f"run@{one.label}") for one in found.models)):
        numbers = result.outcomes[step].numbers
        row = next(line for line in text.splitlines() if line.startswith(f"| {model} |"))
        cells = [numbers[number.partition(".")[2]] for number in found.table.values()]
        assert row == f"| {model} | {' | '.join(map(shown, cells))} |"
        bases.add(json.loads((folder / step / "inputs.json").read_text())["base_fingerprint"])
    assert len(bases) == 1 + len(found.models), "each model is a base of its own"


def test_the_papers_scores_of_the_base_have_their_numbers_and_intervals(ran):
    _, result = ran("G9")
    scores = [claim for claim in recipe_named("G9").claims if ".base." in claim.number]
    assert len(scores) == 8 and {claim.scale for claim in scores} == {"paper"}
    for claim in scores:
        number = result.number(claim.number)
        assert number.low is not None and number.low <= number.value <= number.high, claim.number
    measured = result.number("medical-benchmarks.base.arc_easy.score")
    right = round(measured.value / 100 * tiny.ROWS)
    wilson = binomtest(right, tiny.ROWS).proportion_ci(0.95, method="wilson")
    assert (measured.low, measured.high) == pytest.approx((100 * wilson.low, 100 * wilson.high))


def test_an_unknown_experiment_and_a_claim_that_no_number_meets_are_refused():
    refused(ConfigError, "no recipe 'G99'; there are G", recipe_named, "G99")
    refused(ValueError, "no number is above 3 and below 1", Expectation, above=3, below=1)


SMALLEST = {
    "id": "G2", "title": "t", "source": "s", "asks": "a", "model": "m",
    "steps": [{"name": "run", "do": "sequence", "settings": {"domains": ["pubmedqa"], "methods": ["gain"]}}],
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), [
    ({"steps": [{"name": "run", "do": "dance"}]}, "unknown kind 'dance'"),
    ({"steps": [{"name": "run", "do": "sequence", "settings": {"domian": []}}]}, "unknown key 'domian'"),
    (
        {"steps": [{"name": "run", "do": "sequence", "settings": {"domains": ["nowhere"]}}]},
        "'nowhere' is no name of the catalogue",
    ),
    ({"claims": [{"says": "x", "number": "run.lora.in_domain", "expect": {"below": 0}}]}, "no number 'lora.in_domain'"),
    ({"steps": [{"name": "look", "do": "gates", "settings": {"of": "run"}}]}, "`of` names the step"),
])  # fmt: skip
def test_a_wrong_recipe_is_refused_in_words(change, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        run_recipe(Recipe.model_validate({**SMALLEST, **change}), tmp_path / "run", scale="smoke")


@pytest.mark.parametrize(("text", "message"), [
    ("id: G2\ntitel: x\n", "unknown key 'titel'; did you mean 'title'"),
    ("id: [\n", "recipe.yaml:2"),
    ("id: G2\ntitle: a\nid: G3\n", "recipe.yaml:3: .*'id' stands there twice, first on line 1"),
])  # fmt: skip
def test_a_mistake_in_a_recipe_file_is_named_by_file_and_line(text, message, tmp_path):
    (tmp_path / "recipe.yaml").write_text(text)
    refused(ConfigError, message, read_recipe, tmp_path / "recipe.yaml")


TINY = {"dimension": 4, "rank": 1, "steps": 5, "seeds": 2, "batch_size": 16}
MINE = {
    "id": "MINE", "title": "A model of two lines", "source": "my notebook", "asks": "Does it run?", "model": "none",
    "steps": [{"name": "model", "do": "linear-model", "settings": TINY}],
    "claims": [{"says": "it ends", "number": "model.LoRA.to_fixed", "expect": {"above": 0}}],
}  # fmt: skip


def test_the_list_has_every_experiment_of_both_papers():
    said = run("recipe", "list")
    papers = (*(f"G{number}" for number in range(1, 20)), "D1", "D2", "D3", "D4", "D5")
    assert set(papers) <= set(recipes()) and all(name in said for name in papers)


def test_an_experiment_is_shown_with_its_steps_scales_and_claims():
    said, found = run("recipe", "show", "g14"), recipe_named("G14")
    assert f"step {found.steps[0].name} (sweep)" in said and "at scale small" in said
    assert all(difference in said for difference in found.differs) and "--models mistral-7b" in said
    assert "at scale paper alone" in run("recipe", "show", "G9")
    assert all(claim.number in said for claim in found.claims)


@pytest.mark.parametrize("name", list(recipes()))
def test_an_experiment_is_shown_in_lines_of_a_terminals_width_and_nothing_is_lost(name):
    said, wide = (run("recipe", "show", name, columns=columns) for columns in (80, 10_000))
    assert max(map(len, said.splitlines())) <= 80 and said.split() == wide.split()


def test_methods_are_shown_one_a_line():
    shown = [line.strip() for line in run("recipe", "show", "D3").splitlines()]
    assert "name=lora rank=4 targets=all-linear lr=0.0001 label=lora-r4-lr0.0001" in shown
    assert "disel-r64-lr0.0002, lora-r64-lr0.0002" in shown  # one pair of `paired`


def test_a_recipe_file_of_a_user_runs_and_prints_its_verdicts(tmp_path):
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(MINE))
    said = run("recipe", "run", tmp_path / "mine.yaml", "--scale", "smoke", "--run", tmp_path / "out")
    assert "it ends" in said and "reproduced" in said and f"results {tmp_path / 'out' / 'results.md'}" in said
    assert (tmp_path / "out" / "results.csv").is_file()


@pytest.mark.parametrize(("arguments", "message"), [
    (("--scale", "tiny"), "--scale tiny: use smoke, small, paper"),
    (("--scale", "smoke", "--set", "train.seed=1"), "no step of it has a plan"),
    (("--data", "/nowhere/at/all"), "no such folder"),
])  # fmt: skip
def test_a_wrong_run_is_refused_in_words(arguments, message, tmp_path):
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(MINE))
    out = ("--run", tmp_path / "out")
    refused(ConfigError, message, run, "recipe", "run", tmp_path / "mine.yaml", *out, *arguments)
    assert not (tmp_path / "out").exists()


RETENTION = "hellaswag,winogrande,arc_challenge,arc_easy,lambada_openai,boolq,piqa,triviaqa,openbookqa,sciq,mmlu"
RETENTION += ",medqa_4options,commonsense_qa,nq_open"


def test_the_rows_of_every_benchmark_are_measured_on_a_tiny_base(tmp_path):
    pytest.importorskip("lm_eval")
    base = load_base(ModelConfig(name=str(tiny.base(tmp_path / "base")), device="cpu", dtype="fp32"))
    rows = {"source": "local", "data": (str(tiny.texts(tmp_path / "rows") / "benchmarks"),), "limit": tiny.ROWS}
    code = {"generated_tokens": 16, "allow_code_execution": True, "code_seconds": 20.0}
    config = BenchmarkConfig.model_validate({"tasks": f"{RETENTION},gsm8k:8,humaneval", **rows, **code})
    scores = measure_benchmarks(base.model, base.tokenizer, config)
    names = [task.name for task in config.tasks]
    assert {score.task for score in scores} == set(names) == set(tiny.benchmark_rows())
    counted = [counting_score(scores, name) for name in names]
    assert all(score.rows == tiny.ROWS and math.isfinite(score.value) for score in counted)
    assert len({score.value for score in counted}) > 2
