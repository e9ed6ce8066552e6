"""Renormalization: after a stage gains, factors and B A are pulled toward the base, before they are measured."""

import pytest
import torch
from safetensors.torch import load_file

from gaintune.adapters import load_adapter
from gaintune.config import build_plan
from gaintune.data import load_domain
from gaintune.errors import ConfigError
from gaintune.evaluate import measure
from gaintune.models import load_base
from gaintune.report import write_report
from gaintune.storage import read_json
from gaintune.workflows import adapt, run_sequence
from support import files, refused, tiny_domains
from support.killing import Nothing, stopped

SHARE = 0.75  # exact in binary, so that products can be compared bit by bit
METHODS = {"gain-ia3": ("gain_v", 0.0), "ia3": ("ia3_l", 1.0), "lora": ("lora_B.weight", 0.0)}


def plan_of(tiny, folder, methods):
    plan = tiny_domains.plan(tiny, folder, methods=methods, data={"train_tokens": 512})
    plan["data"]["domains"].append(f"more={folder / 'prose.jsonl'}")
    return plan


def tensors(folder):
    return load_file(folder / "adapter_model.safetensors")


def pulled(values, ending, neutral):
    """The same tensors by the definition, in float64 and rounded once; others as they are."""
    return {
        name: (neutral + SHARE * (value.double() - neutral)).float() if name.endswith(ending) else value
        for name, value in values.items()
    }


def assert_close(left, right, exact):
    assert left.keys() == right.keys()
    for name, value in left.items():
        tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-6, "atol": 1e-6}
        torch.testing.assert_close(value, right[name], msg=name, **tolerance)


@pytest.mark.parametrize("name", METHODS)
def test_every_stage_ends_pulled_and_the_next_goes_on_from_there(tiny, tmp_path, name):
    ending, neutral = METHODS[name]
    plain = plan_of(tiny, tmp_path, [{"name": name, "label": "m"}])
    plan = plan_of(tiny, tmp_path, [{"name": name, "label": "m", "renormalize": SHARE}])
    run_sequence(plain, tmp_path / "plain")
    matrix, run = run_sequence(plan, tmp_path / "run"), tmp_path / "run"
    stages = [run / "stages" / "m" / stage for stage in ("01-prose", "02-code", "03-more")]
    first = tensors(tmp_path / "plain" / "stages" / "m" / "01-prose" / "adapter")
    assert_close(tensors(stages[0] / "adapter"), pulled(first, ending, neutral), exact=neutral == 0)
    for index, domain in ((1, "code"), (2, "more")):  # each from the pulled one before, by a command of its own
        alone = tmp_path / f"from-{index}"
        adapt(tiny_domains.of(plain, domain), alone, start=stages[index - 1] / "adapter")
        assert_close(tensors(stages[index] / "adapter"), pulled(tensors(alone), ending, neutral), exact=neutral == 0)
    checked = build_plan(plan)
    base = load_base(checked.model)
    blocks = load_domain(checked.data.domains[1], checked.data, base.tokenizer)
    adapted = load_adapter(base, stages[2] / "adapter")
    cell = matrix.methods[0].stages[2].cells["code"]
    assert cell.perplexity == pytest.approx(measure(adapted, blocks.validation, blocks.validation_bytes).perplexity)
    record = read_json(stages[0] / "adapter" / "gaintune.json")["settings"]["method"]
    assert record["renormalize"] == SHARE and len(matrix.methods[0].stages) == 3
    assert "prose" in write_report(run).read_text()
    for file in ("plan.yaml", "stages/m/01-prose/adapter/gaintune.json"):
        assert "renormalize" not in (tmp_path / "plain" / file).read_text()


def test_a_stop_and_a_penalty_change_nothing(tiny, tmp_path):
    method = {"name": "gain-ffn", "label": "m", "renormalize": SHARE, "penalty": "ewc", "penalty_strength": 10}
    plan, run = plan_of(tiny, tmp_path, [method]), tmp_path / "stopped"
    run_sequence(plan, tmp_path / "whole")
    stopped(run_sequence, (plan, run), "m: learning code", 4)
    stopped(run_sequence, (plan, run), "m: learning code: what matters to it", 2)  # pulled, and not saved yet
    run_sequence(plan, run)
    leave = {"events.jsonl", ".lock"}
    assert files.contents(run, leave_out=leave) == files.contents(tmp_path / "whole", leave_out=leave)


def test_what_has_nothing_to_pull_and_one_adaptation_are_refused(tiny, tmp_path):
    for name in ("disel", "dora", "full"):
        plan = plan_of(tiny, tmp_path, [{"name": name, "renormalize": SHARE}])
        refused(ConfigError, f"method '{name}' has no gains", run_sequence, plan, tmp_path / "run", progress=Nothing())
    one = tiny_domains.of(plan_of(tiny, tmp_path, [{"name": "gain", "renormalize": SHARE}]), "code")
    refused(ConfigError, "renormalize acts between the stages", adapt, one, tmp_path / "adapter")
    refused(ConfigError, r"methods\.0\.renormalize", build_plan, {"methods": [{"name": "gain", "renormalize": 1.5}]})
    assert build_plan({"methods": [{"name": "gain", "renormalize": 0.9}]}).methods[0].label == "gain-renormalized"
