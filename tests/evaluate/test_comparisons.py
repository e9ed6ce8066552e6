"""Adapters are checked before anything is measured; and what `adapt` prints of a model is what `evaluate` finds."""

import json
import shutil

import pytest

from gaintune.config import build_plan
from gaintune.errors import AdapterError, BaseMismatchError
from gaintune.evaluate import compare_adapters, compare_choices, compare_classifiers, compare_masked
from gaintune.workflows import adapt
from support import refused, tiny_base, tiny_domains, tiny_encoders
from support.killing import Nothing


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A decoder and an encoder with an adapter each, and another of both kinds of base."""
    folder = tmp_path_factory.mktemp("work")
    decoder, encoder = tiny_base.folder(folder / "decoder"), tiny_encoders.folder(folder / "encoder")
    tiny_base.folder(folder / "other-decoder", seed=1)
    tiny_encoders.folder(folder / "other-encoder", seed=1)
    text = tiny_domains.plan(decoder, folder)
    text["data"]["domains"] = text["data"]["domains"][:1]
    adapt(text, folder / "text")
    rule = tiny_encoders.write_rows(folder / "rule.jsonl", tiny_encoders.rule_rows(60))
    adapt(tiny_encoders.plan(encoder, rule), folder / "classifier")
    rows = [{"text": f"row {n}", "label": "good" if n % 3 else "poor"} for n in range(12)]
    tiny_encoders.write_rows(folder / "moods.jsonl", rows)
    return folder


def of_text(work, base, **options):
    return {"plan": build_plan(tiny_domains.plan(work / base, work)), **options}


def moods(work):
    return {"moods": work / "moods.jsonl"}


def of_rows(work, base):
    return {"plan": build_plan(tiny_encoders.plan(work / base, work / "rule.jsonl"))}


CASES = {
    "perplexity": (compare_adapters, "text", lambda work, other: of_text(work, f"{other}decoder")),
    "choices": (compare_choices, "text", lambda work, other: of_text(work, f"{other}decoder", sets=moods(work))),
    "masked": (compare_masked, "classifier", lambda work, other: of_text(work, f"{other}encoder")),
    "classifiers": (compare_classifiers, "classifier", lambda work, other: of_rows(work, f"{other}encoder")),
}


@pytest.mark.parametrize("case", CASES)
def test_missing_and_damaged_adapters_and_another_base_are_refused_before_anything_is_measured(work, tmp_path, case):
    compare, good, arguments = CASES[case]
    good, damaged = work / good, tmp_path / "damaged"
    shutil.copytree(good, damaged)
    record = json.loads((damaged / "gaintune.json").read_text())
    (damaged / "gaintune.json").write_text(json.dumps({**record, "label": "changed"}))
    for adapters, error, message, other in (
        ([good, tmp_path / "nowhere"], AdapterError, "no such adapter folder", ""),
        ([good, damaged], AdapterError, "damaged adapter", ""),
        ([good], BaseMismatchError, "was trained on", "other-"),
        ([good], AssertionError, "nothing should have begun", ""),
    ):
        refused(error, message, compare, adapters=adapters, progress=Nothing(), **arguments(work, other))


@pytest.fixture
def plan(tmp_path):
    plan = tiny_domains.plan(tiny_base.folder(tmp_path / "base"), tmp_path)
    plan["model"] = {**plan["model"], "dtype": "bf16"}
    plan["data"] = {**plan["data"], "train_tokens": 128, "domains": plan["data"]["domains"][:1]}
    return plan


def test_perplexity_of_whole_weights_and_of_adapters_beside_them(plan, tmp_path):
    whole = adapt({**plan, "methods": ["full"], "train": {"lr": 1e-3}}, tmp_path / "whole")
    gains = adapt({**plan, "methods": ["gain-ffn"]}, tmp_path / "gains")
    assert whole.before != gains.before  # fp32 under autocast, and bf16
    folders = {"whole": whole, "gains": gains}
    for order in (["whole", "gains"], ["gains", "whole"]):
        base, *found = compare_adapters(build_plan(plan), [tmp_path / name for name in order])
        assert base.perplexity == folders[order[0]].before.perplexity
        for name, figure in zip(order, found, strict=True):
            before, after = folders[name].before.perplexity, folders[name].after.perplexity
            assert figure.perplexity == after, name
            assert figure.change == pytest.approx(100 * (after / before - 1)), name
    (alone,) = compare_adapters(build_plan(plan), [])
    assert alone.perplexity == gains.before.perplexity


def test_scores_of_a_classifier_trained_whole(tmp_path):
    base = tiny_encoders.folder(tmp_path / "base")
    rows = tiny_encoders.write_rows(tmp_path / "rule.jsonl", tiny_encoders.rule_rows(120))
    values = tiny_encoders.plan(base, rows, model={"dtype": "bf16"}, methods=["full"], train={"lr": 1e-3})
    scores = adapt(values, tmp_path / "whole").scores
    (figure,) = compare_classifiers(build_plan(values), [tmp_path / "whole"])
    assert figure.scores == scores
