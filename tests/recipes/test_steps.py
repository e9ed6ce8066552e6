"""Steps of a recipe: classifiers trained once each, answers trained and measured on other rows, and sweeps."""

import json
import math
import re
from statistics import mean, stdev

import pytest
import yaml

from gaintune.adapters import read_record
from gaintune.data import load_domain, read_choices
from gaintune.errors import ConfigError
from gaintune.evaluate import compare_choices
from gaintune.models import load_tokenizer
from gaintune.progress import Silent
from gaintune.recipes import Recipe, recipe_named, run_recipe
from gaintune.recipes import smoke as tiny
from gaintune.recipes.outcome import Context, StepOutcome
from gaintune.recipes.scales import ScaleSetup
from gaintune.recipes.steps import classify as report
from gaintune.recipes.steps.answers import answers, local_questions
from gaintune.recipes.steps.classify import DECODER, ClassificationStudy, ClassifierScores
from gaintune.recipes.steps.differences import differences
from gaintune.recipes.steps.sweep import numbers_of, random_orders, runs_frame
from gaintune.results import exact
from gaintune.workflows import merge_adapter
from gaintune.workflows.sweep import compare_sweep
from support import STUDY_DATA, needs_study_data, refused, tiny_sweep
from support.files import write_rows
from support.tiny_recipes import recipe

CLASSIFYING = {
    "tasks": ["sst2", {"name": "cola", "methods": {"disel": {"gate_bias": -1.0}}, "train": {"epochs": 2}}],
    "texts": ["wikitext"], "methods": [{"name": "disel", "lr": 0.01, "gate_bias": -7.0}], "ranks": [2, 4],
    "train": {"batch_size": 16, "lr": 0.01}, "text": {"train_tokens": 64, "validation_tokens": 96, "block_size": 32},
}  # fmt: skip


def classifying(**changes) -> Recipe:
    return recipe(("glue", "classify", {**CLASSIFYING, **changes}))


@pytest.mark.usefixtures("unrendered")
def test_every_classifier_is_trained_once_with_the_options_of_its_task(tmp_path):
    first = run_recipe(classifying(), tmp_path / "run", scale="smoke").outcomes["glue"]
    folder = tmp_path / "run" / "glue" / "classifiers"
    for task, bias, epochs in (("sst2", -7.0, 1), ("cola", -1.0, 2)):
        for rank in (2, 4):
            settings = read_record(folder / task / f"disel-r{rank}" / "seed-0" / "adapter").settings
            assert (settings["method"]["gate_bias"], settings["method"]["rank"]) == (bias, rank)
            assert settings["train"]["epochs"] == epochs
    times = {file: file.stat().st_mtime_ns for file in folder.rglob("*.safetensors")}
    (folder / "cola" / "disel-r2" / "seed-0" / "scores.json").unlink()  # as if stopped after the training
    kept = json.loads((folder / "cola" / "kept.json").read_text())
    del kept["disel-r2/seed-0"]
    (folder / "cola" / "kept.json").write_text(json.dumps(kept))
    assert run_recipe(classifying(), tmp_path / "run", scale="smoke").outcomes["glue"].numbers == first.numbers
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*.safetensors")} == times
    accuracies = [first.numbers[f"disel-r2.{task}.accuracy"].value for task in ("sst2", "cola")]
    assert first.numbers["disel-r2.accuracy"].value == pytest.approx(mean(accuracies))
    assert first.numbers["disel.retention"].low is None, "one seed has no interval"
    changes = [kept["disel-r4/seed-0"]["change"], kept["base"]["change"]]
    assert changes[0] != 0.0 == changes[1]
    rows = tmp_path / "run" / "world" / "data" / "glue" / "cola" / "validation.jsonl"
    rows.write_text(rows.read_text().replace('"label": 1', '"label": 0'))
    failed = run_recipe(classifying(), tmp_path / "run", scale="smoke").failed
    assert re.search(r"rows\.json says otherwise: .*cola", failed["glue"])


@pytest.mark.usefixtures("unrendered")
def test_a_decoder_is_measured_under_its_own_head_with_a_note(tmp_path):
    lora = classifying(methods=[{"name": "lora", "lr": 0.01}], tasks=["mrpc"], ranks=[2])
    base = {"model": {"name": str(tiny.base(tmp_path / "decoder"))}}
    outcome = run_recipe(lora, tmp_path / "run", scale="smoke", overrides=base).outcomes["glue"]
    assert DECODER in outcome.notes and outcome.numbers["lora.retention"].value != 0
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
    table = report.tables(measured(), 9.0)["Mean over tasks; mean and standard deviation over 3 seeds"]
    assert table.loc["lora, rank 8"].tolist() == ["94.00 ± 1.00", "18.00 ± 0.00", "21.00 ± 1.00"]


def test_the_figure_and_a_row_for_each_classifier_are_written(tmp_path):
    report.write(measured(), 9.0, tmp_path / "made")
    lines = (tmp_path / "made" / "classifiers.csv").read_text().splitlines()
    assert lines[0] == "task,label,rank,seed,accuracy,perplexity,change" and len(lines) == 1 + len(measured())
    (axes,) = report.figure(measured(), 9.0).axes
    assert [text.get_text() for text in axes.texts] == ["4", "8"]
    labels = [line.get_label() for line in axes.get_lines() if not line.get_label().startswith("_")]
    assert labels == ["lora", "full", "pretrained"]


@pytest.mark.parametrize(("changes", "message"), [
    ({"task": ["cola"]}, "unknown key 'task'"),
    ({"tasks": [{"name": "cola", "methods": {"dizel": {}}}]}, "task cola: no method is called 'dizel'"),
    ({"texts": []}, "give methods, and texts"),
    ({"classify": {"max_len": 3}}, "max_len"),
])  # fmt: skip
def test_a_wrong_step_of_classifiers_is_refused(changes, message, tmp_path):
    refused(ConfigError, message, run_recipe, classifying(**changes), tmp_path / "run", scale="smoke")


def test_classifiers_without_rows_are_left_out(tmp_path):
    setup = ScaleSetup("small", "demo", None, {})
    study = ClassificationStudy(classifying().steps[0].settings, Context("glue", tmp_path, setup, {}, Silent()))
    assert (study.tasks, study.missing) == ({}, ["sst2", "cola"])


@needs_study_data("glue")
def test_the_small_scale_is_a_plan_over_the_study_rows(tmp_path):
    found = recipe_named("D2")
    context = Context("glue", tmp_path, ScaleSetup("small", "demo", STUDY_DATA, {}), {}, Silent())
    runs = list(ClassificationStudy(found.settings(found.steps[0], "small"), context).runs())
    assert len(runs) == 2 * 3 * 2
    assert {run.plan.data.domains[0].source for run in runs} == {str(STUDY_DATA / "glue" / n) for n in ("sst2", "cola")}
    assert {run.plan.train.seed for run in runs} == {0, 1}


ASKING = {
    "learn": "finphrase", "ask": ["finphrase", "sst2"],
    "methods": [{"name": "gain", "lr": 0.05}, {"name": "lora", "rank": 4, "targets": "all-linear", "lr": 0.02}],
    "data": {"block_size": 128, "train_tokens": 1024, "validation_tokens": 256}, "train": {"epochs": 6},
}  # fmt: skip


def answering(**changes) -> Recipe:
    return recipe(("ask", "answers", {**ASKING, **changes}))


@pytest.mark.usefixtures("unrendered")
def test_answers_are_trained_and_measured_on_other_rows(tmp_path):
    outcome = run_recipe(answering(), tmp_path / "run", scale="smoke").outcomes["ask"]
    rows = tmp_path / "run" / "ask" / "questions"
    learned = [json.loads(line) for line in (rows / "finphrase-learnt" / "train.jsonl").read_text().splitlines()]
    asked = read_choices("finphrase", rows / "finphrase.jsonl")
    assert (len(learned), len(asked)) == (32, 12)
    assert not {row["prompt"] for row in learned} & {row.prompt for row in asked}
    assert set(outcome.adapters) == {"gain/finphrase", "lora/finphrase"}
    numbers = outcome.numbers
    assert numbers["lora.in_domain"].value < -5, "the answers were trained"
    sets = {name: rows / f"{name}.jsonl" for name in ("finphrase", "sst2")}
    figures = compare_choices(outcome.plan, list(outcome.adapters.values()), sets=sets)
    for label, one in zip(["base", "gain", "lora"] * 2, figures, strict=True):
        assert numbers[f"{label}.{one.domain}.accuracy"].value == 100 * one.accuracy.value
        if one.change is not None:
            assert numbers[f"{label}.{one.domain}"].low == 100 * one.change.low
    difference = numbers["lora.sst2.accuracy"].value - numbers["gain.sst2.accuracy"].value
    assert numbers["lora-minus-gain.sst2"].value == pytest.approx(difference, abs=1e-9)
    assert numbers["gain-minus-lora.sst2"].value == -numbers["lora-minus-gain.sst2"].value
    times = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}
    assert run_recipe(answering(), tmp_path / "run", scale="smoke").outcomes["ask"].numbers == numbers
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")} == times
    place = tmp_path / "run" / "world" / "data" / "questions" / "sst2" / "validation.jsonl"
    place.write_text(place.read_text().replace('"label": 1', '"label": 0'))
    kept = {file: file.read_bytes() for file in rows.rglob("*.jsonl")}
    failed = run_recipe(answering(), tmp_path / "run", scale="smoke").failed
    assert re.search(r"questions\.json says otherwise: .*sst2", failed["ask"])
    assert {file: file.read_bytes() for file in rows.rglob("*.jsonl")} == kept, "what was asked is still there"


def test_unknown_questions_are_refused_and_answers_without_rows_left_out_with_a_note_of_the_sets(tmp_path):
    unknown = r"`learn` names a set of questions.*: pubmedqa, finphrase, sst2, medqa"
    refused(ConfigError, unknown, run_recipe, answering(learn="riddles"), tmp_path / "run", scale="smoke")
    context = Context("ask", tmp_path, ScaleSetup("small", "demo", None, {}), {}, Silent())
    outcome = answers(dict(ASKING), context).expected
    assert outcome.left_out and outcome.notes[0].endswith("(give --data FOLDER): finphrase, sst2")


@needs_study_data("domains")
def test_the_study_folder_holds_all_sets_but_pubmedqas_answers():
    setup = ScaleSetup("small", "demo", STUDY_DATA, {})
    folders = {"finphrase": "domains", "sst2": "domains", "medqa": "benchmarks"}
    assert {name: local_questions(setup, name) for name in folders} == {
        n: STUDY_DATA / f / n for n, f in folders.items()
    }
    assert local_questions(setup, "pubmedqa") is None


def effect(in_domain, earlier):
    def of(lr, order, seed):
        wobble = 0.3 * (seed - 1)
        return in_domain[lr] + wobble, earlier + 0.7 * wobble

    return of


GAIN = effect({0.001: -8.0, 0.01: -16.0}, -6.0)


def test_a_difference_of_methods_that_are_not_matched_decides_nothing_about_a_match(tmp_path):
    methods = {"gain": GAIN, "far": effect({0.001: -22.0, 0.01: -30.0}, 4.0)}
    numbers, without = numbers_of(compare_sweep(tiny_sweep.synthetic(tmp_path, methods)))
    assert "matched.gain-minus-far" not in numbers and "gain-minus-far" not in numbers
    assert "not matched, 6.0 points apart in-domain" in without["matched.gain-minus-far"]

    def near(lr, order, seed):
        return GAIN(lr, order, seed)[0] + (0.1, -0.1, 0.05)[seed], 4.0 + 0.1 * seed

    methods = {"gain": GAIN, "near": near}
    numbers, without = numbers_of(compare_sweep(tiny_sweep.synthetic(tmp_path / "near", methods)))
    assert numbers["matched.gain-minus-near"].value == pytest.approx(-10.1, abs=0.3) and without == {}


def test_methods_with_one_rate_each_have_a_plain_difference_matched_or_not(tmp_path):
    methods = {"gain": GAIN, "worse": effect({0.01: 5.0}, 4.0)}  # it improves nowhere
    numbers, without = numbers_of(compare_sweep(tiny_sweep.synthetic(tmp_path, methods, rates=(0.01,), orders=2)))
    assert numbers["gain-minus-worse"].value == pytest.approx(-10.0, abs=0.3)
    assert "worse improves in-domain at no rate" in without["matched.gain-minus-worse"]


def test_what_survives_at_a_rate_is_not_a_variant_s_best(tmp_path):
    def broken(lr, order, seed):
        return None if (lr, seed) == (0.01, 1) else (-30.0, -30.0)

    table = tiny_sweep.synthetic(tmp_path / "two", {"gain": GAIN, "broken": broken})
    numbers, without = numbers_of(compare_sweep(table))
    assert numbers["broken.best"].value == pytest.approx(-30.0, abs=0.3), "that of the other rate"
    assert "broken.worst" in without
    table = tiny_sweep.synthetic(tmp_path / "one", {"gain": GAIN, "broken": broken}, rates=(0.01,))
    numbers, without = numbers_of(compare_sweep(table))
    assert "broken.best" not in numbers and "diverged" in without["broken.best"]


@pytest.mark.parametrize(("figure", "columns"), [("backward_transfer", 5), ("in_domain", 4)])
def test_the_table_of_runs_shows_each_figure_once(tmp_path, figure, columns):
    frame = runs_frame(tiny_sweep.synthetic(tmp_path, {"gain": GAIN}), figure)
    assert len(frame.columns) == len(set(frame.columns)) == columns


LEARNS = {"domains": ["pubmedqa"], "methods": ["gain", {"name": "lora", "lr": 0.01, "rank": 2}]}


@pytest.mark.usefixtures("unrendered")
def test_adapters_are_absorbed_and_only_the_certificates_stay(tmp_path):
    steps = (("run", "sequence", LEARNS), ("absorbed", "absorb", {"of": "run", "labels": ["lora"]}))
    result = run_recipe(recipe(*steps), tmp_path / "run", scale="smoke")
    folder, run = tmp_path / "run" / "absorbed", result.outcomes["run"]
    assert {file.name for file in folder.iterdir()} == {"lora.json", "outcome.json"}
    domain = load_domain(run.plan.data.domains[0], run.plan.data, load_tokenizer(run.plan.model))
    adapter, blocks = run.adapters["lora/pubmedqa"], domain.validation
    merged = merge_adapter(adapter, tmp_path / "merged", blocks=blocks, model=run.plan.model)
    drift = result.number("absorbed.lora.drift")
    assert drift.value == pytest.approx(merged.perplexity_change, abs=1e-4) and drift.low == drift.value
    assert abs(drift.value) < 0.01, "in fp32"
    assert result.number("run.lora.parameters").value == 3 * 2 * (32 + 32), "rank 2 on three square weights"


@pytest.mark.usefixtures("unrendered")
def test_a_domain_with_less_text_than_asked_for_is_named(tmp_path):
    named = [f"{name}: {getattr(str, name).__doc__[:60]}" for name in dir(str) if not name.startswith("_")][:20]
    file = write_rows(tmp_path / "notes.jsonl", [{"text": text} for text in named])
    short = {"name": "notes", "source": str(file)}
    asked = {**LEARNS, "domains": ["pubmedqa", short], "data": {"train_tokens": 2048}}
    steps = [("run", "sequence", asked), ("apart", "separately", asked), ("rates", "sweep", {**asked, "seeds": [0]})]
    outcomes = run_recipe(recipe(*steps), tmp_path / "run", scale="smoke").outcomes
    inputs = json.loads((tmp_path / "run" / "run" / "inputs.json").read_text())["domains"]
    tokens = inputs["notes"]["train_tokens"]
    assert tokens < 2048 == inputs["pubmedqa"]["train_tokens"]
    for outcome in outcomes.values():
        assert f"fewer training tokens than the 2,048 asked for: notes has {tokens:,}" in outcome.notes


def test_random_orders_are_different_and_begin_with_no_order_of_their_own():
    names = list("abcdefgh")
    drawn = random_orders(names, 8, {"order_seed": 3}, "here")
    assert len(set(drawn)) == 8 and all(sorted(order) == names for order in drawn)
    assert tuple(names) not in drawn and drawn == random_orders(names, 8, {"order_seed": 3}, "here")
    assert drawn != random_orders(names, 8, {}, "here")
    assert set(random_orders(["a", "b"], 2, {}, "here")) == {("a", "b"), ("b", "a")}, "its own where it is drawn"
    refused(ConfigError, "2 domains have 2 orders, not 3", random_orders, ["a", "b"], 3, {}, "here")
    refused(ConfigError, "leave one of them out", random_orders, ["a"], 1, {"orders": 1}, "here")


def test_the_papers_random_orders_are_recorded(tmp_path):
    orders = {**LEARNS, "domains": ["pubmedqa", "wikitext", "pg19"], "random_orders": 2, "order_seed": 1}
    run_recipe(recipe(("orders", "sweep", orders)), tmp_path / "run", scale="smoke")
    grid = yaml.safe_load((tmp_path / "run" / "orders" / "grid.yaml").read_text())
    assert list(map(tuple, grid["orders"])) == random_orders(orders["domains"], 2, {"order_seed": 1}, "here")


@pytest.mark.parametrize(("differences", "message"), [
    ({"x": ["run.gain.in_domain"]}, "`differences` has two numbers by a name"),
    ({"x": ["run.gain.in_domain", "ran.gain.in_domain"]}, "no step 'ran' before it; there are run"),
])  # fmt: skip
def test_wrong_differences_are_refused(differences, message, tmp_path):
    steps = (("run", "sequence", LEARNS), ("apart", "differences", {"differences": differences}))
    refused(ConfigError, message, run_recipe, recipe(*steps), tmp_path / "run", scale="smoke")


@pytest.mark.usefixtures("unrendered")
def test_a_difference_lacks_what_a_scale_leaves_out(tmp_path):
    other = {**LEARNS, "base": "some/large"}
    pairs = {
        "gone": ["other.gain.in_domain", "run.gain.in_domain"],
        "wrong": ["run.gain.nothing", "run.gain.in_domain"],
    }
    setup = ScaleSetup("small", "demo", None, {})
    earlier = {"run": StepOutcome({"gain.in_domain": exact(1.0)}), "other": StepOutcome(left_out=True)}
    context = Context("apart", tmp_path, setup, earlier, Silent())
    outcome = differences({"differences": pairs}, context).run()
    assert (outcome.numbers, set(outcome.without)) == ({}, {"gone", "wrong"})
    assert differences({"differences": {"gone": pairs["gone"]}}, context).expected.left_out
    assert ScaleSetup("small", "demo", None, {}).why_not(other)


@pytest.mark.usefixtures("unrendered")
def test_two_methods_are_paired_block_by_block_where_a_step_asks_for_it(tmp_path):
    three = {**LEARNS, "methods": ["gain", "gain-ffn", {"name": "lora", "lr": 0.01}], "paired": [["lora", "gain-ffn"]]}
    run = run_recipe(recipe(("run", "sequence", three)), tmp_path / "run", scale="smoke").outcomes["run"]
    other = {**LEARNS, "methods": ["gain-ffn", {"name": "lora", "lr": 0.01}]}
    alone = run_recipe(recipe(("run", "sequence", other)), tmp_path / "other", scale="smoke").outcomes["run"]
    assert run.numbers["lora-minus-gain-ffn.in_domain"] == alone.numbers["lora-minus-gain-ffn.in_domain"]
    unknown = {**LEARNS, "paired": [["lora", "dora"]]}
    message = r"paired: \['lora', 'dora'\] are not two labels of its methods: gain, lora"
    refused(ConfigError, message, run_recipe, recipe(("run", "sequence", unknown)), tmp_path / "x", scale="smoke")
