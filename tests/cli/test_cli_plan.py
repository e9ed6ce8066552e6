"""Options of methods on the command line: in a method's own words, or for every method at once."""

import pytest
from typer.testing import CliRunner

from gaintune.cli import app
from gaintune.cli.options import Given, parse_method, plan_options
from gaintune.errors import ConfigError

OPTIONS = {each.parameter: each for each in plan_options(["model", "data", "methods", "train", "evaluate"])}


def assemble(file=None, assignments=(), **values):
    """The plan of a file, options by the names of their parameters, and assignments."""
    options = {key: value for name, value in values.items() for key in OPTIONS[name].keys}
    return Given(file, options, assignments).plan()


def methods_of(**values):
    return assemble(**values).methods


def test_a_method_carries_its_options_in_its_own_words():
    (method,) = methods_of(method=["lora:rank=16,penalty=ewc,penalty_strength=1,ewc_rows=8,replay=0.25,label=mine"])
    assert (method.label, method.rank) == ("mine", 16)
    assert (method.penalty, method.penalty_strength, method.ewc_rows, method.replay) == ("ewc", 1.0, 8, 0.25)
    (plus,) = methods_of(method=["lora+:lr_ratio=4"])
    assert (plus.name, plus.label, plus.lr_ratio) == ("lora+", "lora-plus", 4.0)
    assert parse_method("lora:targets=q_proj+v_proj")["targets"] == ["q_proj", "v_proj"]


def test_options_for_every_method_are_laid_over_each():
    found = methods_of(method=["gain-ffn", "lora:rank=2,penalty=ewc"], penalty="l2", penalty_strength=0.5, replay=0.1)
    assert [(each.penalty, each.penalty_strength, each.replay) for each in found] == [("l2", 0.5, 0.1)] * 2
    assert [each.label for each in found] == ["gain-ffn-l2-replay", "lora-l2-replay"]
    (default,) = methods_of(penalty="ewc")
    assert (default.name, default.penalty) == ("gain-ffn", "ewc")


def test_the_same_method_stands_beside_itself_with_a_penalty():
    assert [each.label for each in methods_of(method=["lora", "lora:penalty=l2"])] == ["lora", "lora-l2"]


def test_a_domain_of_the_catalogue_is_of_its_own_task_on_the_command_line():
    def tasks(assignments=(), **given):
        plan = assemble(None, assignments, **given)
        return {domain.name: plan.data.task_of(domain) for domain in plan.data.measured}

    mixed = {"law": "text", "gsm8k": "instruct"}
    assert tasks(domain=["law"], watch=["gsm8k"]) == mixed
    assert tasks(domain=["gsm8k"], watch=["law"], task="instruct") == mixed
    assert tasks(domain=["gsm8k"], watch=["law"], assignments=["data.task=instruct"]) == mixed
    assert tasks(domain=["mine=rows.jsonl", "law=text.txt"], task="instruct") == dict.fromkeys(
        ("mine", "law"), "instruct"
    )
    assert assemble(domain=["law", "gsm8k"]).data.domains[0].task is None


def test_a_task_that_no_domain_of_the_catalogue_has_is_refused(caplog):
    for task, domain, own in (("instruct", "law", "text"), ("text", "gsm8k", "instruct")):
        with pytest.raises(ConfigError, match=rf"task {task} has no effect.* {domain} \({own}\)"):
            assemble(domain=[domain], task=task)
    with pytest.raises(ConfigError, match="task instruct has no effect"):
        assemble(None, ["data.task=instruct"], domain=["law"], watch=["code"])
    for given in ({"watch": ["gsm8k"]}, {"domain": ["mine.jsonl"], "watch": ["law"]}, {"domain": ["gsm8k"]}):
        assemble(**given, task="text" if given.keys() == {"watch"} else "instruct")
    assert not caplog.text
    assemble(domain=["mine.jsonl", "law"], task="instruct")
    assert "task instruct is not for every domain, these keep their own: law (text)" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora:penalty=l1", "methods.0.penalty"),
        ("lora:penalti=l2", "did you mean 'penalty'"),
        ("lora:penalty_strength=2", "penalty_strength is given without a penalty"),
        ("lora:replay=-1", "methods.0.replay"),
        ("lora:rank=2,rank=4", "rank is given twice"),
    ],
)
def test_mistakes_are_named(text, message):
    with pytest.raises(ConfigError, match=message):
        methods_of(method=[text])


def test_a_text_column_is_laid_over_every_local_domain(tmp_path):
    file = tmp_path / "plan.yaml"
    file.write_text("data: {domains: [law, notes=./notes.csv]}\n")
    for plan, given in ((file, {}), (None, {"domain": ["law", "notes=./notes.csv"]})):
        found = assemble(plan, **given, text_column="body").data.domains
        assert [(each.name, each.text_column) for each in found] == [("law", None), ("notes", "body")]
    for domains in (None, ["law", "mrpc"]):
        with pytest.raises(ConfigError, match="--text-column names a column of local files"):
            assemble(text_column="body", **({"domain": domains} if domains else {}))


@pytest.mark.parametrize("command", ["sequence", "adapt", "evaluate", "merge"])
def test_commands_take_a_text_column(command):
    assert "--text-column" in CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).output


def test_one_method_in_a_plan_takes_options_for_every_method(tmp_path):
    file = tmp_path / "plan.yaml"
    file.write_text("methods: lora\n")
    (method,) = assemble(file, penalty="l2").methods
    assert (method.name, method.penalty) == ("lora", "l2")


@pytest.mark.parametrize("command", ["sequence", "adapt"])
def test_both_commands_take_them(command):
    told = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).output
    for option in ("--penalty", "--penalty-strength", "--replay"):
        assert option in told


@pytest.mark.parametrize("text", ["methods: 5", "methods: [5]", "methods: {rank: 2}", "data: {domains: 5}"])
def test_a_broken_plan_is_refused_in_words_beside_options_for_every_entry(tmp_path, text):
    (tmp_path / "plan.yaml").write_text(text)
    option = {"penalty": "l2"} if "methods" in text else {"text_column": "body"}
    with pytest.raises(ConfigError, match=text.partition(":")[0]):
        assemble(tmp_path / "plan.yaml", **option)


def test_options_of_a_method_are_keys_in_a_plan_file(tmp_path):
    (tmp_path / "plan.yaml").write_text("methods: ['lora:rank=2']")
    for values in ({}, {"penalty": "l2"}):
        with pytest.raises(ConfigError, match=r"lora:rank=2|options are keys"):
            assemble(tmp_path / "plan.yaml", **values)


def test_the_seed_leaves_the_split_alone():
    """An adapter trained with another seed must not be measured on its own training documents."""
    plan = assemble(seed=3)
    assert (plan.data.seed, plan.train.seed, plan.evaluate.seed) == (0, 3, 3)
    assert assemble(None, ["data.seed=5"], seed=3).data.seed == 5
