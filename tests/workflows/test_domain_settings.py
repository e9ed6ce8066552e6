"""What an adapter's record says of its domains' rows, and the warning where they are split or written otherwise."""

import json
from dataclasses import asdict

import pytest

from gaintune.adapters import read_record
from gaintune.adapters.record import DomainSettings
from gaintune.analysis import survey_gates
from gaintune.config import build_plan
from gaintune.evaluate import compare_adapters, compare_classifiers, compare_masked
from gaintune.workflows import adapt
from support import tiny_base, tiny_domains, tiny_encoders
from support.files import write_rows

SEED = "was trained on sums with data.seed 0, here it is 1: unless its source has a validation split of its own"
TEMPLATE = "was trained on sums with template alpaca, here it is magicoder. Give --template alpaca"
END = "was trained on sums with data.end_of_text true, here it is false. Give --set data.end_of_text=true"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny decoder, sums as prompts and answers, prose, and a DISeL adapter trained on the sums."""
    made = tmp_path_factory.mktemp("trained")
    tiny_base.folder(made / "base", max_position_embeddings=512)
    rows = [{"prompt": f"What is {n} and {n}?\n", "completion": f"It is {2 * n}."} for n in range(80)]
    write_rows(made / "sums.jsonl", rows)
    tiny_domains.write(made)
    adapt(plan_of(made), made / "adapter")
    return made


def plan_of(folder, name="sums", **data):
    values = tiny_domains.plan(folder / "base", folder, methods=[{"name": "disel", "rank": 2}])
    sums = {"task": "instruct", "template": "alpaca", "block_size": 256, "validation_tokens": 512}
    values["data"] = {**values["data"], **sums, "domains": [f"{name}={folder / 'sums.jsonl'}"], **data}
    return build_plan(values)


def test_the_record_says_how_rows_were_made(folder, tmp_path):
    sums = DomainSettings(task="instruct", seed=0, template="alpaca", block_size=256, packing=True, end_of_text=True)
    assert read_record(folder / "adapter").data == {"sums": sums}
    on_disk = json.loads((folder / "adapter" / "gaintune.json").read_text())["data"]
    assert on_disk == {"sums": {key: value for key, value in asdict(sums).items() if key != "beginning_of_text"}}
    prose = {"domains": [str(folder / "prose.jsonl")], "task": "text", "template": "auto", "seed": 4}
    adapt(plan_of(folder, **prose), tmp_path / "second", start=folder / "adapter")
    text = DomainSettings("text", 4, "auto", 256, packing=True, end_of_text=True)
    assert read_record(tmp_path / "second").data == {"sums": sums, "prose": text}


MEASURES = {
    "evaluate": lambda folder, plan, out: compare_adapters(plan, [folder / "adapter"]),
    "gates": lambda folder, plan, out: survey_gates(plan, folder / "adapter"),
    "adapt --start": lambda folder, plan, out: adapt(plan, out, start=folder / "adapter"),
}


@pytest.mark.parametrize("measure", MEASURES)
def test_another_split_or_template_is_reported_with_the_option_to_give(measure, folder, tmp_path, caplog):
    MEASURES[measure](folder, plan_of(folder, seed=1, template="magicoder", end_of_text=False), tmp_path / "out")
    assert all(part in caplog.text for part in (SEED, TEMPLATE, END))
    assert "Give --set data.seed=0" in caplog.text
    caplog.clear()
    MEASURES[measure](folder, plan_of(folder), tmp_path / "same")
    MEASURES[measure](folder, plan_of(folder, name="others", seed=1, template="plain"), tmp_path / "other")
    assert "was trained on sums" not in caplog.text
    MEASURES[measure](folder, plan_of(folder, beginning_of_text="always"), tmp_path / "begun")
    assert "was trained on sums with data.beginning_of_text auto, here it is always" in caplog.text


def test_another_split_is_reported_for_classifiers_too(tmp_path, caplog):
    base = tiny_encoders.folder(tmp_path / "base")
    values = tiny_encoders.plan(base, write_rows(tmp_path / "rule.jsonl", tiny_encoders.rule_rows(60)))
    adapt(values, tmp_path / "adapter")
    compare_classifiers(build_plan({**values, "data": {**values["data"], "seed": 2}}), [tmp_path / "adapter"])
    assert "was trained on rule with data.seed 0, here it is 2" in caplog.text
    caplog.clear()
    prose = {**values["data"], "task": "text", "domains": [f"rule={tiny_domains.write(tmp_path)[0]}"], "seed": 2}
    sizes = {"train_tokens": 256, "validation_tokens": 256, "block_size": 64}
    compare_masked(build_plan({**values, "data": {**prose, **sizes}}), [tmp_path / "adapter"])
    assert "was trained on rule with data.seed 0, here it is 2" in caplog.text
