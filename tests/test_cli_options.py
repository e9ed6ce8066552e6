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

from gaintune.cli.app import app
from gaintune.cli.options import Given, command
from gaintune.config import Flag, Plan, Section
from gaintune.errors import ConfigError

PORTED_LATER = "tokens", "landscape", "transfer", "retention", "gates", "linear-model", "gains", "subspace"


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
