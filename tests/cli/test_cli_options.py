"""Options made from fields, options of methods and domains, and the help: groups, examples, one plan however given."""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

import pytest
import typer
from pydantic import Field, field_validator

from gaintune.cli import app
from gaintune.cli.options import Given, command, parse_method, plan_options
from gaintune.config import Flag, Plan, Section
from gaintune.errors import ConfigError
from support import refused
from support.cli import COMMANDS, run, words_of


def test_a_marked_field_is_an_option_of_every_command_that_takes_its_section():
    code = """if True:
        import json
        from gaintune.config import Flag, TrainConfig
        TrainConfig.model_fields["clip"].metadata.append(Flag())
        from support.cli import COMMANDS
        print(json.dumps([name for name, each in COMMANDS.items() if any(o.opts == ["--clip"] for o in each.params)]))
    """
    tests = Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tests.parent)
    assert json.loads(done.stdout) == ["sequence", "adapt", "estimate"]
    assert not any(o.opts == ["--clip"] for each in COMMANDS.values() for o in each.params)


def test_the_help_of_the_application_lists_every_command_under_a_heading():
    shown = run("--help", columns=80)
    headings = [line for line in shown.splitlines() if line.endswith("Commands:")]
    assert headings[0] == "Training Commands:" and len(headings) == len(set(headings)) > 3
    below = shown[shown.index(headings[0]) :]
    words = [line.split()[0] for line in below.splitlines() if line.startswith("  ")]
    assert sorted(words) == sorted(typer.main.get_command(app).commands)
    assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_help_has_its_options_in_groups_and_examples_that_can_be_typed(name):
    shown = run(*name.split(), "--help", columns=80)
    _, _, examples = shown.partition("\nExamples:\n")
    lines = [line.strip() for line in examples.splitlines()]
    assert lines and max(map(len, shown.splitlines())) <= 80
    parameters = COMMANDS[name].params
    if any("--plan" in option.opts for option in parameters):
        assert "\nPlan options:\n  --plan PLAN.yaml" in shown
    grouped = [option.rich_help_panel for option in parameters if option.rich_help_panel]
    assert all(f"\n{group} options:\n" in shown for group in grouped)
    for line in lines:
        words = shlex.split(line.partition(" > ")[0])
        words = words[words.index("gaintune") + 1 :]  # torchrun may stand before it
        assert words[: len(name.split())] == name.split()
        COMMANDS[name].make_context(name, words[len(name.split()) :])


@pytest.mark.parametrize(("command", "texts"), [
    ("sequence", ["Training tokens of a domain, at most. [default: 8192]", "[default: runs/sequence]"]),
    ("linear-model", ["in standard deviations. [default: 3.0]"]),
    ("gates", ["[default: runs/gates]", "[default: auto]"]),
    ("sweep", ["loky", "[default: runs/sweep]", "sweep.csv", "exit code 1", "--jobs", "--target"]),
])  # fmt: skip
def test_help_shows_defaults_units_and_files(command, texts):
    assert all(text in words_of(command) for text in texts)


def test_the_examples_of_the_application_can_be_typed():
    lines = typer.main.get_command(app).epilog.splitlines()
    for words in map(shlex.split, lines):
        COMMANDS[words[1]].make_context(words[1], words[2:])
    shown = run("--help")
    assert all(shown.index(line) < shown.index("Training Commands:") for line in lines)


def test_a_plan_is_given_by_position_or_by_option_but_once(tmp_path):
    file = tmp_path / "plan.yaml"
    file.write_text("train: {epochs: 3}\n")
    printed = run("config", file)
    assert "epochs: 3" in printed and run("config", "--plan", file) == printed
    for words in (("config", file), ("sequence", file), ("evaluate", file)):
        refused(ConfigError, r"two plans, .* give one, by position or with --plan", run, *words, "--plan", file)
    refused(ConfigError, "Name a model, such as demo, or give a plan with --plan", run, "evaluate", "--domain", "law")


def test_the_run_directory_has_a_name_that_torchrun_hands_on(capsys):
    from torch.distributed.run import parse_args

    for name in ("sequence", "demo", "sweep", "recipe run"):
        assert next(each for each in COMMANDS[name].params if "--run" in each.opts).opts == ["--run", "--run-dir"]
    words = ["-m", "gaintune", "sequence", "plan.yaml"]
    assert parse_args([*words, "--run-dir", "x"]).training_script_args == ["sequence", "plan.yaml", "--run-dir", "x"]
    with pytest.raises(SystemExit):
        parse_args([*words, "--run", "x"])
    assert "ambiguous option: --run" in capsys.readouterr().err


def test_methods_fit_a_terminal_and_are_printed_as_json():
    shown = run("methods", columns=80)
    assert max(map(len, shown.splitlines())) <= 80
    entries = {each["name"]: each for each in json.loads(run("methods", "--json"))}
    assert all(name in shown for name in entries)
    assert entries["lora"]["options"] == ["alpha", "intruders", "rank", "targets"]
    assert (entries["gain"]["lr"], entries["gain"]["peft_type"], entries["gain"]["merges"]) == (0.01, "GAIN", True)
    assert entries["full"]["peft_type"] is None
    assert not entries["disel"]["merges"] and not entries["osf"]["quantized_base"]


@pytest.mark.parametrize(("words", "message"), [
    ("evaluate demo --choices a.jsonl --block-size 64", "--block-size is for domains, and --choices"),
    ("evaluate demo --choices a.jsonl --text-column x", "--text-column is for domains, and"),
    ("evaluate demo --benchmarks piqa --task text", "--task is for domains: name some with --dom"),
    ("evaluate demo --benchmarks piqa --validation-tokens 512", "--validation-tokens is for domains"),
    ("evaluate demo --limit 5", "--limit is for benchmarks: name some with --benchmarks"),
    ("evaluate demo --no-cache", "--no-cache is for benchmarks: name some with --benchmarks"),
    ("assets --optional", "--optional goes with --fetch"),
    ("recipe run G8 --scale smoke --data x", "--data has no effect at scale smoke"),
])  # fmt: skip
def test_options_that_would_have_no_effect_are_refused(words, message):
    refused(ConfigError, message, run, *words.split())


class Settings(Section):
    """Options of a command of one's own."""

    bins: int = Field(default=100, gt=0, description="bins of a histogram")
    plane: bool = Field(default=False, description="measure a plane, too")
    line: Annotated[tuple[float, ...], Flag(metavar="T,T,...")] = Field(default=(0.0, 1.0), description="places")
    part: Annotated[list[str], Flag("component")] = Field(default=["mean"], description="what is shared; repeatable")
    which: Literal["auto", "all"] = Field(default="auto", description="tokens that count")
    limit: float | None = Field(default=None, description="end of a histogram, in nats")

    @field_validator("bins")
    @classmethod
    def _even(cls, value: int) -> int:
        if value % 2:
            raise ValueError("use an even number")
        return value


@pytest.fixture
def own():
    """An application of one command, and what it was called with."""
    seen = []
    application = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)

    @command(application, "measure", takes=("train.lr", "data.packing"), examples="gaintune measure x")
    def measure(given: Given, settings: Settings, adapter: list[Path], out: Path = Path("runs/x")) -> None:
        """Measure."""
        seen.append((given, settings, adapter, out))

    return application, seen


def test_fields_of_a_model_are_options_with_their_kinds_and_defaults(own):
    application, seen = own
    run("a", "b", application=application)
    given, settings, adapters, out = seen.pop()
    assert (given, settings, adapters, out) == (Given(), Settings(), [Path("a"), Path("b")], Path("runs/x"))
    words = shlex.split("--bins 20 --plane --line 0,0.5 --component x --component y --which all --limit 2 --lr 0.1")
    run("a", *words, "--set", "data.seed=4", "--out", "o", application=application)
    given, settings, _, out = seen.pop()
    assert settings == Settings(bins=20, plane=True, line=(0, 0.5), part=["x", "y"], which="all", limit=2)
    assert (given.plan().train.lr, given.plan().data.seed, out) == (0.1, 4, Path("o"))
    shown = run("--help", application=application)
    for text in ("Bins of a histogram. [default: 100]", "[default: 0.0,1.0]", "--component", "--line T,T,..."):
        assert text in shown
    assert "--no-plane" not in shown


@pytest.mark.parametrize(("words", "message"), [
    ("--bins 0", "--bins 0: Input should be greater than 0"),
    ("--bins 3", "--bins 3: use an even number"),
    ("--which some", "--which some: Input should be 'auto' or 'all'"),
    ("--line 1,x", "--line 1,x: write numbers with commas between them"),
])  # fmt: skip
def test_a_wrong_option_of_a_model_is_named_as_it_was_typed(own, words, message):
    refused(ConfigError, message, run, "a", *words.split(), application=own[0])


def test_a_base_of_an_adapter_travels_as_data_and_yields_to_what_a_person_gave(tmp_path, monkeypatch):
    from types import SimpleNamespace

    named = SimpleNamespace(name="some/base", revision="2024-08-01")
    monkeypatch.setattr("gaintune.adapters.claimed_base", lambda folder, record: named)
    monkeypatch.setattr("gaintune.adapters.read_record", lambda folder: SimpleNamespace(domains=["law"]))
    model = Given().on_base_of([tmp_path]).plan().model
    assert (model.name, model.revision) == ("some/base", "2024-08-01")
    model = Given(options={"model.name": "mine"}).on_base_of([tmp_path]).plan().model
    assert (model.name, model.revision) == ("mine", None)
    (tmp_path / "plan.yaml").write_text("{}")
    assert Given(tmp_path / "plan.yaml").on_base_of([tmp_path]).on_domains_of([tmp_path]).plan() == Plan()
    (domain,) = Given().on_domains_of([tmp_path]).plan().data.domains
    assert domain.name == "law"


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
    assert [each.label for each in methods_of(method=["lora", "lora:penalty=l2"])] == ["lora", "lora-l2"]
    (default,) = methods_of(penalty="ewc")
    assert (default.name, default.penalty) == ("gain-ffn", "ewc")


def test_a_domain_of_the_catalogue_is_of_its_own_task_on_the_command_line():
    def tasks(assignments=(), **given):
        plan = assemble(None, assignments, **given)
        return {domain.name: plan.data.task_of(domain) for domain in plan.data.measured}

    mixed = {"law": "text", "gsm8k": "instruct"}
    assert tasks(domain=["law"], watch=["gsm8k"]) == mixed
    assert tasks(domain=["gsm8k"], watch=["law"], task="instruct") == mixed
    assert tasks(domain=["gsm8k"], watch=["law"], assignments=["data.task=instruct"]) == mixed
    local = tasks(domain=["mine=rows.jsonl", "law=text.txt"], task="instruct")
    assert local == dict.fromkeys(("mine", "law"), "instruct")
    assert assemble(domain=["law", "gsm8k"]).data.domains[0].task is None


def test_a_task_that_no_domain_of_the_catalogue_has_is_refused(caplog):
    for task, domain, own in (("instruct", "law", "text"), ("text", "gsm8k", "instruct")):
        refused(ConfigError, rf"task {task} has no effect.* {domain} \({own}\)", assemble, domain=[domain], task=task)
    with pytest.raises(ConfigError, match="task instruct has no effect"):
        assemble(None, ["data.task=instruct"], domain=["law"], watch=["code"])
    for given in ({"watch": ["gsm8k"]}, {"domain": ["mine.jsonl"], "watch": ["law"]}, {"domain": ["gsm8k"]}):
        assemble(**given, task="text" if given.keys() == {"watch"} else "instruct")
    assert not caplog.text
    assemble(domain=["mine.jsonl", "law"], task="instruct")
    assert "task instruct is not for every domain, these keep their own: law (text)" in caplog.text


@pytest.mark.parametrize(("text", "message"), [
    ("lora:penalty=l1", "methods.0.penalty"),
    ("lora:penalty_strength=2", "penalty_strength is given without a penalty"),
    ("lora:replay=-1", "methods.0.replay"),
    ("lora:rank=2,rank=4", "rank is given twice"),
])  # fmt: skip
def test_mistakes_are_named(text, message):
    refused(ConfigError, message, methods_of, method=[text])


def test_a_text_column_is_laid_over_every_local_domain(tmp_path):
    file = tmp_path / "plan.yaml"
    file.write_text("data: {domains: [law, notes=./notes.csv]}\n")
    for plan, given in ((file, {}), (None, {"domain": ["law", "notes=./notes.csv"]})):
        found = assemble(plan, **given, text_column="body").data.domains
        assert [(each.name, each.text_column) for each in found] == [("law", None), ("notes", "body")]
    for domains in (None, ["law", "mrpc"]):
        with pytest.raises(ConfigError, match="--text-column names a column of local files"):
            assemble(text_column="body", **({"domain": domains} if domains else {}))


def test_one_method_in_a_plan_takes_options_for_every_method(tmp_path):
    file = tmp_path / "plan.yaml"
    file.write_text("methods: lora\n")
    (method,) = assemble(file, penalty="l2").methods
    assert (method.name, method.penalty) == ("lora", "l2")


@pytest.mark.parametrize(("option", "names"), [
    ("--text-column", ("sequence", "adapt", "evaluate", "merge")),
    *((option, ("sequence", "adapt")) for option in ("--penalty", "--penalty-strength", "--replay")),
])  # fmt: skip
def test_commands_take_options_of_domains_and_methods(option, names):
    assert all(option in words_of(command) for command in names)


@pytest.mark.parametrize("text", ["methods: 5", "methods: [5]", "methods: {rank: 2}", "data: {domains: 5}"])
def test_a_broken_plan_is_refused_in_words_beside_options_for_every_entry(tmp_path, text):
    (tmp_path / "plan.yaml").write_text(text)
    option = {"penalty": "l2"} if "methods" in text else {"text_column": "body"}
    refused(ConfigError, text.partition(":")[0], assemble, tmp_path / "plan.yaml", **option)


def test_options_of_a_method_are_keys_in_a_plan_file(tmp_path):
    (tmp_path / "plan.yaml").write_text("methods: ['lora:rank=2']")
    for values in ({}, {"penalty": "l2"}):
        refused(ConfigError, r"lora:rank=2|options are keys", assemble, tmp_path / "plan.yaml", **values)


def test_the_seed_leaves_the_split_alone():
    """An adapter trained with another seed must not be measured on its own training documents."""
    plan = assemble(seed=3)
    assert (plan.data.seed, plan.train.seed, plan.evaluate.seed) == (0, 3, 3)
    assert assemble(None, ["data.seed=5"], seed=3).data.seed == 5
