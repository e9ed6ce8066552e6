"""What `adapt` says of the model it has trained is what `evaluate` finds, also of weights trained whole."""

import pytest

from gaintune.config import build_plan
from gaintune.evaluate import compare_adapters, compare_classifiers
from gaintune.workflows import adapt
from support import tiny_base, tiny_domains, tiny_encoders


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
