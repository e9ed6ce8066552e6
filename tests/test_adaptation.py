"""One adaptation: killed and continued, carried on from another, and refused where it would go wrong."""

import json

import pytest

import tiny_base
import tiny_domains
from gaintune.adaptation import adapt
from gaintune.errors import ConfigError, RunDirectoryError
from gaintune.runs import read_json
from killing import killed


@pytest.fixture
def plan(tmp_path):
    model = tiny_base.folder(tmp_path / "base")
    plan = tiny_domains.plan(model, tmp_path)
    plan["data"]["domains"] = plan["data"]["domains"][:1]
    return plan


def test_killed_in_training_and_in_measuring_it_ends_with_the_same_adapter(plan, tmp_path):
    expected = adapt(plan, tmp_path / "whole")
    killed(adapt, (plan, tmp_path / "killed"), "gain-ffn: learning prose", 5)
    killed(adapt, (plan, tmp_path / "killed"), "measuring prose after", 1)
    assert not (tmp_path / "killed").exists()
    result = adapt(plan, tmp_path / "killed")
    assert result.after == expected.after
    assert result.after.perplexity < result.before.perplexity
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "killed" / file.name).read_bytes() == file.read_bytes(), file.name
    assert not (tmp_path / "killed.unfinished").exists()


def test_a_domain_edited_between_stop_and_restart_is_refused(plan, tmp_path):
    killed(adapt, (plan, tmp_path / "out"), "gain-ffn: learning prose", 5)
    prose = tmp_path / "prose.jsonl"
    prose.write_text("".join(json.dumps({"text": line[10:90]}) + "\n" for line in prose.read_text().splitlines()))
    with pytest.raises(RunDirectoryError, match=r"prose\.content_hash.*delete .*out\.unfinished"):
        adapt(plan, tmp_path / "out")


def test_carrying_on_keeps_the_record_and_refuses_another_method_or_shape(plan, tmp_path):
    lora = {**plan, "methods": [{"name": "lora", "rank": 2}]}
    adapt(lora, tmp_path / "first")
    code = {**lora["data"], "domains": [f"code={tmp_path / 'code.jsonl'}"]}
    adapt({**lora, "data": code}, tmp_path / "second", start=tmp_path / "first")
    record = read_json(tmp_path / "second" / "gaintune.json")
    assert record["domains"] == ["prose", "code"]
    assert set(record["content_hashes"]) == {"prose", "code"}
    with pytest.raises(ConfigError, match="made by method 'lora', the plan says 'gain-ffn'"):
        adapt({**plan, "data": code}, tmp_path / "third", start=tmp_path / "first")
    wide = {**lora, "methods": [{"name": "lora", "rank": 4}], "data": code}
    with pytest.raises(ConfigError, match="has rank 2, the plan says 4"):
        adapt(wide, tmp_path / "third", start=tmp_path / "first")


def test_targets_that_match_nothing_are_one_message(plan, tmp_path):
    with pytest.raises(ConfigError, match=r"method 'lora' cannot be attached to this base.*typo"):
        adapt({**plan, "methods": [{"name": "lora", "targets": "typo"}]}, tmp_path / "out")


def test_tensorboard_logs_stay_beside_the_adapter(plan, tmp_path):
    adapt({**plan, "train": {"trackers": ["tensorboard"]}}, tmp_path / "out")
    assert list((tmp_path / "out.tensorboard").glob("events.out.tfevents.*"))
