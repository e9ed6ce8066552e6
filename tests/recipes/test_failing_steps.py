"""A step that fails leaves the others their results, and its folder continues once what was wrong is corrected."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from gaintune.errors import ConfigError, RunDirectoryError
from gaintune.progress import Silent
from gaintune.recipes import run_recipe
from support import refused, tiny_base
from support.cli import gaintune, refusal
from support.files import contents
from support.tiny_recipes import recipe

pytestmark = pytest.mark.usefixtures("unrendered")

LEARNS = {"domains": ["pubmedqa"], "methods": [{"name": "gain", "lr": 0.01}]}
CLAIMS = [
    {"says": f"{number} is a number", "number": number, "expect": {"below": 1e6}}
    for number in ("first.gain.in_domain", "second.gain.in_domain", "look.gain.smallest", "third.gain.in_domain")
]
HISTORY = {"events.jsonl"}  # what happened, and when


def three_steps(base: Path):
    """Return a recipe whose second step has a base of its own, with an analysis of it."""
    second = {**LEARNS, "model": {"name": str(base)}}
    steps = ("first", "sequence", LEARNS), ("second", "sequence", second)
    return recipe(*steps, ("look", "gains", {"of": "second"}), ("third", "sequence", LEARNS), claims=CLAIMS)


def undisturbed(made, tmp_path, **options) -> Path:
    """Run a recipe without a disturbance, in the folder that is to be compared with it, and move that away."""
    result = run_recipe(made, tmp_path / "run", scale="smoke", **options)
    assert result.failed == {} and "failed" not in json.loads((tmp_path / "run" / "results.json").read_text())
    return result.folder.rename(tmp_path / "undisturbed")


@pytest.fixture
def base(tmp_path):
    return tiny_base.folder(tmp_path / "base")


def command(made, tmp_path, *options):
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(made.model_dump(mode="json")))
    return gaintune("recipe", "run", tmp_path / "mine.yaml", "--scale", "smoke", "--run", tmp_path / "run", *options)


def with_nan(base: Path) -> None:
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, base / "model.safetensors", {"format": "pt"})


def without_weights(base: Path) -> None:
    (base / "model.safetensors").unlink()


def work(folder: Path) -> dict[Path, int]:
    """Return when each file was written that is trained or measured."""
    names = ("metrics.json", "gains.csv", "adapter_model.safetensors")
    return {file: file.stat().st_mtime_ns for name in names for file in folder.rglob(name)}


@pytest.mark.parametrize(("spoil", "reason"), [
    (with_nan, "the base's own loss on pubmedqa is not finite"), (without_weights, "base")
])  # fmt: skip
def test_a_broken_base_costs_its_step_and_a_repaired_one_gives_it_back(spoil, reason, base, tmp_path):
    made, folder = three_steps(base), tmp_path / "run"
    reference = undisturbed(made, tmp_path)
    whole = shutil.copytree(base, tmp_path / "whole")
    spoil(base)

    message = refusal(command(made, tmp_path), code=1).partition("error:")[2]
    assert "1 step failed" in message and "second: " in message and reason in message
    written = json.loads((folder / "results.json").read_text())
    assert list(written["failed"]) == ["second"] and reason in written["failed"]["second"]
    assert [claim["verdict"] for claim in written["claims"]] == ["reproduced", *["undecided"] * 2, "reproduced"]
    assert {name.partition(".")[0] for name in written["numbers"]} == {"first", "third"}
    assert "not run: it works on step second, which failed" in written["notes"]["look"]
    assert "Failed: second." in (folder / "results.md").read_text()

    kept, results = work(folder), (folder / "results.json").read_bytes()
    assert refusal(command(made, tmp_path), code=1).endswith(message)
    assert (folder / "results.json").read_bytes() == results
    assert work(folder) == kept
    assert (folder / "first" / "events.jsonl").read_text().count("learnt") == 1

    shutil.copytree(whole, base, dirs_exist_ok=True)
    assert command(made, tmp_path).returncode == 0
    assert contents(folder, HISTORY) == contents(reference, HISTORY)


def test_a_key_of_one_step_corrects_it_and_leaves_the_others_as_they_were(base, tmp_path):
    whole = shutil.copytree(base, tmp_path / "whole")
    with_nan(base)
    made, correction = three_steps(base), {"second": {"model": {"name": str(whole)}, "train": {"seed": 3}}}
    reference = undisturbed(made, tmp_path, overrides=correction)
    assert list(run_recipe(made, tmp_path / "run", scale="smoke").failed) == ["second"]
    assert list(run_recipe(made, tmp_path / "run", scale="smoke", overrides={"second": {}}).failed) == ["second"]
    options = ("--set", f"second.model.name={whole}", "--set", "second.train.seed=3")
    assert command(made, tmp_path, *options).returncode == 0
    assert contents(tmp_path / "run", HISTORY) == contents(reference, HISTORY)
    seeds = {
        step: yaml.safe_load((tmp_path / "run" / step / "plan.yaml").read_text())["train"]["seed"]
        for step in ("first", "second", "third")
    }
    assert seeds == {"first": 0, "second": 3, "third": 0}


def test_keys_that_change_the_plan_of_finished_work_are_refused_and_nothing_is_lost(base, tmp_path):
    with_nan(base)
    made = three_steps(base)
    assert command(made, tmp_path).returncode == 1
    before = contents(tmp_path / "run")
    for options, words in (
        (("--set", "train.seed=1"), "step first holds work that was finished with another plan (train.seed: 0 there"),
        (("--set", "train.lr=0.5"), "finished with another plan (train.lr: nothing there, 0.5 now"),
        (("--set", "third.model.quantization=4bit"), "step third holds work that was finished with another plan"),
        (("--set", "train.batch_size=2"), "train.batch_size: 4 there, 2 now"),
    ):
        message = refusal(command(made, tmp_path, *options))
        assert words in message and "name another folder, or delete " in message
        assert contents(tmp_path / "run") == before


def test_keys_that_leave_the_numbers_alone_may_change_at_any_time(base, tmp_path):
    made, folder = three_steps(base), tmp_path / "run"
    run_recipe(made, folder, scale="smoke")
    results = (folder / "results.json").read_bytes()
    done = work(folder)
    assert len(done) == 3 * 2 + 1
    halves = {"train": {"batch_size": 2, "gradient_accumulation": 2}, "evaluate": {"batch_size": 1}}
    for overrides in ({**halves, "third": {"train": {"gradient_checkpointing": True}}}, {}):
        assert run_recipe(made, folder, scale="smoke", overrides=overrides).failed == {}
        assert json.loads((folder / "recipe.json").read_text())["overrides"] == overrides
        assert (folder / "results.json").read_bytes() == results
    assert work(folder) == done
    events = [json.loads(line) for line in (folder / "third" / "events.jsonl").read_text().splitlines()]
    (first, second) = (event["differences"] for event in events if event["event"] == "plan changed")
    assert "train.gradient_checkpointing: False there, True now" in first and len(first) == len(second) == 4


def test_an_unexpected_error_leaves_its_traceback_in_the_steps_folder(base, tmp_path):
    made, folder = three_steps(base), tmp_path / "run"
    run_recipe(made, folder, scale="smoke")
    results = (folder / "results.json").read_bytes()
    (folder / "look" / "gains.md").unlink()
    (folder / "look" / "gains.md").mkdir()  # in the way of the table
    (folder / "look" / "outcome.json").unlink()
    result = run_recipe(made, folder, scale="smoke")
    assert list(result.failed) == ["look"] and "(traceback: look/traceback.txt)" in result.failed["look"]
    assert "Error" in result.failed["look"] and result.findings[2].verdict == "undecided"
    assert (folder / "look" / "traceback.txt").read_text().startswith("Traceback (most recent call last)")
    (folder / "look" / "gains.md").rmdir()
    assert run_recipe(made, folder, scale="smoke").failed == {}
    assert (folder / "results.json").read_bytes() == results and not (folder / "look" / "traceback.txt").exists()


def test_an_interrupt_stops_everything(base, tmp_path):
    class Interrupted(Silent):
        def task(self, title, total, unit):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_recipe(three_steps(base), tmp_path / "run", scale="smoke", progress=Interrupted())
    assert not (tmp_path / "run" / "results.json").exists()


@pytest.mark.parametrize(("overrides", "message"), [
    ({"fourth": {"train": {"seed": 1}}}, r"unknown key 'fourth'.* nor a step of recipe MINE \(first, second, look, th"),
    ({"second": {"train": {"sead": 1}}}, "step second: unknown key 'train.sead'; did you mean 'seed'"),
    ({"second": 3}, "--set second: write second.section.key=value"),
    ({"look": {"train": {"seed": 1}}}, "--set look: step look has no plan"),
    ({"train": {"lr": float("inf")}}, "--set: a value is neither"),
])  # fmt: skip
def test_a_wrong_key_of_one_step_is_refused(overrides, message, base, tmp_path):
    refused(ConfigError, message, run_recipe, three_steps(base), tmp_path / "run", scale="smoke", overrides=overrides)
    assert not (tmp_path / "run").exists()


def test_a_step_with_the_name_of_a_section_has_no_keys_of_its_own(tmp_path):
    train = recipe(("train", "sequence", LEARNS))
    message = "--set train: recipe MINE has a step of that name, and a plan has such a section"
    seed = {"train": {"seed": 1}}
    refused(ConfigError, message, run_recipe, train, tmp_path / "run", scale="smoke", overrides=seed)


SWEPT = {
    "domains": ["pubmedqa", "wikitext"], "methods": [{"name": "gain"}, {"name": "lora", "rank": 2}],
    "rates": [0.01, 0.02],
}  # fmt: skip


def test_a_sweep_step_over_workers_gives_the_same_and_continues_with_other_batches(tmp_path):
    made, folder = recipe(("rates", "sweep", SWEPT)), tmp_path / "run"
    alone = run_recipe(made, tmp_path / "alone", scale="smoke")
    assert command(made, tmp_path, "--jobs", 2).returncode == 0
    assert (folder / "results.json").read_bytes() == (alone.folder / "results.json").read_bytes()
    runs = folder / "rates" / "runs"
    gone = sorted(runs.iterdir())[0]
    shutil.rmtree(gone)
    kept = work(runs)
    halves = {"train": {"batch_size": 2, "gradient_accumulation": 2}}
    again = run_recipe(made, folder, scale="smoke", overrides=halves)
    assert again.outcomes["rates"].numbers.keys() == alone.outcomes["rates"].numbers.keys()
    assert kept.items() <= work(runs).items() and len(list(runs.iterdir())) == 4
    refused(RunDirectoryError, "step rates holds work that was finished", run_recipe, made, folder, scale="smoke",
            overrides={"train": {"batch_size": 2}})  # fmt: skip


def test_a_sweep_whose_base_is_repaired_starts_over(base, tmp_path):
    made = recipe(("rates", "sweep", {**SWEPT, "rates": [0.01], "model": {"name": str(base)}}))
    whole = shutil.copytree(base, tmp_path / "whole")
    reference = undisturbed(made, tmp_path)
    with_nan(base)
    failed = run_recipe(made, tmp_path / "run", scale="smoke").failed
    assert "the base's own loss" in failed["rates"]
    shutil.copytree(whole, base, dirs_exist_ok=True)
    assert run_recipe(made, tmp_path / "run", scale="smoke").failed == {}
    for name in ("results.json", "results.csv", "rates/cells.csv"):
        assert (tmp_path / "run" / name).read_bytes() == (reference / name).read_bytes(), name


ASKS = {"learn": "finphrase", "ask": ["sst2"], "data": {"block_size": 128, "train_tokens": 1024}}
CLASSIFIES = {"tasks": ["sst2"], "texts": ["wikitext"], "classify": {"train_rows": 8}}


@pytest.mark.parametrize(("kind", "settings", "rows"), [
    ("answers", ASKS, "questions"), ("classify", CLASSIFIES, "glue")
])  # fmt: skip
def test_rows_may_change_until_something_is_trained(kind, settings, rows, base, tmp_path):
    own = {"methods": [{"name": "gain", "lr": 0.01}], "model": {"name": str(base)}}
    made, whole = recipe(("run", kind, {**settings, **own})), shutil.copytree(base, tmp_path / "whole")
    without_weights(base)
    assert "no model.safetensors" in run_recipe(made, tmp_path / "run", scale="smoke").failed["run"]
    edited = tmp_path / "run" / "world" / "data" / rows / "sst2" / "validation.jsonl"
    edited.write_text("".join(edited.read_text().splitlines(keepends=True)[::-1][:6]))
    shutil.copytree(whole, base, dirs_exist_ok=True)
    assert run_recipe(made, tmp_path / "run", scale="smoke").failed == {}
    edited.write_text("".join(edited.read_text().splitlines(keepends=True)[:3]))
    assert "says otherwise" in run_recipe(made, tmp_path / "run", scale="smoke").failed["run"]


def test_a_recipe_may_change_where_no_finished_training_would_have_other_numbers(base, tmp_path):
    look, more = ("look", "subspace", {"of": "first"}), ("more", "sequence", LEARNS)
    methods = [*LEARNS["methods"], {"name": "gain-ffn", "lr": 0.01}]
    first = recipe(("first", "sequence", LEARNS), look)
    both, other_look = {**LEARNS, "methods": methods}, {**look[2], "epsilon": 0.3}
    changed = recipe(("first", "sequence", both), ("look", "subspace", other_look), more, claims=CLAIMS[:1])
    reference = undisturbed(changed, tmp_path)
    run_recipe(first, tmp_path / "run", scale="smoke")
    run_recipe(changed, tmp_path / "run", scale="smoke")
    assert contents(tmp_path / "run", HISTORY) == contents(reference, HISTORY)
    again = {"folder": tmp_path / "run", "scale": "smoke"}
    other_kind = recipe(("first", "sequence", both), ("look", "gains", look[2]), more)
    figures = run_recipe(other_kind, **again).outcomes["look"].figures
    assert figures and not any("subspace" in figure.name for figure in figures)
    slower = {**LEARNS, "methods": [{"name": "gain", "lr": 0.001}, methods[1]]}
    finished = r"step first holds work .* another plan \(methods\.gain\.lr: 0\.01 there, 0\.001 now\)"
    refused(RunDirectoryError, finished, run_recipe, recipe(("first", "sequence", slower), look, more), **again)
    kind = r"step first holds work .* do: 'sequence' there, 'separately' now"
    refused(RunDirectoryError, kind, run_recipe, recipe(("first", "separately", LEARNS), more), **again)


def test_differences_follow_the_steps_they_compare(base, tmp_path):
    second = {**LEARNS, "model": {"name": str(base)}}
    less = ("less", "differences", {"differences": {"second": ["second.gain.in_domain", "first.gain.in_domain"]}})
    made, whole = recipe(("first", "sequence", LEARNS), ("second", "sequence", second), less), base.parent / "whole"
    shutil.copytree(base, whole)
    with_nan(base)
    assert run_recipe(made, tmp_path / "run", scale="smoke").outcomes["less"].numbers == {}
    shutil.copytree(whole, base, dirs_exist_ok=True)
    assert [*run_recipe(made, tmp_path / "run", scale="smoke").outcomes["less"].numbers] == ["second"]


def test_another_adapter_is_absorbed_when_its_step_changes(tmp_path):
    run = ("run", "sequence", {**LEARNS, "domains": ["pubmedqa", "wikitext"]})
    steps = {after: ("merged", "absorb", {"of": "run", "after": after}) for after in ("pubmedqa", "wikitext")}
    for number, (after, step) in enumerate(steps.items(), 1):
        run_recipe(recipe(run, step), tmp_path / "run", scale="smoke")
        certificate = json.loads((tmp_path / "run" / "merged" / "gain.json").read_text())
        assert certificate["adapter"].endswith(f"{number:02d}-{after}/adapter")


def test_workers_without_a_sweep_are_refused(base, tmp_path):
    message = "no step of it is a sweep, so --jobs and --engine change nothing"
    refused(ConfigError, message, run_recipe, three_steps(base), tmp_path / "run", scale="smoke", jobs=2)
    swept = recipe(("rates", "sweep", SWEPT))
    refused(ConfigError, "engine 'fast'", run_recipe, swept, tmp_path / "run", scale="smoke", engine="fast")
