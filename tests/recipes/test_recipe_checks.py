"""What is refused before a recipe's first step, and what is said to be left out at a scale."""

import json
from pathlib import Path

import pytest

from gaintune.config import build_plan
from gaintune.errors import ConfigError, DataError
from gaintune.progress import Silent
from gaintune.recipes import Recipe, recipe_named, recipes, run_recipe
from gaintune.recipes import smoke as tiny
from gaintune.recipes.outcome import Context, StepOutcome
from gaintune.recipes.scales import LISTS, ScaleSetup, budget_note, dropped, names_in, note_of, stem_of
from gaintune.recipes.steps.benchmarks import BY_TARGET, benchmark_config
from gaintune.recipes.steps.classify import MAX_REPORTED_PERPLEXITY, mean_kept

LEARNS = {"domains": ["pubmedqa"], "methods": ["gain", {"name": "lora", "lr": 0.01}]}


def recipe(*steps, claims=(), scales=None) -> Recipe:
    named = [{"name": name, "do": kind, "settings": settings} for name, kind, settings in steps]
    values = {"id": "MINE", "title": "t", "source": "s", "asks": "a", "model": "m", "steps": named}
    return Recipe.model_validate({**values, "claims": claims, "scales": scales or {}})


RUN = ("run", "sequence", LEARNS)
APART = ("run", "separately", {**LEARNS, "domains": ["pubmedqa", "wikitext"]})


@pytest.mark.parametrize(
    ("steps", "overrides", "message"),
    [
        ([RUN, ("look", "tokens", {"of": "ran", "domains": ["wikitext"]})], {}, "steps before it: run"),
        ([RUN, ("look", "tokens", {"of": "run", "labels": ["dora"], "domains": ["wikitext"]})], {}, "called 'dora'"),
        ([RUN, ("look", "gates", {"of": "run", "domains": ["wikitext"]})], {}, "called 'disel'; there are gain, lora"),
        ([RUN, ("look", "gates", {"of": "run", "label": "gain", "domains": ["wikitext"]})], {}, "gain has no gates"),
        ([RUN, ("look", "subspace", {"of": "run", "epsilom": 1})], {}, "unknown key 'epsilom'"),
        ([("look", "linear-model", {"dimensions": 3})], {}, "unknown key 'dimensions'"),
        ([("look", "linear-model", {"dimension": "wide"})], {}, "step look"),
        ([RUN, ("look", "retention", {"of": "run"})], {}, "snapshot_steps"),
        ([RUN, ("look", "transfer", {"of": "run", "label": "gain", "components": ["median"]})], {}, "'median'"),
        ([RUN, ("ask", "benchmarks", {"of": "run", "tasks": ["piqa"], "limits": 2})], {}, "unknown key 'limits'"),
        ([RUN, ("ask", "benchmarks", {"of": "run", "tasks": ["arc_easy"], "pick": "best"})], {}, "pick 'best'"),
        ([RUN, ("look", "landscape", {"of": "run", "line": "long"})], {}, "line.0: .* a valid number"),
        ([APART, ("look", "subspace", {"of": "run"})], {}, "`after` names one of pubmedqa, wikitext"),
        ([("run", "sequence", {**LEARNS, "methods": ["gian"]})], {}, "gian"),
        ([("look", "linear-model", {})], {"train": {"seed": 1}}, "no step of it has a plan"),
        ([RUN], {"nonsense": {"x": 1}}, "unknown key 'nonsense'"),
        ([("run", "sweep", {**LEARNS, "seeds": [0, 1]})], {"train": {"seed": 3}}, "--set train.seed: step run decides"),
        ([("run", "sweep", {**LEARNS, "rates": [0.1]})], {"train": {"lr": 0.2}}, "--set train.lr"),
        ([APART], {"data": {"domains": ["law"]}}, "--set data.domains"),
    ],
)  # fmt: skip
def test_a_later_step_is_refused_before_anything_is_trained(steps, overrides, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        run_recipe(recipe(*steps), tmp_path / "run", scale="smoke", overrides=overrides)
    assert not (tmp_path / "run").exists(), "the folder is free for the corrected recipe"


def test_programs_are_not_run_unasked_and_that_is_said_before_the_training(tmp_path):
    told = recipe(RUN, ("ask", "benchmarks", {"of": "run", "tasks": ["humaneval"]}))
    with pytest.raises(ConfigError, match="--allow-code-execution"):
        run_recipe(told, tmp_path / "run", scale="paper", data=tiny.texts(tmp_path / "data"))
    assert not (tmp_path / "run").exists()


def test_methods_from_the_command_line_take_the_place_of_a_sweeps(tmp_path):
    claim = {"says": "gain learns", "number": "run.gain@0.01.in_domain", "expect": {"below": 0}}
    sweep = ("run", "sweep", {**LEARNS, "domains": ["pubmedqa", "wikitext"]})
    ia3 = {"methods": [{"name": "ia3", "lr": 0.01}]}
    outcome = run_recipe(recipe(sweep), tmp_path / "run", scale="smoke", overrides=ia3).outcomes["run"]
    assert any(name.startswith("ia3@0.01") for name in outcome.numbers)
    assert not any(name.startswith("lora") for name in outcome.numbers)
    with pytest.raises(ConfigError, match="--set methods: the claim 'gain learns' is about 'gain'"):
        run_recipe(recipe(sweep, claims=[claim]), tmp_path / "other", scale="smoke", overrides=ia3)


def test_results_are_written_before_a_claim_without_its_number_is_refused(tmp_path):
    claim = {"says": "x", "number": "run.gain.in_domian", "expect": {"below": 0}}
    with pytest.raises(ConfigError, match=r"no number 'gain\.in_domian'"):
        run_recipe(recipe(RUN, claims=[claim]), tmp_path / "run", scale="smoke")
    assert json.loads((tmp_path / "run" / "results.json").read_text())["claims"][0]["verdict"] == "undecided"


def test_a_step_is_left_out_with_the_step_it_works_on_and_the_notes_say_what_a_scale_lacks(tmp_path):
    told = recipe(
        ("other", "sequence", {**LEARNS, "domains": ["nowhere"]}),
        ("look", "gains", {"of": "other"}),
        ("run", "linear-model", {"dimension": 4, "rank": 1, "steps": 3, "seeds": 1, "batch_size": 8}),
        claims=[{"says": "x", "number": "look.gain.smallest", "expect": {"above": 0}}],
    )
    result = run_recipe(told, tmp_path / "run", scale="small")
    assert [one.left_out for one in result.outcomes.values()] == [True, True, False]
    assert result.outcomes["look"].notes == ("left out: it works on step other, which is left out",)
    assert result.findings[0].verdict == "undecided"


def test_what_a_scale_leaves_out_is_said_by_name():
    rates = [{"name": "lora", "lr": rate, "label": f"lora-lr{rate}"} for rate in (0.1, 0.2)]
    told = recipe(
        ("run", "sequence", {"domains": ["pubmedqa", "pg19"], "methods": [*rates, "dora"]}),
        scales={"small": {"run": {"domains": ["pubmedqa", "law"], "methods": rates[:1]}}},
    )
    assert note_of(told, told.steps[0], "paper") == ()
    assert note_of(told, told.steps[0], "small") == (
        "at scale small left out: methods dora; domains pg19 (law instead)",
        "at scale small other rates: lora-lr0.1",
    )


def test_what_a_scale_adds_and_the_budget_it_has_are_said():
    told = recipe(
        ("run", "sequence", {"domains": ["pubmedqa"], "watched": ["lambada"], "methods": ["gain"]}),
        scales={"small": {"run": {"watched": ["lambada", "pg19"], "data": {"train_tokens": 8192}}}},
    )
    (step,) = told.steps
    assert note_of(told, step, "small") == ("at scale small also: watched pg19",)
    plan = build_plan({"data": {"train_tokens": 8192, "block_size": 256}, "train": {"batch_size": 2, "epochs": 1}})
    assert budget_note(told, step, "paper", plan) == ()
    assert budget_note(told, step, "small", plan) == (
        "learnt here: 8,192 tokens a domain in blocks of 256, 2 a batch, 1 epoch; at scale paper: 200,000 tokens a "
        "domain in blocks of 250, 4 a batch, 5 epochs",
    )


@pytest.mark.parametrize("name", list(recipes()))
def test_a_claims_names_are_those_of_every_scale(name):
    """A smoke run has every claim's number; so has a small one whose names in it are the same, or left out."""
    found = recipe_named(name)
    steps = {step.name: step for step in found.steps}
    for claim in found.claims:
        step, _, number = claim.number.partition(".")
        of = steps[step].settings.get("of", step)
        for each in {step, of}:
            for key in LISTS:
                sets = [
                    set(map(stem_of, names_in(found.settings(steps[each], scale), key))) for scale in ("smoke", "small")
                ]
                excused = {one for gone in dropped(found, steps[each], "small").values() for one in gone}
                missing = {
                    one for one in sets[0] - sets[1] - excused if f".{one}." in f".{number.replace('-minus-', '.')}."
                }
                assert not missing, (claim.number, key, missing)


def test_of_rates_the_best_by_the_target_alone_is_asked_the_rest(tmp_path):
    labels = ["gain-lr0.01", "gain-lr0.02", "lora"]
    methods = [
        {"name": label.partition("-")[0], "lr": 0.01 * (place + 1), "label": label}
        for place, label in enumerate(labels)
    ]
    ask = {"of": "run", "pick": "target", "target": ["arc_easy"], "tasks": ["piqa"], "limit": 2}
    told = recipe(("run", "sequence", {**LEARNS, "methods": methods}), ("ask", "benchmarks", ask))
    outcome = run_recipe(told, tmp_path / "run", scale="smoke").outcomes["ask"]
    chosen = json.loads((tmp_path / "run" / "ask" / "choosing.json").read_text())["adapted"]
    asked = json.loads((tmp_path / "run" / "ask" / "benchmarks.json").read_text())["adapted"]
    assert set(chosen) == set(labels)
    assert len(asked) == 2 and "lora" in asked
    assert {"gain.kept", "gain.target", "lora-minus-gain.kept"} <= set(outcome.numbers)
    assert BY_TARGET in outcome.notes


def test_broken_rows_are_refused_and_a_text_of_the_same_name_is_none(tmp_path):
    plan = ScaleSetup("small", "demo", None, {}).plan({"domains": ["pubmedqa"], "methods": ["gain"]}, origin="here")

    def missing(data: Path) -> dict[str, str]:
        context = Context("ask", tmp_path, ScaleSetup("small", "demo", data, {}), {}, Silent())
        return benchmark_config({}, ["gsm8k"], plan, context)[1]

    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "gsm8k.jsonl").write_text('{"text": "two and two"}\n')
    assert "no rows" in missing(tmp_path / "texts")["gsm8k"]
    (tmp_path / "broken" / "benchmarks").mkdir(parents=True)
    (tmp_path / "broken" / "benchmarks" / "gsm8k.jsonl").write_text('{"text": "two and two"}\n')
    with pytest.raises(DataError, match="not a row of gsm8k"):
        missing(tmp_path / "broken")


def test_a_local_copy_may_be_any_file_a_domain_may_be(tmp_path):
    for name in ("pubmedqa.csv", "pg19.txt"):
        (tmp_path / name).write_text("text\nwords\n")
    setup = ScaleSetup("small", "demo", tmp_path, {})
    assert [each["source"] for each in setup.domains(["pubmedqa", "pg19", "medqa"])] == [
        str(tmp_path / "pubmedqa.csv"), str(tmp_path / "pg19.txt"), "code",
    ]  # fmt: skip


def test_none_of_several_adapters_that_were_learnt_apart_is_the_last():
    adapters = {"gain/a": Path("a"), "gain/b": Path("b")}
    assert StepOutcome(adapters=adapters).last_adapters() == {"gain": Path("b")}
    assert StepOutcome(adapters=adapters, apart=True).last_adapters(after="a") == {"gain": Path("a")}
    with pytest.raises(ConfigError, match="`after` names one of a, b"):
        StepOutcome(adapters=adapters, apart=True).last_adapters()


def test_an_infinite_perplexity_stands_as_the_greatest():
    assert mean_kept([(float("inf"), float("inf")), (10.0, 0.0)]).perplexity == MAX_REPORTED_PERPLEXITY / 2


def test_factors_are_told_over_all_stages_and_of_runs_apart(tmp_path):
    learns = {**APART[2], "methods": ["gain", "gain-ffn", "lora", "dora"]}
    told = recipe(("run", "separately", learns), ("factors", "gains", {"of": "run"}))
    outcome = run_recipe(told, tmp_path / "run", scale="smoke").outcomes["factors"]
    numbers = outcome.numbers
    assert {"pubmedqa.gain.smallest_ever", "wikitext.gain.flipped_ever"} <= set(numbers)
    assert numbers["pubmedqa.gain.smallest_ever"] == numbers["pubmedqa.gain.smallest"]
    apart = [name for name in numbers if "-minus-" in name]
    assert sorted(apart) == [
        f"{domain}.{pair}.near"
        for domain in ("pubmedqa", "wikitext")
        for pair in ("gain-ffn-minus-gain", "gain-minus-gain-ffn")
    ]
    near = [numbers[f"wikitext.{label}.near"].value for label in ("gain-ffn", "gain")]
    assert numbers["wikitext.gain-ffn-minus-gain.near"].value == pytest.approx(near[0] - near[1])
    assert sum("without factors" in note for note in outcome.notes) == 4


def test_planes_are_set_against_each_other_where_there_are_two(tmp_path):
    survey = ("look", "landscape", {"of": "run", "line": [0.5], "grid": [1]})
    told = recipe(APART, survey)
    numbers = run_recipe(told, tmp_path / "two", scale="smoke").outcomes["look"].numbers
    cosines = [abs(numbers[f"{label}.cosine"].value) for label in ("gain", "lora")]
    assert numbers["gain-minus-lora.cosine"].value == pytest.approx(cosines[0] - cosines[1])
    for domain in ("pubmedqa", "wikitext"):
        ranges = [numbers[f"{label}.{domain}.range"].value for label in ("gain", "lora")]
        assert numbers[f"lora-minus-gain.{domain}.range"].value == pytest.approx(ranges[1] - ranges[0])
    alone = recipe(("run", "separately", {**APART[2], "domains": ["pubmedqa"]}), survey)
    outcome = run_recipe(alone, tmp_path / "one", scale="smoke").outcomes["look"]
    lacks = {"gain.cosine", "lora-minus-gain.cosine", "gain-minus-lora.pubmedqa.range", "lora.pubmedqa.both"}
    assert lacks <= set(outcome.without)
    assert all("two adapters span a plane" in outcome.without[name] for name in lacks)
