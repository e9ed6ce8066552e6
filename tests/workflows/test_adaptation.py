"""One adaptation: killed and continued, carried on from another, and refused where it would go wrong."""

import pytest

from gaintune.errors import AdapterError, BaseMismatchError, ConfigError, RunDirectoryError
from gaintune.storage import read_json
from gaintune.workflows import adapt, run_sequence
from support import refused, tiny_base, tiny_domains
from support.files import contents, cut_short
from support.killing import Nothing, killed, stopped


@pytest.fixture
def both(tiny, tmp_path):
    return tiny_domains.plan(tiny, tmp_path)


@pytest.fixture
def plan(both):
    return tiny_domains.of(both, "prose")


def test_killed_in_training_and_in_measuring_it_ends_with_the_same_adapter(plan, tmp_path):
    expected = adapt(plan, tmp_path / "whole")
    killed(adapt, (plan, tmp_path / "killed"), "gain-ffn: learning prose", 5)
    killed(adapt, (plan, tmp_path / "killed"), "measuring prose after", 1)
    assert not (tmp_path / "killed").exists()
    result = adapt(plan, tmp_path / "killed")
    assert result.after == expected.after and result.after.perplexity < result.before.perplexity
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert not (tmp_path / "killed.unfinished").exists()


def test_a_domain_edited_between_stop_and_restart_is_refused(plan, tmp_path):
    stopped(adapt, (plan, tmp_path / "out"), "gain-ffn: learning prose", 5)
    tiny_domains.edit(tmp_path / "prose.jsonl")
    refused(RunDirectoryError, r"prose\.content_hash.*delete .*out\.unfinished", adapt, plan, tmp_path / "out")


def test_carrying_on_keeps_the_record_and_refuses_another_method_or_shape(both, tmp_path):
    lora = [{"name": "lora", "rank": 2}]
    adapt(tiny_domains.of(both, "prose", methods=lora), tmp_path / "first")
    adapt(tiny_domains.of(both, "code", methods=lora), tmp_path / "second", start=tmp_path / "first")
    record = read_json(tmp_path / "second" / "gaintune.json")
    assert record["domains"] == ["prose", "code"] and set(record["content_hashes"]) == {"prose", "code"}
    for methods, message in (
        (["gain-ffn"], r"made by method 'lora'.*use --method lora, or leave --start out"),
        ([{"name": "lora", "rank": 4}], r"made with rank 2.*leave rank out"),
    ):
        with pytest.raises(ConfigError, match=message):
            adapt(tiny_domains.of(both, "code", methods=methods), tmp_path / "third", start=tmp_path / "first")
    assert not list(tmp_path.glob("third*"))


def test_a_block_longer_than_the_model_takes_is_refused_before_training(plan, tmp_path):
    plan["data"] |= {"block_size": 160, "validation_tokens": 320}
    for run in (adapt, run_sequence):
        with pytest.raises(ConfigError, match=r"block_size is 160, but model .* takes 128 .*block_size=128 or less"):
            run(plan, tmp_path / "out")
        assert not list(tmp_path.glob("out/stages")) and not list(tmp_path.glob("**/checkpoint-*"))
    plan["data"] |= {"block_size": 128}
    assert adapt(plan, tmp_path / "other").steps > 0


def test_targets_that_match_nothing_are_one_message(plan, tmp_path):
    with pytest.raises(ConfigError, match=r"method 'lora' cannot be attached to this base.*typo"):
        adapt({**plan, "methods": [{"name": "lora", "targets": "typo"}]}, tmp_path / "out")
    assert not list(tmp_path.glob("out*")), "nothing was trained, so nothing is left"


def test_an_adapter_to_carry_on_is_checked_before_anything_is_made_or_loaded(plan, tmp_path):
    adapt(plan, tmp_path / "first")
    weights = tmp_path / "first" / "adapter_model.safetensors"
    whole = cut_short(weights)
    with pytest.raises(AdapterError, match=r"damaged adapter: .*cut short"):
        adapt(plan, tmp_path / "second", start=tmp_path / "first", progress=Nothing())
    weights.write_bytes(whole)
    other = {**plan, "model": {**plan["model"], "name": str(tiny_base.folder(tmp_path / "other", seed=1))}}
    with pytest.raises(BaseMismatchError, match="was trained on"):
        adapt(other, tmp_path / "second", start=tmp_path / "first", progress=Nothing())
    with pytest.raises(AdapterError, match="no such adapter folder"):
        adapt(plan, tmp_path / "second", start=tmp_path / "nowhere", progress=Nothing())
    assert not list(tmp_path.glob("second*"))


def test_a_stop_before_the_first_checkpoint_leaves_nothing_and_one_after_it_leaves_the_work(plan, tmp_path):
    stopped(adapt, (plan, tmp_path / "out"), "gain-ffn: learning prose", 1)
    assert not list(tmp_path.glob("out*"))
    stopped(adapt, (plan, tmp_path / "out"), "gain-ffn: learning prose", 5)
    assert list((tmp_path / "out.unfinished" / "checkpoints").glob("checkpoint-*"))
    refused(RunDirectoryError, "belongs to another plan", adapt, {**plan, "train": {"lr": 0.5}}, tmp_path / "out")
    assert list((tmp_path / "out.unfinished" / "checkpoints").glob("checkpoint-*"))
    adapt(plan, tmp_path / "out")
    assert not (tmp_path / "out.unfinished").exists()


def test_a_domain_that_training_made_worse_is_named_and_saved(plan, tmp_path, caplog):
    plan["methods"] = ["full"]
    adapt({**plan, "train": {"lr": 0.003, "epochs": 4}}, tmp_path / "fine")
    assert "got worse" not in caplog.text
    result = adapt({**plan, "train": {"lr": 1.0}}, tmp_path / "worse", start=tmp_path / "fine")
    assert result.after.perplexity > result.before.perplexity
    assert "prose got worse in training" in caplog.text and "try a lower one (--lr, train.lr)" in caplog.text
    assert (tmp_path / "worse" / "model.safetensors").is_file()


def test_one_of_several_domains_or_methods_must_be_chosen(plan, both, tmp_path):
    with pytest.raises(ConfigError, match=r"has 2 domains \(prose, code\) and 1 method .*choose one with --domain;"):
        adapt(both, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"and 2 methods \(gain, lora\): choose one with --method;"):
        adapt({**plan, "methods": ["gain", "lora"]}, tmp_path / "out")


def test_tensorboard_logs_stay_beside_the_adapter(plan, tmp_path):
    adapt({**plan, "train": {"trackers": ["tensorboard"]}}, tmp_path / "out")
    assert list((tmp_path / "out.tensorboard").glob("events.out.tfevents.*"))


@pytest.mark.parametrize("method", ["gain-ffn", "disel", "vera"])
def test_a_base_spread_by_accelerate_trains_and_continues_to_the_same_bytes(plan, tmp_path, method):
    """Without a CUDA device accelerate puts every layer on the CPU."""
    plan["model"]["device"], plan["methods"] = "auto", [method]
    spread = {**plan, "model": {**plan["model"], "device_map": "auto"}}
    for name, each in (("plain", plan), ("spread", spread)):
        first = adapt(each, tmp_path / name)
        adapt(each, tmp_path / f"{name}-again", start=first.adapter)
    for again in ("", "-again"):
        assert contents(tmp_path / f"plain{again}") == contents(tmp_path / f"spread{again}")


def test_what_cannot_be_spread_or_divided_over_processes_is_refused(plan, tmp_path, monkeypatch):
    spread = {**plan, "model": {"name": plan["model"]["name"], "device_map": "auto"}}
    for method in ("full", "osf"):
        refused(
            ConfigError,
            "works on the base's own weights: leave model.device_map",
            adapt,
            {**spread, "methods": [method]},
            tmp_path / "out",
        )
    monkeypatch.setenv("WORLD_SIZE", "3")
    refused(ConfigError, "3 processes would each do so: start one process", adapt, spread, tmp_path / "out")
    plan["train"] = {"batch_size": 2, "effective_batch": 16}
    for run in (adapt, run_sequence):
        refused(ConfigError, r"no multiple of the 6 rows .* x 3 processes\): set train.effective_batch=12 or 18", run,
                plan, tmp_path / "out")  # fmt: skip
