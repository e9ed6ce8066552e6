"""What is refused before a recipe's first step, and what is said to be left out at a scale."""

import json
from pathlib import Path

import pytest

from gaintune.config import build_plan
from gaintune.data import load_domain
from gaintune.errors import AssetError, ConfigError, DataError
from gaintune.progress import Silent
from gaintune.recipes import Recipe, recipe_named, recipes, run_recipe
from gaintune.recipes import smoke as tiny
from gaintune.recipes.outcome import Context, StepOutcome
from gaintune.recipes.preflight import check_hub
from gaintune.recipes.scales import LISTS, ScaleSetup, budget_note, dropped, names_in, note_of, stem_of
from gaintune.recipes.steps.benchmarks import BY_TARGET, benchmark_config
from gaintune.recipes.steps.classify import MAX_REPORTED_PERPLEXITY, mean_kept
from support import STUDY_DATA, needs_study_data, refused
from support.cli import run
from support.files import write_rows
from support.tiny_base import tokenizer
from support.tiny_recipes import recipe

pytestmark = pytest.mark.usefixtures("unrendered")

LEARNS = {"domains": ["pubmedqa"], "methods": ["gain", {"name": "lora", "lr": 0.01}]}


RUN = ("run", "sequence", LEARNS)
APART = ("run", "separately", {**LEARNS, "domains": ["pubmedqa", "wikitext"]})


@pytest.mark.parametrize(("steps", "overrides", "message"), [
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
])  # fmt: skip
def test_a_later_step_is_refused_before_anything_is_trained(steps, overrides, message, tmp_path):
    refused(ConfigError, message, run_recipe, recipe(*steps), tmp_path / "run", scale="smoke", overrides=overrides)
    assert not (tmp_path / "run").exists(), "the folder is free for the corrected recipe"


def test_programs_need_a_permission_and_are_refused_before_the_training(tmp_path):
    programs = recipe(RUN, ("ask", "benchmarks", {"of": "run", "tasks": ["humaneval"]}))
    options = {"scale": "paper", "data": tiny.texts(tmp_path / "data")}
    refused(ConfigError, "--allow-code-execution", run_recipe, programs, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_methods_from_the_command_line_take_the_place_of_a_sweeps(tmp_path):
    claim = {"says": "gain learns", "number": "run.gain@0.01.in_domain", "expect": {"below": 0}}
    sweep = ("run", "sweep", {**LEARNS, "domains": ["pubmedqa", "wikitext"]})
    ia3 = {"methods": [{"name": "ia3", "lr": 0.01}]}
    outcome = run_recipe(recipe(sweep), tmp_path / "run", scale="smoke", overrides=ia3).outcomes["run"]
    assert any(name.startswith("ia3@0.01") for name in outcome.numbers)
    assert not any(name.startswith("lora") for name in outcome.numbers)
    claimed, message = recipe(sweep, claims=[claim]), "--set methods: the claim 'gain learns' is about 'gain'"
    refused(ConfigError, message, run_recipe, claimed, tmp_path / "other", scale="smoke", overrides=ia3)


def test_results_are_written_before_a_claim_without_its_number_is_refused(tmp_path):
    wrong = recipe(RUN, claims=[{"says": "x", "number": "run.gain.in_domian", "expect": {"below": 0}}])
    refused(ConfigError, r"no number 'gain\.in_domian'", run_recipe, wrong, tmp_path / "run", scale="smoke")
    assert json.loads((tmp_path / "run" / "results.json").read_text())["claims"][0]["verdict"] == "undecided"


def test_a_step_is_left_out_with_the_step_it_works_on_and_the_notes_say_what_a_scale_lacks(tmp_path):
    other = ("other", "sequence", {**LEARNS, "domains": ["nowhere"]})
    model = ("run", "linear-model", {"dimension": 4, "rank": 1, "steps": 3, "seeds": 1, "batch_size": 8})
    claims = [{"says": "x", "number": "look.gain.smallest", "expect": {"above": 0}}]
    lacking = recipe(other, ("look", "gains", {"of": "other"}), model, claims=claims)
    result = run_recipe(lacking, tmp_path / "run", scale="small")
    assert [one.left_out for one in result.outcomes.values()] == [True, True, False]
    assert result.outcomes["look"].notes == ("left out: it works on step other, which is left out",)
    assert result.findings[0].verdict == "undecided"


def test_scale_small_takes_an_embedded_base_by_name_and_asks_for_its_terms_first(tmp_path, monkeypatch):
    monkeypatch.setenv("GAINTUNE_CACHE", str(tmp_path / "cache"))
    steps = [(name, "sequence", {**LEARNS, "base": base}) for name, base in (("run", "demo-gemma"), ("far", "a/b"))]
    other = recipe(*steps)
    setup = ScaleSetup.make("small", "c/d", None, {}, tmp_path)
    here, far = (other.settings(step, "small") for step in other.steps)
    assert setup.plan(here, origin="step run").model.name == "demo-gemma" and setup.why_not(here) is None
    assert "this step asks for a/b" in str(setup.why_not(far))
    refused(AssetError, r"gaintune assets --accept demo-gemma", run_recipe, other, tmp_path / "run", scale="small")
    assert not (tmp_path / "run").exists()


def test_at_scale_smoke_an_embedded_base_is_a_tiny_one_of_its_own(tmp_path):
    setup = ScaleSetup.make("smoke", "c/d", None, {}, tmp_path)
    name = setup.plan({**LEARNS, "base": "demo-gemma"}, origin="step run").model.name
    assert Path(name).is_dir() and name != setup.model


def test_a_step_that_is_left_out_needs_no_terms(tmp_path, monkeypatch):
    monkeypatch.setenv("GAINTUNE_CACHE", str(tmp_path / "cache"))
    without_text = recipe(("run", "sequence", {**LEARNS, "domains": ["nowhere"], "base": "demo-gemma"}))
    assert check_hub(without_text, ScaleSetup.make("small", "c/d", None, {}, tmp_path), tmp_path) == []


@pytest.mark.parametrize(
    ("name", "steps"), [("G4", {"run": "demo-gemma"}), ("G7", {"7b": "demo-gemma", "774m": "demo"})]
)
def test_recipes_with_a_second_embedded_base_show_and_use_it(name, steps):
    found, shown = recipe_named(name), run("recipe", "show", name)
    setup = ScaleSetup("small", "demo", None, {})
    for step in (step for step in found.steps if step.name in steps):
        settings = found.settings(step, "small")
        assert setup.why_not(settings) is None
        assert setup.plan(settings, origin=step.name).model.name == steps[step.name]
        assert f"at scale small, base: {steps[step.name]}\n" in shown.partition(f"step {step.name} ")[2]


def test_notes_name_what_a_scale_leaves_out():
    rates = [{"name": "lora", "lr": rate, "label": f"lora-lr{rate}"} for rate in (0.1, 0.2)]
    step = ("run", "sequence", {"domains": ["pubmedqa", "pg19"], "methods": [*rates, "dora"]})
    small = recipe(step, scales={"small": {"run": {"domains": ["pubmedqa", "law"], "methods": rates[:1]}}})
    left_out = "at scale small left out: methods dora; domains pg19 (law instead)"
    assert note_of(small, small.steps[0], "paper") == ()
    assert note_of(small, small.steps[0], "small") == (left_out, "at scale small other rates: lora-lr0.1")


def test_notes_name_what_a_scale_adds_and_its_budget():
    run = ("run", "sequence", {"domains": ["pubmedqa"], "watched": ["lambada"], "methods": ["gain"]})
    small = {"run": {"watched": ["lambada", "pg19"], "data": {"train_tokens": 8192}}}
    more = recipe(run, scales={"small": small})
    (step,) = more.steps
    assert note_of(more, step, "small") == ("at scale small also: watched pg19",)
    plan = build_plan({"data": {"train_tokens": 8192, "block_size": 256}, "train": {"batch_size": 2, "epochs": 1}})
    assert budget_note(more, step, "paper", plan) == ()
    assert budget_note(more, step, "small", plan) == (
        "trained here: 8,192 tokens a domain in blocks of 256, 2 a batch, 1 epoch (16 updates a domain); at scale "
        "paper: 200,000 tokens a domain in blocks of 250, 4 a batch, 5 epochs (1,000 updates a domain)",
    )
    for key in ({"methods": [{"name": "gain", "replay": 0.5}]}, {"data": {"task": "instruct", "domains": ["gsm8k"]}}):
        assert "(about 8 updates a domain);" in budget_note(more, step, "small", build_plan(key))[0]


def test_an_embedded_text_and_the_embedded_base_are_known_at_scale_small_by_their_names():
    setup = ScaleSetup("small", "demo", None, {})
    settings = {**LEARNS, "domains": ["law", {"name": "code"}, "pubmedqa", "sst2"], "base": "demo"}
    assert setup.why_not(settings) is None and setup.missing(settings["domains"]) == ["sst2"]
    plan = setup.plan(settings, origin="here")
    sources = {"law": "law", "code": "code", "pubmedqa": "medical"}
    assert {domain.name: domain.source for domain in plan.data.domains} == sources and plan.model.name == "demo"
    assert setup.text_notes(settings)[1] == "embedded texts stand in: pubmedqa is medical"
    assert ScaleSetup("small", "demo", None, {"model": {"name": "mine"}}).plan(settings, origin="").model.name == "mine"
    assert "asks for some/large" in str(setup.why_not({**settings, "base": "some/large"}))


@pytest.mark.parametrize("name", list(recipes()))
def test_a_claims_names_are_those_of_every_scale(name):
    """A smoke run has every claim's number; so has a small one whose names in it are the same, or left out."""
    found = recipe_named(name)
    steps = {step.name: step for step in found.steps}
    for claim in (claim for claim in found.claims if claim.scale is None):
        step, _, number = claim.number.partition(".")
        for each in {step, steps[step].settings.get("of", step)}:
            for key in LISTS:
                smoke, small = (
                    set(map(stem_of, names_in(found.settings(steps[each], scale), key))) for scale in ("smoke", "small")
                )
                excused = {one for gone in dropped(found, steps[each], "small").values() for one in gone}
                named = f".{number.replace('-minus-', '.')}."
                missing = {one for one in smoke - small - excused if f".{one}." in named}
                assert not missing, (claim.number, key, missing)


def test_the_rate_that_is_best_on_the_target_alone_is_measured_on_the_rest(tmp_path):
    labels = ["gain-lr0.01", "gain-lr0.02", "lora"]
    methods = [{"name": each.partition("-")[0], "lr": 0.01 * (n + 1), "label": each} for n, each in enumerate(labels)]
    ask = {"of": "run", "pick": "target", "target": ["arc_easy"], "tasks": ["piqa"], "limit": 2}
    picking = recipe(("run", "sequence", {**LEARNS, "methods": methods}), ("ask", "benchmarks", ask))
    outcome = run_recipe(picking, tmp_path / "run", scale="smoke").outcomes["ask"]
    chosen, asked = (
        json.loads((tmp_path / "run" / "ask" / f"{name}.json").read_text())["adapted"]
        for name in ("choosing", "benchmarks")
    )
    assert set(chosen) == set(labels) and len(asked) == 2 and "lora" in asked
    assert {"gain.kept", "gain.target", "lora-minus-gain.kept"} <= set(outcome.numbers)
    assert BY_TARGET in outcome.notes


def test_broken_rows_are_refused_and_a_text_of_the_same_name_is_no_benchmark(tmp_path):
    plan = ScaleSetup("small", "demo", None, {}).plan({"domains": ["pubmedqa"], "methods": ["gain"]}, origin="here")

    def missing(data: Path) -> dict[str, str]:
        context = Context("ask", tmp_path, ScaleSetup("small", "demo", data, {}), {}, Silent())
        return benchmark_config({}, ["gsm8k"], plan, context)[1]

    write_rows(tmp_path / "texts" / "gsm8k.jsonl", [{"text": "two and two"}])
    assert "no rows" in missing(tmp_path / "texts")["gsm8k"]
    write_rows(tmp_path / "broken" / "benchmarks" / "gsm8k.jsonl", [{"text": "two and two"}])
    refused(DataError, "not a row of gsm8k", missing, tmp_path / "broken")


def test_a_local_copy_may_be_any_file_a_domain_may_be(tmp_path):
    for name in ("pubmedqa.csv", "pg19.txt"):
        (tmp_path / name).write_text("text\nwords\n")
    setup = ScaleSetup("small", "demo", tmp_path, {})
    sources = [each["source"] for each in setup.domains(["pubmedqa", "pg19", "medqa"])]
    assert sources == [str(tmp_path / "pubmedqa.csv"), str(tmp_path / "pg19.txt"), "code"]


def test_rows_of_a_benchmark_are_a_text_where_their_column_is_named(tmp_path):
    rows = [{"query": "Is it?", "gold": 0}]
    for name in ("benchmarks/boolq", "benchmarks/pubmedqa", "domains/sst2", "benchmarks/sst2"):
        write_rows(tmp_path / name / "validation.jsonl", rows)
    setup = ScaleSetup("small", "demo", tmp_path, {})
    named = [{"name": name, "text_column": "query"} for name in ("boolq", "sst2")]
    assert setup.domains(named) == [
        {**entry, "source": str(tmp_path / folder / entry["name"])}
        for entry, folder in zip(named, ("benchmarks", "domains"), strict=True)
    ]
    assert setup.domains(["pubmedqa"])[0]["source"] == "medical" and setup.missing(["boolq"]) == ["boolq"]


@needs_study_data("benchmarks")
def test_the_study_of_many_domains_has_text_enough_for_each():
    study = recipe_named(str(Path(__file__).parents[2] / "studies" / "many.yaml"))
    settings = {key: value for key, value in study.settings(study.steps[0], "small").items() if key != "paired"}
    plan, bytewise = ScaleSetup("small", "demo", STUDY_DATA, {}).plan(settings, origin="run"), tokenizer()
    assert len(plan.data.domains) == 24 and plan.model.name == "demo-gemma"
    local = [domain for domain in plan.data.domains if domain.source.startswith(str(STUDY_DATA))]
    embedded = {domain.name for domain in plan.data.domains if domain not in local}
    assert embedded == {"law", "medical", "code", "scripture", "manual"}
    for domain in local:  # those of benchmarks are one file of validation rows, of which some are held out
        blocks = load_domain(domain, plan.data, bytewise)
        assert (blocks.train.input_ids.shape, blocks.validation.input_ids.shape) == ((16, 128), (8, 128)), domain.name
    assert sum(domain.source.startswith(str(STUDY_DATA / "benchmarks")) for domain in local) == 5


def test_of_adapters_that_were_trained_apart_no_adapter_is_the_last():
    adapters = {"gain/a": Path("a"), "gain/b": Path("b")}
    assert StepOutcome(adapters=adapters).last_adapters() == {"gain": Path("b")}
    assert StepOutcome(adapters=adapters, apart=True).last_adapters(after="a") == {"gain": Path("a")}
    refused(ConfigError, "`after` names one of a, b", StepOutcome(adapters=adapters, apart=True).last_adapters)


def test_an_infinite_perplexity_stands_as_the_greatest():
    assert mean_kept([(float("inf"), float("inf")), (10.0, 0.0)]).perplexity == MAX_REPORTED_PERPLEXITY / 2


def test_factors_have_numbers_over_all_stages_and_of_runs_apart(tmp_path):
    learns = {**APART[2], "methods": ["gain", "gain-ffn", "lora", "dora"]}
    factors = recipe(("run", "separately", learns), ("factors", "gains", {"of": "run"}))
    outcome = run_recipe(factors, tmp_path / "run", scale="smoke").outcomes["factors"]
    numbers = outcome.numbers
    assert {"pubmedqa.gain.smallest_ever", "wikitext.gain.flipped_ever"} <= set(numbers)
    assert numbers["pubmedqa.gain.smallest_ever"] == numbers["pubmedqa.gain.smallest"]
    apart, pairs = [name for name in numbers if "-minus-" in name], ("gain-ffn-minus-gain", "gain-minus-gain-ffn")
    assert sorted(apart) == [f"{domain}.{pair}.near" for domain in ("pubmedqa", "wikitext") for pair in pairs]
    near = [numbers[f"wikitext.{label}.near"].value for label in ("gain-ffn", "gain")]
    assert numbers["wikitext.gain-ffn-minus-gain.near"].value == pytest.approx(near[0] - near[1])
    assert sum("without factors" in note for note in outcome.notes) == 4


def test_planes_are_compared_where_there_are_two(tmp_path):
    survey = ("look", "landscape", {"of": "run", "line": [0.5], "grid": [1]})
    numbers = run_recipe(recipe(APART, survey), tmp_path / "two", scale="smoke").outcomes["look"].numbers
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


def claim(number: str) -> dict:
    return {"says": number, "number": number, "expect": {"below": 1e6}}


def judged(*steps, claims) -> Recipe:
    return recipe(*steps, claims=list(map(claim, claims)))


def test_a_method_that_diverges_leaves_the_others_with_their_verdicts(tmp_path):
    breaks = {"name": "lora", "lr": 1e36, "alpha": 1e4}
    mine = judged(
        ("run", "sequence", {"domains": ["pubmedqa", "wikitext"], "methods": [breaks, "gain", "gain-ffn"]}),
        ("spaces", "subspace", {"of": "run", "labels": ["gain", "lora"]}),
        claims=("run.gain.in_domain", "run.lora.in_domain", "run.lora-minus-gain.in_domain", "spaces.lora.intruders"),
    )
    result = run_recipe(mine, tmp_path / "run", scale="smoke")
    assert [finding.verdict for finding in result.findings] == ["reproduced", *["undecided"] * 3]
    run = result.outcomes["run"]
    assert list(run.diverged) == ["lora"] and run.labels == ("gain", "gain-ffn")
    assert not [name for name in run.numbers if "lora" in name]
    spaces = result.outcomes["spaces"].numbers
    assert "gain.intruders" in spaces and not [name for name in spaces if "lora" in name]
    page = (tmp_path / "run" / "results.md").read_text(encoding="utf-8")
    assert "lora did not finish, and claims about it are undecided: the" in page


def test_subspaces_of_several_labels_are_compared_at_equal_size(tmp_path):
    """Of a sequence the last adapters, of domains trained apart those after a named one."""
    settings = {"domains": ["pubmedqa", "wikitext"], "methods": ["gain", "lora"]}
    mine = judged(
        ("run", "sequence", settings), ("apart", "separately", settings),
        ("last", "subspace", {"of": "run", "relative_update": 0.3}),
        ("first", "subspace", {"of": "apart", "after": "pubmedqa", "labels": ["lora", "gain"], "relative_update": 0.3}),
        claims=("last.lora.scaled.intruders_per_module", "first.gain.intruder_share"),
    )  # fmt: skip
    result = run_recipe(mine, tmp_path / "run", scale="smoke")
    assert [finding.verdict for finding in result.findings] == ["reproduced"] * 2
    names = {f"{label}.{kind}" for label in ("gain", "lora") for kind in ("intruders_per_module", "scaled.modules")}
    assert all(names <= set(result.outcomes[step].numbers) for step in ("last", "first"))


def test_a_rate_that_diverges_leaves_its_method_without_a_worst(tmp_path):
    methods = {"methods": [{"name": "lora", "alpha": 1e4, "rank": 1}, "gain"]}
    rates = {"rates": {"lora": [1e-7, 1e36], "gain": [0.001, 0.01]}}
    mine = judged(
        ("rates", "sweep", {"domains": ["pubmedqa", "wikitext"], **methods, **rates}),
        claims=("rates.lora.worst", "rates.lora.best", "rates.gain.worst", "rates.lora@1e+36.in_domain"),
    )
    result = run_recipe(mine, tmp_path / "run", scale="smoke")
    found = {finding.claim.number: finding.number for finding in result.findings}
    undecided = [number for number, one in found.items() if one is None]
    assert undecided == ["rates.lora.worst", "rates.lora@1e+36.in_domain"]
    saved = json.loads((tmp_path / "run" / "results.json").read_text())
    assert saved["without"]["rates.lora.worst"] == "1 run at 1e+36 diverged"
    assert any("lora at 1e+36: 1 run" in note for note in saved["notes"]["rates"])
