"""A grid stands for its runs: each once, under an id that depends on its settings alone."""

import re

import pytest
import yaml
from pydantic import Field

from gaintune.config import Plan, TrainConfig
from gaintune.errors import ConfigError
from gaintune.workflows.sweep import read_grid
from gaintune.workflows.sweep.grid import grid_yaml, plan_id, planned_runs
from support import refused

DOMAINS = {"data": {"domains": ["law", "medical", "code"]}}


def runs(**values):
    return planned_runs(read_grid({"plan": DOMAINS, **values}))


def test_every_combination_is_a_run_of_its_own():
    found = runs(methods=["gain-ffn", "lora"], rates=[0.01, 0.02], seeds=[0, 5], orders=2, budgets=[512, 1024])
    assert len(found) == len({run.id for run in found}) == 2 * 2 * 2 * 2 * 2
    for run in found:
        assert run.plan.methods[0].lr == run.lr and run.plan.train.seed == run.seed
        assert run.plan.data.train_tokens == run.budget
        assert tuple(domain.name for domain in run.plan.data.domains) == run.domains
        assert run.plan.data.seed == 0  # what is held out is the same everywhere
        assert run.plan.evaluate.seed == 0  # and so are the blocks drawn, which pairs the runs


def test_the_same_settings_have_the_same_id_however_they_are_given():
    (alone,) = runs(methods=["lora"], seeds=[5])
    assert alone.id in {run.id for run in runs(methods=["gain", "lora"], seeds=[1, 5], orders=3)}
    (given,) = runs(methods=[{"name": "lora", "lr": 0.01}], seeds=[5])
    (of_all,) = planned_runs(read_grid({"plan": {**DOMAINS, "train": {"lr": 0.01, "seed": 5}}, "methods": ["lora"]}))
    assert alone.id == given.id == of_all.id
    (other,) = runs(methods=["lora"], seeds=[5], rates=0.02)
    assert other.id != alone.id
    (methods_of_plan,) = planned_runs(read_grid({"plan": {**DOMAINS, "methods": ["lora"]}, "seeds": [5]}))
    assert methods_of_plan.id == alone.id


def test_a_new_option_leaves_the_ids_of_old_plans_as_they_are():
    class Later(Plan):
        """A plan of a version with one more section and one more key, neither of them None by default."""

        class LaterTrain(TrainConfig):
            patience: int = 3

        train: LaterTrain = Field(default_factory=lambda: Later.LaterTrain())
        pruning: LaterTrain = Field(default_factory=lambda: Later.LaterTrain())

    values = {**DOMAINS, "methods": ["lora"], "train": {"seed": 5}}
    assert plan_id(Later.model_validate(values)) == plan_id(Plan.model_validate(values))
    given = {**values, "train": {"seed": 5, "batch_size": 4}, "evaluate": {"confidence": 0.95}}  # defaults
    assert plan_id(Plan.model_validate(given)) == plan_id(Plan.model_validate(values))
    for section, key in (("train", {"epochs": 2}), ("evaluate", {"confidence": 0.9}), ("data", {"seed": 1})):
        other = {**values, section: {**values.get(section, {}), **key}}
        assert plan_id(Plan.model_validate(other)) != plan_id(Plan.model_validate(values))


def test_ids_are_what_they_were():
    """Another id means that whoever goes on with a sweep computes it anew: change these only with a word about it."""
    found = [run.id for run in runs(methods=["lora", "gain-ffn"], rates=[0.01], seeds=[5])]
    assert found == ["79b3fafc4b2d16a7", "6ec6237d56769c35"]


def test_a_grid_that_was_written_has_every_setting_and_stands_for_the_same_runs(tmp_path):
    for values in ({"methods": ["lora"], "rates": {"lora": [0.01, 0.02]}, "orders": 2}, {"seeds": [1, 2]}):
        grid = read_grid({"plan": DOMAINS, **values})
        (tmp_path / "grid.yaml").write_text(grid_yaml(grid))
        written = yaml.safe_load((tmp_path / "grid.yaml").read_text())
        assert written["plan"]["train"]["betas"] == [0.9, 0.999] and written["order_seed"] == 0
        assert planned_runs(read_grid(tmp_path / "grid.yaml")) == planned_runs(grid)


def test_ranks_are_for_methods_that_have_one_own_settings_win_and_rates_by_label_leave_other_defaults():
    methods = ["gain-ffn", "lora", {"name": "lora", "label": "fixed", "rank": 3, "lr": 0.5}]
    found = runs(methods=methods, ranks=[1, 4], rates=[0.01, 0.02])
    assert sorted((run.label, run.rank or 0, run.lr) for run in found) == [
        ("fixed", 3, 0.5), ("gain-ffn", 0, 0.01), ("gain-ffn", 0, 0.02),
        ("lora", 1, 0.01), ("lora", 1, 0.02), ("lora", 4, 0.01), ("lora", 4, 0.02),
    ]  # fmt: skip
    found = runs(methods=["gain-ffn", "full"], rates={"gain-ffn": [0.003, 0.03]})
    assert [(run.label, run.lr) for run in found] == [("gain-ffn", 0.003), ("gain-ffn", 0.03), ("full", 2e-5)]


def test_random_orders_begin_with_the_plan_s_and_more_of_them_with_the_same():
    orders = read_grid({"plan": DOMAINS, "orders": 6}).every_order
    assert orders[0] == ("law", "medical", "code") and len(set(orders)) == 6
    assert read_grid({"plan": DOMAINS, "orders": 4}).every_order == orders[:4]
    assert read_grid({"plan": DOMAINS, "orders": 4, "order_seed": 9}).every_order != orders[:4]


def test_a_missing_grid_and_a_repeated_key_are_named_by_file_and_line(tmp_path):
    file = tmp_path / "grid.yaml"
    file.write_text("seeds: [0, 1]\nmethods: [lora]\nseeds: [2]\n")
    refused(ConfigError, r"grid\.yaml:3: .*'seeds' stands there twice, first on line 1", read_grid, file)
    refused(ConfigError, r"none\.yaml: no such plan file", read_grid, tmp_path / "none.yaml")


@pytest.mark.parametrize(("values", "message"), [
    ({"seed": [1]}, "unknown key 'seed'; did you mean 'seeds'?"),
    ({"plan": {"data": {"domain": ["law"]}}}, "unknown key 'plan.data.domain'; did you mean 'domains'?"),
    ({"methods": ["lora", "lora"]}, "every label must be different"),
    ({"methods": ["lora"], "plan": {"methods": ["gain"]}}, "leave plan.methods out"),
    ({"methods": ["lora"], "rates": {"lroa": [1]}}, "no method is called 'lroa'"),
    ({"rates": [0.0]}, "greater than 0"),
    ({"orders": 7}, "3 domains have 6, not 7"),
    ({"orders": [["law", "code"]]}, "law, code is not an order of the plan's domains"),
    ({"orders": [["law", "code", "medical"]] * 2}, "each only once"),
    ({"seeds": [1, 1]}, "a value stands there twice"),
    ({"budgets": [100]}, "less than one block"),
    ({"methods": ["lroa"]}, "did you mean 'lora'"),
    ({"methods": [{"name": "gain", "rank": 4}]}, "has no option 'rank'"),
    ({"plan": {"data": {"task": "classify", "domains": ["sst2"]}}}, "perplexity, which a classifier has not"),
])  # fmt: skip
def test_mistakes_are_named(values, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        planned_runs(read_grid({"plan": DOMAINS, **values}))
