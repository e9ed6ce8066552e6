"""Every recipe at scale paper, by the program itself: the papers' ids and plans, over tiny models and data sets.

A hub on this machine has what the recipes name, under the same ids, in the same layouts. What repeats the same thing
(epochs, seeds, orders, and rates or ranks between the ends) is cut. `make test-slow` runs the plans as they are.
"""

import csv
import json

import pytest
import yaml

from gaintune.recipes import ScaleSetup, recipes
from gaintune.recipes.preflight import hub_needs
from support import paper_hub
from support.hub import LocalHub
from support.rehearsal import Shell

HERE = ("--set", "model.dtype=fp32", "--set", "model.device=cpu", "--set", "evaluate.bootstrap_samples=50")
REPEATED = ("seeds", "rates", "ranks")
LONG = ("G11", "G16", "G19", "D2", "D3", "D5")  # `make test-paper` runs these
NAMES = [pytest.param(name, marks=[pytest.mark.slow] if name in LONG else []) for name in recipes()]


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


def shortened(settings: dict) -> dict:
    """Return a step's settings with two of what is repeated."""
    changes = {key: [settings[key][0], settings[key][-1]] for key in REPEATED if isinstance(settings.get(key), list)}
    if isinstance(settings.get("orders"), int):
        changes["orders"] = 2
    return {**settings, **changes}


def fetched(hub: LocalHub) -> set[str]:
    """Return the repositories that files were requested of, and take them off the hub's list."""
    paths, hub.requested[:] = [*hub.requested], []
    return {path.partition("/resolve/")[0].removeprefix("/") for path in paths if "/resolve/" in path}


def needed(recipe, scratch) -> set[str]:
    """Return the repositories that the look before step 1 says a recipe reads."""
    needs = hub_needs(recipe, ScaleSetup.make("paper", recipe.model, None, {}, scratch))
    return {need.name if need.kind == "model" else f"datasets/{need.name}" for need in needs}


def rehearse(recipe, hub: LocalHub, shell: Shell, folder, *more: object) -> None:
    """Run a recipe, check that it ends with all it promises, and that it read what was looked up before."""
    hub.requested.clear()
    words = ("--scale", "paper", "--run-dir", folder, "--allow-code-execution", *HERE)
    code, output = shell.run("recipe", "run", *more, *words)
    assert code == 0, output
    assert "Traceback" not in output
    page = (folder / "results.md").read_text(encoding="utf-8")
    for step in recipe.steps:
        assert f"## {step.name}\n" in page and "left out" not in page
    assert page.count("\n| ") > len(recipe.claims), "its tables"
    with (folder / "results.csv").open(encoding="utf-8", newline="") as file:
        numbers = {f"{row['step']}.{row['number']}" for row in csv.DictReader(file)}
    record = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert {claim["number"] for claim in record["claims"]} <= numbers | set(record["without"])
    names = {each.partition("/resolve/")[0] for each in needed(recipe, folder)}
    assert fetched(hub) <= names, "all that is read was looked up"


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_runs_at_scale_paper(name, hub, shell, tmp_path):
    recipe = recipes()[name]
    values = recipe.model_dump(mode="json", exclude_defaults=True)
    values["steps"] = [{**step, "settings": shortened(step.get("settings", {}))} for step in values["steps"]]
    file = tmp_path / f"{name}.yaml"
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    rehearse(recipe, hub, shell, tmp_path / "run", file, *([] if name == "D1" else ["--set", "train.epochs=1"]))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", list(recipes()))
def test_a_recipe_runs_at_scale_paper_as_it_is(name, hub, shell, tmp_path):
    rehearse(recipes()[name], hub, shell, tmp_path / "run", name)


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
