"""`gaintune recipe` as a person types it: the list, one recipe's page, a run with its verdicts, and refusals."""

import pytest
import yaml
from typer.testing import CliRunner

from gaintune.cli import app
from gaintune.errors import ConfigError
from gaintune.recipes import recipe_named, recipes
from support import refused

MINE = {
    "id": "MINE",
    "title": "A model of two lines",
    "source": "my notebook",
    "asks": "Does it run?",
    "model": "none",
    "steps": [
        {
            "name": "model",
            "do": "linear-model",
            "settings": {"dimension": 4, "rank": 1, "steps": 5, "seeds": 2, "batch_size": 16},
        }
    ],
    "claims": [{"says": "it ends", "number": "model.LoRA.to_fixed", "expect": {"above": 0}}],
}


def run(*arguments) -> str:
    """What a command prints; raises what it raises."""
    done = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(app, ["recipe", *map(str, arguments)])
    if done.exception is not None:
        raise done.exception
    return done.stdout


def test_the_list_has_every_experiment_of_both_papers():
    said = run("list")
    assert len(recipes()) == 24
    assert all(name in said for name in (*(f"G{number}" for number in range(1, 20)), "D1", "D2", "D3", "D4", "D5"))


def test_an_experiment_is_shown_with_its_steps_scales_and_claims():
    said = run("show", "g14")
    found = recipe_named("G14")
    assert f"step {found.steps[0].name} (sweep)" in said
    assert "at scale small" in said
    assert all(claim.number in said for claim in found.claims)


def test_a_file_of_ones_own_runs_and_says_its_verdicts(tmp_path):
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(MINE))
    said = run("run", tmp_path / "mine.yaml", "--scale", "smoke", "--run", tmp_path / "out")
    assert "it ends" in said and "reproduced" in said
    assert f"results {tmp_path / 'out' / 'results.md'}" in said
    assert (tmp_path / "out" / "results.csv").is_file()


@pytest.mark.parametrize(("arguments", "message"), [
    (("--scale", "tiny"), "--scale tiny: use smoke, small, paper"),
    (("--scale", "smoke", "--set", "train.seed=1"), "no step of it has a plan"),
    (("--data", "/nowhere/at/all"), "no such folder"),
])  # fmt: skip
def test_a_wrong_run_is_refused_in_words(arguments, message, tmp_path):
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(MINE))
    refused(ConfigError, message, run, "run", tmp_path / "mine.yaml", "--run", tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()
