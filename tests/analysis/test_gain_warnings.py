"""Training warns of gains at 0 or below, and of gains that round away; it learns the same bytes with and without."""

import logging

import pytest
import torch
from peft import IA3Config, get_peft_model
from safetensors.torch import load_file

from gaintune.analysis import survey_gains
from gaintune.analysis.gains.survey import read_factors
from gaintune.methods import StageData
from gaintune.methods.rules import GainWarnings
from gaintune.models import NextTokenLoss
from gaintune.training import loop as learning
from gaintune.tuners.gain import GainConfig
from gaintune.tuners.gain.layer import scale_features
from gaintune.workflows import run_sequence
from support import tiny_base, tiny_domains

LOGGER = "gaintune.methods.rules"
WEIGHTS = "adapter_model.safetensors"


def warnings(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == LOGGER]


def test_the_first_gain_at_or_below_zero_is_warned_of_once(caplog):
    model = get_peft_model(tiny_base.model(), GainConfig(ffn=True, task_type="CAUSAL_LM"))
    rule = GainWarnings()
    v = model.base_model.model.model.layers[1].mlp.down_proj.gain_v["default"]
    with caplog.at_level(logging.WARNING, logger=LOGGER), torch.no_grad():
        rule.after_update(model, 0)
        v[7] = -0.999
        rule.after_update(model, 1)
        assert not warnings(caplog)
        v[7], v[8] = -1.0, -1.5
        rule.after_update(model, 2)
        rule.after_update(model, 3)
    (told,) = warnings(caplog)
    assert "after update 3, 2 of 160 gains" in told
    assert "the lowest, -0.500, in model.layers.1.mlp.down_proj" in told


def test_gains_that_do_not_train_are_not_looked_at(caplog):
    model = get_peft_model(tiny_base.model(), GainConfig(task_type="CAUSAL_LM"))
    model.base_model.model.model.layers[0].self_attn.o_proj.gain_v["default"].data.fill_(-2)
    model.requires_grad_(False)
    with caplog.at_level(logging.WARNING, logger=LOGGER):
        GainWarnings().after_update(model, 0)
    assert not warnings(caplog)


@pytest.mark.parametrize(
    ("dtype", "furthest", "warned"),
    [
        ("bf16", 0.0019, True),
        ("bf16", 0.0021, False),
        ("fp16", 0.0002, True),
        ("fp16", 0.0003, False),
        ("fp32", 0, False),
    ],
)
def test_gains_that_no_activation_shows_are_warned_of(caplog, dtype, furthest, warned):
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    model = get_peft_model(tiny_base.model().to(kind), GainConfig(ffn=True, task_type="CAUSAL_LM"))
    layer = model.base_model.model.model.layers[1].mlp.down_proj
    layer.gain_v["default"].data[3] = -furthest
    x = torch.linspace(1, 2, 257).to(kind)[:256, None] * torch.ones(layer.in_features, dtype=kind)
    moved = scale_features(x, layer.gain_v["default"].detach()) != x
    assert moved.any().item() is (not warned and furthest > 0)
    with caplog.at_level(logging.WARNING, logger=LOGGER):
        GainWarnings().finish(model, StageData([], NextTokenLoss(model), "prose"))
    told = [f"{str(kind)[6:]} activations show nothing below" in each for each in warnings(caplog)]
    assert told == [True] * warned


@pytest.mark.parametrize(("lr", "stages_warned"), [(0.01, 0), (0.6, 2)])
def test_a_sequence_warns_once_a_stage_and_the_adapters_say_the_same(tmp_path, caplog, lr, stages_warned):
    base = tiny_base.folder(tmp_path / "base")
    plan = tiny_domains.plan(base, tmp_path, methods=[{"name": "gain", "lr": lr}])
    with caplog.at_level(logging.WARNING, logger=LOGGER):
        run_sequence(plan, tmp_path / "run")
    told = warnings(caplog)
    assert len(told) == stages_warned
    assert all("self_attn.o_proj" in each for each in told)
    stages = survey_gains([tmp_path / "run"]).sequences[0].stages
    assert [each.figures.flipped > 0 for each in stages] == [stages_warned > 0] * 2
    saved = load_file(tmp_path / "run" / "stages" / "gain" / "01-prose" / "adapter" / WEIGHTS)
    assert stages[0].figures.largest == 1 + max(float(tensor.max()) for tensor in saved.values())


def test_the_check_changes_no_byte_of_what_is_learnt(tmp_path, monkeypatch):
    base = tiny_base.folder(tmp_path / "base")
    plan = tiny_domains.plan(base, tmp_path, methods=["gain-ffn"])
    run_sequence(plan, tmp_path / "with")
    monkeypatch.setattr(learning, "rules_of", lambda *_, **__: [])  # the same training, the rule left out
    run_sequence(plan, tmp_path / "without")
    for name in ("01-prose", "02-code"):
        position = f"stages/gain-ffn/{name}/adapter/{WEIGHTS}"
        assert (tmp_path / "with" / position).read_bytes() == (tmp_path / "without" / position).read_bytes()


def test_ia3_of_plain_peft_is_read_as_its_own_factors(tmp_path):
    torch.manual_seed(0)
    config = IA3Config(
        target_modules=["k_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        init_ia3_weights=False,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(tiny_base.model(), config)
    model.save_pretrained(tmp_path / "ia3", save_embedding_layers=False)
    factors = read_factors(tmp_path / "ia3")
    layer = model.base_model.model.model.layers[1].mlp.down_proj
    assert (
        factors.values["model.layers.1.mlp.down_proj"] == layer.ia3_l["default"].detach().double().flatten().numpy()
    ).all()
    assert factors.values["model.layers.0.self_attn.k_proj"].shape == (16,)
