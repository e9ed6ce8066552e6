"""Copies of an adapter during training: each is the adapter as it was, and a stop changes none of them."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from gaintune.adapters import load_adapter, read_record
from gaintune.config import build_plan, read_plan
from gaintune.errors import AdapterError, ConfigError, RunDirectoryError
from gaintune.evaluate import compare_adapters, compare_classifiers
from gaintune.storage import read_json
from gaintune.training import snapshots_of
from gaintune.workflows import adapt, adapt_classifier, run_sequence
from support import refused, tiny_domains, tiny_encoders
from support.files import contents, write_rows
from support.killing import stopped
from support.tiny_adapters import base_of, logits


@pytest.fixture
def both(tiny, tmp_path):
    return tiny_domains.plan(tiny, tmp_path, train={"snapshot_steps": 3})


@pytest.fixture
def plan(both):
    return tiny_domains.of(both, "prose")


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def test_copies_are_the_adapters_of_shorter_trainings_and_a_stop_changes_none(plan, tiny, tmp_path):
    adapt(plan, tmp_path / "whole")
    copies = snapshots_of(tmp_path / "whole")
    assert list(copies) == [3, 6, 8]  # 32 blocks, 4 at a time; the last update always
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(tensor, weights(copies[8])[name]) and not torch.equal(tensor, weights(copies[3])[name])
    settings, last = (read_record(folder).settings for folder in (copies[3], tmp_path / "whole"))
    assert settings["snapshot"] == {"step": 3, "steps": 8}
    assert {**settings, "snapshot": None} == {**last, "snapshot": None}
    model = load_adapter(base_of(tiny), copies[3])  # it loads as any adapter does
    assert any(parameter.abs().sum() > 0 for name, parameter in model.named_parameters() if "gain_v" in name)
    stopped(adapt, (plan, tmp_path / "stopped"), "gain-ffn: learning prose", 7)
    assert not (tmp_path / "stopped.snapshots").exists(), "not beside an adapter that is not there yet"
    kept = tmp_path / "stopped.unfinished" / "snapshots"
    assert sorted(entry.name for entry in kept.iterdir()) == ["step-000003", "step-000006"]
    shutil.copytree(kept / "step-000006", kept / "step-000007")  # later than the checkpoint, so it is done anew
    (kept.parent / "run.json").unlink()  # as a version left it that wrote none
    kept.replace(tmp_path / "stopped.snapshots")  # as a stop leaves them just before the adapter is written
    stopped(adapt, (plan, tmp_path / "stopped"), "measuring prose after", 1)
    adapt(plan, tmp_path / "stopped")
    assert contents(tmp_path / "whole.snapshots") == contents(tmp_path / "stopped.snapshots")
    assert contents(tmp_path / "whole") == contents(tmp_path / "stopped")


def test_another_adapters_copies_are_not_mixed_in(plan, tmp_path):
    (tmp_path / "out.snapshots").mkdir()
    refused(ConfigError, r"out\.snapshots exists already", adapt, plan, tmp_path / "out")
    (tmp_path / "out.unfinished").mkdir()
    for name, error in (("mine", "not a snapshot's name"), ("step-000003", "no manifest.json says")):
        (tmp_path / "out.snapshots" / name).mkdir()
        (tmp_path / "out.snapshots" / name / "notes.md").touch()
        refused((AdapterError, RunDirectoryError), error, adapt, plan, tmp_path / "out")
        (tmp_path / "out.snapshots" / name).rename(tmp_path / name)
    shutil.rmtree(tmp_path / "out.unfinished")
    del plan["train"]["snapshot_steps"]
    adapt(plan, tmp_path / "none")
    assert not (tmp_path / "none.snapshots").exists()
    refused(AdapterError, r"no snapshots of it were kept; .*snapshot_steps", snapshots_of, tmp_path / "none")


def test_stages_of_a_run_keep_theirs(both, tmp_path):
    run_sequence(both, tmp_path / "run")
    stage = tmp_path / "run" / "stages" / "gain-ffn" / "02-code"
    copies = snapshots_of(stage / "adapter")
    assert list(copies) == [3, 6, read_json(stage / "metrics.json")["steps"]]
    assert read_record(copies[3]).domains == ("prose", "code")
    first = weights(stage.with_name("01-prose") / "adapter")
    assert any(not torch.equal(tensor, first[name]) for name, tensor in weights(copies[3]).items())


@pytest.mark.parametrize("method", ["adalora", "pissa", "disel", "full"])
def test_copies_of_every_kind_load_again(tiny, tmp_path, method):
    changes = {"methods": [method], "data": {"train_tokens": 512}, "train": {"snapshot_steps": 2}}
    adapt(tiny_domains.of(tiny_domains.plan(tiny, tmp_path, **changes), "prose"), tmp_path / "out")
    copies = snapshots_of(tmp_path / "out")
    assert list(copies) == [2, 4]
    paths = (copies[2], copies[4], tmp_path / "out")
    early, late, last = (logits(load_adapter(base_of(tiny, "fp32"), path)) for path in paths)
    assert torch.equal(late, last) and not torch.equal(early, late)


def test_a_classifier_keeps_its_head_with_every_copy(tmp_path):
    rows = write_rows(tmp_path / "rule.jsonl", tiny_encoders.rule_rows(80))
    base = tiny_encoders.folder(tmp_path / "roberta")
    adapt_classifier(tiny_encoders.plan(base, rows, train={"batch_size": 16, "snapshot_steps": 2}), tmp_path / "out")
    copies = snapshots_of(tmp_path / "out")
    last = max(copies)
    record = read_record(copies[2])
    assert record is not None and record.labels == read_record(tmp_path / "out").labels
    names = {name for name in weights(copies[2]) if "classifier" in name}
    assert names, "the head is in the copy"
    assert all(torch.equal(weights(copies[last])[name], weights(tmp_path / "out")[name]) for name in names)


BEST = {"snapshot_steps": 2, "keep": "best"}
LORA = {"name": "lora", "rank": 8, "targets": "all-linear", "lr": 0.3, "label": "by-heart"}
BY_HEART = {"methods": [LORA], "data": {"train_tokens": 128}, "train": {**BEST, "snapshot_steps": 10, "epochs": 40}}


def test_the_snapshot_with_the_lowest_validation_loss_is_kept_also_after_a_stop(tiny, tmp_path):
    plan = tiny_domains.of(tiny_domains.plan(tiny, tmp_path, **BY_HEART), "prose")
    result = adapt(plan, tmp_path / "whole")
    copies = snapshots_of(tmp_path / "whole")
    last = {**plan, "train": {**plan["train"], "keep": "last"}}
    paths = list(copies.values())
    figures = compare_adapters(read_plan(last), paths)[1:]
    losses = dict(zip(copies, (figure.perplexity for figure in figures), strict=True))
    best = min(losses, key=lambda step: losses[step])
    assert best != max(copies), "else the last one would do"
    kept = read_record(tmp_path / "whole")
    assert kept.settings["snapshot"]["step"] == best and kept.settings["train"]["keep"] == "best"
    assert result.after.perplexity == pytest.approx(losses[best], rel=1e-6)
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(tensor, weights(copies[best])[name])
    stopped(adapt, (plan, tmp_path / "stopped"), "by-heart: learning prose", 7)
    adapt(plan, tmp_path / "stopped")
    assert contents(tmp_path / "whole") == contents(tmp_path / "stopped")
    adapt(last, tmp_path / "last")
    assert "keep" not in read_record(tmp_path / "last").settings["train"], "left out at its default"
    assert not torch.equal(weights(tmp_path / "last")[name], weights(tmp_path / "whole")[name])


@pytest.mark.parametrize("method", ["gain-ffn", "adalora", "full"])
def test_a_run_goes_on_from_the_best_snapshot_of_each_stage(tiny, tmp_path, method):
    plan = tiny_domains.plan(tiny, tmp_path, methods=[method], train={**BEST, "lr": 0.05}, data={"train_tokens": 768})
    run_sequence(plan, tmp_path / "run")
    stages = [tmp_path / "run" / "stages" / method / name for name in ("01-prose", "02-code")]
    for stage in stages:
        metrics = read_json(stage / "metrics.json")
        losses = metrics["snapshot_losses"]
        assert losses[str(metrics["kept_step"])] == min(losses.values()) and len(losses) > 2
        assert read_record(stage / "adapter").settings["snapshot"]["step"] == metrics["kept_step"]
    stopped(run_sequence, (plan, tmp_path / "stopped"), f"{method}: learning code", 5)
    run_sequence(plan, tmp_path / "stopped")
    names = ("matrix.json", "stages")
    both = [contents(tmp_path / run) for run in ("run", "stopped")]
    chosen = [{name: sums for name, sums in files.items() if str(name).startswith(names)} for files in both]
    assert chosen[0] == chosen[1] and chosen[0]


def test_the_classifier_with_the_highest_accuracy_is_kept(tmp_path):
    rows = write_rows(tmp_path / "rule.jsonl", tiny_encoders.rule_rows(80))
    base = tiny_encoders.folder(tmp_path / "roberta")
    plan = tiny_encoders.plan(base, rows, train={**BEST, "batch_size": 16, "lr": 0.05, "epochs": 4})
    result = adapt_classifier(plan, tmp_path / "out")
    copies = snapshots_of(tmp_path / "out")
    figures = compare_classifiers(read_plan(plan), list(copies.values()))
    accuracies = dict(zip(copies, (figure.scores.accuracy.value for figure in figures), strict=True))
    best = max(accuracies, key=lambda step: accuracies[step])
    assert read_record(tmp_path / "out").settings["snapshot"]["step"] == best
    assert result.scores.accuracy.value == accuracies[best] > min(accuracies.values())


@pytest.mark.parametrize(("changes", "message"), [
    ({"train": {"keep": "best"}}, "set snapshot_steps"),
    ({"train": {"keep": "best", "snapshot_steps": 2}, "methods": [{"name": "lora", "penalty": "l2"}]}, "has penalty"),
])  # fmt: skip
def test_a_best_snapshot_that_cannot_be_is_refused(changes, message):
    refused(ConfigError, message, build_plan, changes)
