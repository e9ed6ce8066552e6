"""Plans: what a person writes, what is refused, and that nothing gets lost on the way to disk and back."""

import pytest
import yaml
from pydantic import ValidationError

import gaintune.evaluate.benchmarks.config
import gaintune.recipes.schema
import gaintune.workflows.sweep.grid  # noqa: F401  # so that every section is known
from gaintune.cli.options import Given, parse_method
from gaintune.config import (
    Section,
    apply_overrides,
    build_plan,
    plan_yaml,
    plan_yaml_documented,
    read_plan,
    read_values,
)
from gaintune.errors import ConfigError
from support import refused


@pytest.mark.parametrize(("values", "message"), [
    ({"train": {"lrr": 0.1}}, "unknown key 'train.lrr'; did you mean 'lr'?"),
    ({"trian": {}}, "unknown key 'trian'; did you mean 'train'?"),
    ({"methods": [{"name": "lora", "rnk": 2}]}, "unknown key 'methods.0.rnk'; did you mean 'rank'?"),
    ({"data": {"domains": [{"name": "a", "source": "b", "txt": 1}]}}, "unknown key 'data.domains.0.txt'"),
    ({"train": {"lr": -1}}, "train.lr: Input should be greater than 0 (got -1)"),
    ({"train": {"lr": float("inf")}}, "train.lr: Input should be a finite number (got inf)"),
    ({"train": {"betas": [0.9, float("nan")]}}, "train.betas.1: Input should be a finite number (got nan)"),
    ({"methods": ["gain", {"name": "lora", "lr": float("inf")}]}, "methods.1.lr: Input should be a finite number"),
    ({"methods": [{"name": "gain", "penalty": "l2", "penalty_strength": float("inf")}]},
     "methods.0.penalty_strength: Input should be a finite number (got inf)"),
    ({"data": {"train_tokens": 10}}, "less than one block (256 tokens)"),
    ({"data": {"domains": ["law", "law"]}}, "every name must be different"),
    ({"data": {"domains": ["../up=x.txt"]}}, "not a usable name"),
    ({"methods": ["lora", "lora"]}, "every label must be different"),
    ({"methods": []}, "methods"),
    ({"train": {"learning_rate": 1}}, "unknown key 'train.learning_rate'; did you mean 'lr'?"),
    ({"train": {"num_epochs": 1}}, "did you mean 'epochs'?"),
    ({"train": {"per_device_train_batch_size": 1}}, "did you mean 'batch_size'?"),
    ({"methods": [{"name": "lora", "r": 2}]}, "unknown key 'methods.0.r'; did you mean 'rank'?"),
    ({"methods": [{"name": "lora", "lora_alpha": 2}]}, "did you mean 'alpha'?"),
    ({"methods": ["lora:rank=2"]}, "in a plan a method's options are keys: {name: lora, rank: 16}"),
    ({"methods": [{"name": "lora", "penalty_strength": 2}]}, "is given without a penalty"),
    ({"train": {"effective_batch": 64, "gradient_accumulation": 2}},
     "effective_batch (64) and gradient_accumulation (2) both say how many forward passes"),
    ({"train": {"effective_batch": 10}},
     "effective_batch is 10, no multiple of the 4 rows of a forward pass (train.batch_size 4 x 1 process): "
     "set train.effective_batch=8 or 12, or train.batch_size=2"),
    ({"train": {"effective_batch": 2}}, "set train.effective_batch=4, or train.batch_size=2"),
    ({"model": {"device_map": "auto", "device": "cpu"}}, "leave device=cpu out"),
])  # fmt: skip
def test_a_mistake_is_named_with_its_key_and_nothing_else(values, message):
    with pytest.raises(ConfigError) as caught:
        build_plan(values, "plan.yaml")
    assert message in str(caught.value) and str(caught.value).startswith("plan.yaml: ")
    assert str(caught.value).count("\n") == 0
    assert "{'" not in str(caught.value), "no dump of a section"


def test_newer_keys_are_in_a_stored_plan_only_where_they_are_set():
    plain = read_plan({}).model_dump(mode="json")
    assert "effective_batch" not in plain["train"] and "device_map" not in plain["model"]
    chosen = read_plan({"train": {"effective_batch": 64}, "model": {"device_map": "auto"}})
    for written in (plan_yaml(chosen), plan_yaml_documented(chosen)):
        assert build_plan(yaml.safe_load(written)) == chosen


@pytest.mark.parametrize(("processes", "passes"), [(1, 16), (2, 8), (8, 2)])
def test_the_effective_batch_is_that_of_all_processes(processes, passes):
    train = read_plan({"train": {"effective_batch": 64}}).train
    assert train.accumulation(processes) == passes and train.rows_per_update(processes) == 64


def test_every_mistake_is_named_at_once():
    with pytest.raises(ConfigError) as caught:
        build_plan({"train": {"lrr": 1, "clip": -1}})
    assert "train.lrr" in str(caught.value) and "train.clip" in str(caught.value)


def test_no_number_of_any_section_may_be_infinite_or_nan():
    """Every key that takes a float, of plans, grids, recipes and benchmarks: it would end up in files of JSON."""
    sections = [Section]
    for section in sections:
        sections += section.__subclasses__()
    keys = [(each, key) for each in sections for key, info in each.model_fields.items() if "float" in str(info)]
    assert {"MethodConfig", "Grid", "Expectation", "BenchmarkConfig"} <= {section.__name__ for section, _ in keys}
    for section, key in keys:
        for value in (float("inf"), float("-inf"), float("nan")):
            for given in (value, [value, value], {"lora": [value]}):
                with pytest.raises(ValidationError) as caught:
                    section.model_validate({key: given})
                assert [each for each in caught.value.errors() if each["loc"][:1] == (key,)], (section, key, given)


@pytest.mark.parametrize("write", [plan_yaml, plan_yaml_documented])
def test_a_plan_survives_yaml(write):
    values = {"methods": ["gain", {"name": "lora", "rank": 4}], "data": {"domains": ["law", "notes=./n.jsonl"]}}
    plan = build_plan(values)
    assert build_plan(yaml.safe_load(write(plan))) == plan


def test_a_plan_without_off_diagonals_reads_as_before_they_existed():
    plain, banded = (build_plan({"methods": [{"name": "svft", **more}]}) for more in ({}, {"off_diagonals": 2}))
    assert "off_diagonals" not in plan_yaml(plain) and "off_diagonals: 2" in plan_yaml(banded)
    assert build_plan(yaml.safe_load(plan_yaml(banded))) == banded


def test_broken_yaml_and_a_repeated_key_are_named_by_file_and_line(tmp_path):
    file, twice = tmp_path / "plan.yaml", "stands there twice, first on line"
    for text, read, message in (
        ("train:\n  lr: 0.01\n bad indent\n", read_values, "3: not valid YAML"),
        ("train:\n  lr: 1\n  seed: 1\n  lr: 2\n", read_values, f"4: .*key 'lr' {twice} 2; keep one"),
        ("data: {task: text}\ntrain: {}\ndata: {seed: 1}\n", read_plan, f"3: .*'data' {twice} 1"),
    ):
        file.write_text(text)
        refused(ConfigError, rf"plan\.yaml:{message}", read, file)
    refused(ConfigError, r"--set train=.*'lr' stands there twice", apply_overrides, {}, ["train={lr: 0.1, lr: 0.2}"])


def test_what_a_merge_brings_may_be_given_again(tmp_path):
    file = tmp_path / "plan.yaml"
    file.write_text(
        "methods:\n- &deep {name: lora, rank: 2}\n- &deeper {<<: *deep, rank: 4, label: four}\n"
        "- {<<: *deeper, label: other, replay: 1}\n"
    )
    assert [(each.label, each.rank) for each in read_plan(file).methods] == [("lora", 2), ("four", 4), ("other", 4)]


def test_overrides_reach_nested_keys_leave_the_rest_and_need_no_list_for_one_method_or_domain():
    values = apply_overrides({"train": {"lr": 1.0, "seed": 3}}, ["train.lr=5e-3", "data.domains=[law, code]"])
    plan = build_plan(values)
    assert (plan.train.lr, plan.train.seed) == (0.005, 3)
    assert [domain.name for domain in plan.data.domains] == ["law", "code"]
    plan = build_plan(apply_overrides({}, ["methods=lora", "data.domains=law"]))
    assert [method.name for method in plan.methods] == ["lora"]
    assert [domain.name for domain in plan.data.domains] == ["law"]
    plan = build_plan(apply_overrides({}, ["methods=[gain, lora]"]))
    assert [method.name for method in plan.methods] == ["gain", "lora"]
    assert build_plan({"methods": {"name": "lora", "rank": 2}}).methods[0].rank == 2


@pytest.mark.parametrize("text", ["train.lr", "=3", "train.lr=[1"])
def test_an_override_that_is_no_assignment_is_refused(text):
    refused(ConfigError, "--set", apply_overrides, {}, [text])


def test_options_are_laid_over_the_plan_file_and_set_over_both(tmp_path):
    file = tmp_path / "plan.yaml"
    file.write_text("train: {lr: 0.1, epochs: 7}\ndata: {seed: 5}\n")
    plan = Given(file, {"train.lr": 0.2, "train.seed": 9}, ["data.seed=11"]).plan()
    assert (plan.train.lr, plan.train.epochs, plan.train.seed, plan.data.seed) == (0.2, 7, 9, 11)


def test_a_method_with_options_on_the_command_line():
    fields = parse_method("lora:rank=16,lr=2e-4,targets=q_proj+v_proj,label=wide")
    method = build_plan({"methods": [fields]}).methods[0]
    assert (method.rank, method.lr, method.targets, method.label) == (16, 2e-4, ("q_proj", "v_proj"), "wide")
    refused(ConfigError, "name:key=value", parse_method, "lora:16")
