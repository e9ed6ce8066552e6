"""Every recipe at scale paper, by the program itself: the papers' ids and plans, over tiny models and data sets.

A hub on this machine has what the recipes name, under the same ids, in the same layouts. `make test-paper` runs those
that take longer.
"""

import csv
import json
from pathlib import Path

import pytest

from gaintune.recipes import ScaleSetup, recipes
from gaintune.recipes.preflight import hub_needs
from support import paper_hub
from support.hub import LocalHub
from support.rehearsal import Shell

STUDIES = Path(__file__).parents[2] / "studies"
ON_CPU = ("model.dtype=fp32", "model.device=cpu", "model.quantization=null")  # its 4-bit weights change when measured
HERE = tuple(word for value in (*ON_CPU, "evaluate.bootstrap_samples=50") for word in ("--set", value))
SHORT = ("G4", "G8", "G10", "G15", "G17")  # `make test-paper` runs the others
NAMES = [pytest.param(name, marks=[] if name in SHORT else [pytest.mark.slow]) for name in recipes()]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    paper_hub.write(root)
    with LocalHub(root) as served:
        yield served


@pytest.fixture(scope="module")
def shell(hub, tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    made = Shell(hub.environment(home / "hub", GAINTUNE_CACHE=str(home / "cache")), home)
    yield made
    made.close()


def fetched(hub: LocalHub) -> set[str]:
    """Return the repositories that files were requested of, and take them off the hub's list."""
    paths, hub.requested[:] = [*hub.requested], []
    return {path.partition("/resolve/")[0].removeprefix("/") for path in paths if "/resolve/" in path}


def needed(recipe, scratch, overrides) -> set[str]:
    """Return the repositories that the look before step 1 says a recipe reads."""
    setup = ScaleSetup.make("paper", recipe.model, None, overrides, scratch)
    needs = hub_needs(recipe.at("paper", one_base="model" in overrides), setup)
    return {need.name if need.kind == "model" else f"datasets/{need.name}" for need in needs}


def rehearse(recipe, hub: LocalHub, shell: Shell, folder, *more: object, overrides=None) -> None:
    """Run a recipe, check that it ends with all it promises, and that it read what was looked up before."""
    hub.requested.clear()
    here = HERE if recipe.model != "none" else ()
    words = ("--scale", "paper", "--run-dir", folder, "--allow-code-execution", *here)
    code, output = shell.run("recipe", "run", *more, *words)
    assert code == 0, output
    assert "Traceback" not in output
    page = (folder / "results.md").read_text(encoding="utf-8")
    steps = recipe.at("paper", one_base="model" in (overrides or {})).steps
    assert all(f"## {step.name}\n" in page for step in steps)
    assert page.count("\n| ") > len(recipe.claims), "its tables"
    with (folder / "results.csv").open(encoding="utf-8", newline="") as file:
        numbers = {f"{row['step']}.{row['number']}" for row in csv.DictReader(file)}
    record = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert not [note for notes in record["notes"].values() for note in notes if note.startswith("left out:")]
    assert {claim["number"] for claim in record["claims"]} <= numbers | set(record["without"])
    assert fetched(hub) <= needed(recipe, folder, overrides or {}), "all that is read was looked up"


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_runs_at_scale_paper(name, hub, shell, tmp_path):
    rehearse(recipes()[name], hub, shell, tmp_path / "run", name)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("file", sorted(STUDIES.glob("*.yaml")), ids=lambda file: file.stem)
def test_a_study_runs_at_scale_smoke(file, shell, tmp_path):
    code, output = shell.run("recipe", "run", file, "--scale", "smoke", "--run-dir", tmp_path / "run")
    assert code == 0, output
    assert (tmp_path / "run" / "results.md").exists()


def test_another_of_the_papers_models_takes_the_place_of_the_first(hub, shell, tmp_path):
    name = "Qwen/Qwen2.5-7B"
    words = ("G15", "--set", f"model.name={name}", "--set", "train.epochs=1")
    rehearse(recipes()["G15"], hub, shell, tmp_path / "run", *words, overrides={"model": {"name": name}})
    assert name in needed(recipes()["G15"], tmp_path, {"model": {"name": name}})


def test_a_recipe_that_was_fetched_runs_without_the_hub(hub, shell, tmp_path_factory):
    """G10 streams nothing, so that the cache of its first run is enough."""
    folder = tmp_path_factory.mktemp("offline")
    words = ("recipe", "run", "G10", "--scale", "paper", *HERE, "--set", "train.epochs=1", "--run-dir")
    code, output = shell.run(*words, folder / "first")
    assert code == 0, output
    hub.requested.clear()
    alone = Shell({**shell.environment, "HF_HUB_OFFLINE": "1"}, folder)
    code, output = alone.run(*words, folder / "second")
    alone.close()
    assert code == 0, output
    assert not hub.requested
    assert (folder / "first/results.csv").read_bytes() == (folder / "second/results.csv").read_bytes()
