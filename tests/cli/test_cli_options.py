"""Options made from fields, and the help: groups, examples that can be typed, one plan however it is given."""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

import pytest
import typer
from pydantic import Field, field_validator
from typer.testing import CliRunner

from gaintune.cli import app
from gaintune.cli.options import Given, command
from gaintune.config import Flag, Plan, Section
from gaintune.errors import ConfigError


def commands(group=None, path=()):
    """Every command that runs something, by its words."""
    group = group or typer.main.get_command(app)
    for name, each in group.commands.items():
        yield from commands(each, (*path, name)) if hasattr(each, "commands") else [((*path, name), each)]


COMMANDS = {" ".join(path): each for path, each in commands()}


def run(*arguments, application=app, columns=200) -> str:
    environment = {"COLUMNS": str(columns), "NO_COLOR": "1"}
    done = CliRunner(env=environment).invoke(application, [str(each) for each in arguments])
    if done.exception is not None:
        raise done.exception
    return done.stdout


def test_a_marked_field_is_an_option_of_every_command_that_takes_its_section():
    code = """if True:
        import json
        from gaintune.config import Flag, TrainConfig
        TrainConfig.model_fields["clip"].metadata.append(Flag())
        from test_cli_options import COMMANDS
        print(json.dumps([name for name, each in COMMANDS.items() if any(o.opts == ["--clip"] for o in each.params)]))
    """
    tests = Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tests)
    assert json.loads(done.stdout) == ["sequence", "adapt"]
    assert not any(o.opts == ["--clip"] for each in COMMANDS.values() for o in each.params)


def test_the_help_of_the_application_lists_every_command_under_a_heading():
    told = run("--help", columns=80)
    headings = [line for line in told.splitlines() if line.endswith("Commands:")]
    assert headings[0] == "Training Commands:" and len(headings) == len(set(headings)) > 3
    below = told[told.index(headings[0]) :]
    words = [line.split()[0] for line in below.splitlines() if line.startswith("  ")]
    assert sorted(words) == sorted(typer.main.get_command(app).commands)
    assert max(map(len, told.splitlines())) <= 80


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_help_has_its_options_in_groups_and_examples_that_can_be_typed(name):
    told = run(*name.split(), "--help", columns=80)
    _, _, examples = told.partition("\nExamples:\n")
    lines = [line.strip() for line in examples.splitlines()]
    assert lines
    assert max(map(len, told.splitlines())) <= 80
    parameters = COMMANDS[name].params
    if any("--plan" in option.opts for option in parameters):
        assert "\nPlan options:\n  --plan PLAN.yaml" in told
    grouped = [option.rich_help_panel for option in parameters if option.rich_help_panel]
    assert all(f"\n{group} options:\n" in told for group in grouped)
    for line in lines:
        words = shlex.split(line.partition(" > ")[0])
        words = words[words.index("gaintune") + 1 :]  # torchrun may stand before it
        assert words[: len(name.split())] == name.split()
        COMMANDS[name].make_context(name, words[len(name.split()) :])


def test_the_examples_of_the_application_can_be_typed():
    lines = typer.main.get_command(app).epilog.splitlines()
    for words in map(shlex.split, lines):
        COMMANDS[words[1]].make_context(words[1], words[2:])
    told = run("--help")
    assert all(told.index(line) < told.index("Training Commands:") for line in lines)


def test_a_plan_is_given_by_position_or_by_option_but_once(tmp_path):
    file = tmp_path / "plan.yaml"
    file.write_text("train: {epochs: 3}\n")
    printed = run("config", file)
    assert "epochs: 3" in printed and run("config", "--plan", file) == printed
    for words in (("config", file), ("sequence", file), ("evaluate", file)):
        with pytest.raises(ConfigError, match=r"two plans, .* give one, by position or with --plan"):
            run(*words, "--plan", file)
    with pytest.raises(ConfigError, match="Name a model, such as demo, or give a plan with --plan"):
        run("evaluate", "--domain", "law")


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
    told = run("methods", columns=80)
    assert max(map(len, told.splitlines())) <= 80
    entries = {each["name"]: each for each in json.loads(run("methods", "--json"))}
    assert all(name in told for name in entries)
    assert entries["lora"]["options"] == ["alpha", "rank", "targets"]
    assert (entries["gain"]["lr"], entries["gain"]["peft_type"], entries["gain"]["merges"]) == (0.01, "GAIN", True)
    assert (entries["full"]["peft_type"], entries["disel"]["merges"], entries["osf"]["quantized_base"]) == (
        None,
        False,
        False,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("evaluate", "demo", "--choices", "a.jsonl", "--block-size", 64),
            "--block-size is for domains, and --choices",
        ),
        (("evaluate", "demo", "--choices", "a.jsonl", "--text-column", "x"), "--text-column is for domains, and"),
        (("evaluate", "demo", "--benchmarks", "piqa", "--task", "text"), "--task is for domains: name some with --dom"),
        (
            ("evaluate", "demo", "--benchmarks", "piqa", "--validation-tokens", 512),
            "--validation-tokens is for domains",
        ),
        (("evaluate", "demo", "--limit", 5), "--limit is for benchmarks: name some with --benchmarks"),
        (("evaluate", "demo", "--no-cache"), "--no-cache is for benchmarks: name some with --benchmarks"),
        (("assets", "--optional"), "--optional goes with --fetch"),
        (("recipe", "run", "G8", "--scale", "smoke", "--data", "x"), "--data has no effect at scale smoke"),
    ],
)
def test_options_that_would_have_no_effect_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        run(*arguments)


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
    told = run("--help", application=application)
    for text in ("Bins of a histogram. [default: 100]", "[default: 0.0,1.0]", "--component", "--line T,T,..."):
        assert text in told
    assert "--no-plane" not in told


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--bins 0", "--bins 0: Input should be greater than 0"),
        ("--bins 3", "--bins 3: use an even number"),
        ("--which some", "--which some: Input should be 'auto' or 'all'"),
        ("--line 1,x", "--line 1,x: write numbers with commas between them"),
    ],
)
def test_a_wrong_option_of_a_model_is_named_as_it_was_typed(own, words, message):
    with pytest.raises(ConfigError, match=message):
        run("a", *words.split(), application=own[0])


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
