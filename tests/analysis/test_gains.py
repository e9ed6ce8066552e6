"""Figures of factors read from saved adapters, by stage and layer; regimes, tables, refusals; warnings in training."""

import json
import logging

import numpy as np
import pandas as pd
import pytest
import torch
from peft import IA3Config, get_peft_model
from safetensors.torch import load_file

from gaintune.analysis import survey_gains, write_result
from gaintune.analysis.gains.report import layer_table, markdown, result, stage_table, verdict
from gaintune.analysis.gains.survey import describe, read_factors, regime_of
from gaintune.errors import AdapterError, ConfigError, RunDirectoryError
from gaintune.methods import StageData
from gaintune.methods.rules import GainWarnings
from gaintune.models import NextTokenLoss
from gaintune.training import loop as learning
from gaintune.tuners.gain import GainConfig
from gaintune.tuners.gain.layer import scale_features
from gaintune.workflows import run_sequence
from support import refused, saved_factors, tiny_base, tiny_domains

O_PROJ = [f"model.layers.{layer}.self_attn.o_proj" for layer in range(3)]
DOWN = [f"model.layers.{layer}.mlp.down_proj" for layer in range(3)]


def gains(seed: int, scale: float = 0.04) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = {**dict.fromkeys(O_PROJ, 6), **dict.fromkeys(DOWN, 10)}
    return {name: scale * torch.randn(size, generator=generator) for name, size in sizes.items()}


def flipped(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One gain of -0.25, and one whole layer at exactly 0."""
    tensors[O_PROJ[0]][3] = -1.25
    tensors[DOWN[2]] = torch.full((10,), -1.0)
    return tensors


@pytest.fixture
def run(tmp_path):
    stages = [gains(0), gains(1, 0.08), flipped(gains(2, 0.1))]
    lora = {name: torch.ones(1, 6) for name in O_PROJ}
    ia3 = {"model.layers.0.self_attn.k_proj": torch.tensor([[1.0], [0.9], [1.2]])}
    methods = {"gain-ffn": ("GAIN", stages), "lora": ("LORA", [lora]), "ia3": ("IA3", [ia3])}
    return saved_factors.run(tmp_path / "run", methods, ["prose", "code", "law", "news"])


def test_figures_count_both_ends_and_everything_at_or_below_zero():
    figures = describe(np.array([0.95, 1.05, 1.0500001, 1.06, 0.9499, 0.0, -0.5, 1.0]))
    assert (figures.count, figures.smallest, figures.largest, figures.flipped) == (8, -0.5, 1.06, 2)
    assert (figures.near, figures.mean) == (pytest.approx(4 / 8), pytest.approx(5.5599001 / 8))
    assert describe(1 + torch.tensor([0.05, -0.05]).double().numpy()).near == 1.0  # as fp32 keeps them
    refused(ValueError, "no factor", describe, np.array([]))


@pytest.mark.parametrize(("flips", "planned", "regime"), [
    ([0, 0, 0], 8, "stable"),
    ([0, 3, 9], 8, "unstable"),  # the paper: negative by domain 2
    ([0, 0, 0, 0, 1], 8, "mildly unstable"),  # the paper: negative by domain 5
    ([0, 0, 0, 2], 8, "unstable"),
    ([5], 1, "unstable"),
])  # fmt: skip
def test_the_regime_is_when_the_first_sign_flips(flips, planned, regime):
    assert regime_of(flips, planned) == regime


def test_a_run_is_read_stage_by_stage_and_methods_without_factors_are_named(run):
    survey = survey_gains([run])
    sequences = [(each.label, len(each.stages), each.planned) for each in survey.sequences]
    assert sequences == [("gain-ffn", 3, 4), ("ia3", 1, 4)]
    assert survey.left_out == ("lora",) and "left out: lora" in markdown(survey)
    for index, (stage, domain) in enumerate(zip(survey.sequences[0].stages, ("prose", "code", "law"), strict=True)):
        tensors = [gains(0), gains(1, 0.08), flipped(gains(2, 0.1))][index]
        values = 1 + torch.cat(list(tensors.values())).double().numpy()
        assert (stage.index, stage.domain, stage.figures.count) == (index, domain, 48)
        assert (stage.figures.smallest, stage.figures.largest) == (values.min(), values.max())
        assert stage.figures.near == np.mean([0.95 <= value <= 1.05 for value in values])
        assert stage.figures.deviation == pytest.approx(values.std())
        assert stage.figures.flipped == (0, 0, 11)[index]
        assert [each.position.name for each in stage.layers] == [kind[n] for n in range(3) for kind in (O_PROJ, DOWN)]
        assert [each.position.depth for each in stage.layers] == ["early"] * 2 + ["middle"] * 2 + ["late"] * 2
        assert stage.of("o_proj").count == 18 and stage.of("down_proj").count == 30
    assert survey.sequences[1].stages[0].figures.largest == pytest.approx(1.2)  # (IA)3 stores the factor itself
    assert survey.sequences[0].regime == "mildly unstable" and survey.sequences[1].regime == "stable"
    assert "first after stage 3 (law), 3 of 4 stages looked at" in verdict(survey.sequences[0])
    assert "positive after 1 of 4 stages" in verdict(survey.sequences[1])


def test_tables_figures_and_provenance_are_written(run, tmp_path):
    out = tmp_path / "out"
    write_result("gains", result(survey_gains([run])), out)
    last = pd.read_csv(out / "gains.csv").set_index(["sequence", "stage", "projection"]).loc[("gain-ffn", 3)]
    assert last.loc[["all", "o_proj"], "flipped"].tolist() == [11, 1] and last.loc["o_proj", "smallest"] == -0.25
    layers = pd.read_csv(out / "gains-layers.csv").set_index(["sequence", "stage", "module"])
    assert len(layers) == 3 * 6 + 1 and layers.loc[("gain-ffn", 3, DOWN[2]), "largest"] == 0
    saved = json.loads((out / "gains.json").read_text())
    assert saved["sequences"][0]["regime"] == "mildly unstable" and saved["left_out"] == ["lora"]
    adapters = saved["provenance"]["adapters"]
    assert (adapters[2]["domains"], adapters[0]["base_fingerprint"]) == (["prose", "code", "law"], "f" * 64)
    assert saved["provenance"]["environment"]["packages"]["torch"]
    figures = {f"gains-{name}.{kind}" for name in ("heatmap", "trajectory") for kind in ("png", "svg")}
    texts = {"gains.csv", "gains-layers.csv", "gains.md", "gains.json"}
    assert {file.name for file in out.iterdir()} == figures | texts
    assert "| 3 law | -0.250 |" in (out / "gains.md").read_text()


def test_several_runs_and_adapters_stand_beside_one_another(run, tmp_path):
    half = {name: tensor.bfloat16() for name, tensor in gains(5).items()}
    alone = saved_factors.adapter(tmp_path / "alone", half, domains=("prose", "law"))
    assert (read_factors(alone).values[DOWN[1]] == 1 + half[DOWN[1]].double().numpy()).all()
    survey = survey_gains([run, alone])
    assert [each.label for each in survey.sequences] == ["run: gain-ffn", "run: ia3", "gain-ffn on law"]
    single = survey.sequences[2]
    assert (single.stages[0].domain, single.stages[0].index, single.planned, single.regime) == ("law", 1, 2, None)
    assert "positive after 1 of 2 stages" in verdict(single)
    assert len(stage_table(survey)) == 3 * 3 + 2 + 3
    twin = saved_factors.adapter(tmp_path / "twin", half, domains=("prose", "law"))
    labels = [each.label for each in survey_gains([twin, alone]).sequences]
    assert labels == ["gain-ffn on law (twin)", "gain-ffn on law (alone)"]
    deep = saved_factors.adapter(twin / "alone", half, domains=("prose", "law"))
    assert survey_gains([twin, deep]).sequences[0].label == f"gain-ffn on law ({twin})"
    assert len(layer_table(survey)) == 18 + 1 + 6


def test_the_regime_of_an_adapter_whose_earlier_stages_were_not_seen_is_unknown(tmp_path):
    late = saved_factors.adapter(tmp_path / "late", flipped(gains(2, 0.1)), domains=("prose", "code", "law"))
    first = saved_factors.adapter(tmp_path / "first", flipped(gains(2, 0.1)), domains=("prose",))
    unknown, known = survey_gains([late, first]).sequences
    assert (unknown.regime, known.regime) == (None, "unstable")
    assert "regime unknown" in verdict(unknown) and "seen after stage 3 (law), 1 of 3 stages" in verdict(unknown)


def test_what_has_no_factors_is_refused_in_one_line(run, tmp_path):
    refused(AdapterError, "method lora has no gains", survey_gains, [run / "stages" / "lora" / "01-prose" / "adapter"])
    refused(AdapterError, "no such folder", survey_gains, [tmp_path / "missing"])
    refused(AdapterError, "not an adapter", survey_gains, [tmp_path])
    for paths in ([], [run, run]):
        refused(ConfigError, "each once", survey_gains, paths)
    broken = saved_factors.adapter(tmp_path / "broken", {O_PROJ[1]: torch.tensor([0.1, float("nan")])})
    refused(AdapterError, rf"gains of {O_PROJ[1]} are not finite", survey_gains, [broken])
    (broken / "manifest.json").unlink()
    refused(AdapterError, "damaged adapter", survey_gains, [broken])
    lora = saved_factors.run(tmp_path / "loras", {"lora": ("LORA", [{O_PROJ[0]: torch.ones(1, 6)}])}, ["prose"])
    refused(AdapterError, "none of its methods has gains", survey_gains, [lora])
    empty = saved_factors.run(tmp_path / "empty", {"gain": ("GAIN", [])}, ["prose"])
    refused(RunDirectoryError, "no adapter yet", survey_gains, [empty])


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
    (warning,) = warnings(caplog)
    assert "after update 3, 2 of 160 gains" in warning
    assert "the lowest, -0.500, in model.layers.1.mlp.down_proj" in warning


def test_gains_that_do_not_train_are_not_checked(caplog):
    model = get_peft_model(tiny_base.model(), GainConfig(task_type="CAUSAL_LM"))
    model.base_model.model.model.layers[0].self_attn.o_proj.gain_v["default"].data.fill_(-2)
    model.requires_grad_(False)
    with caplog.at_level(logging.WARNING, logger=LOGGER):
        GainWarnings().after_update(model, 0)
    assert not warnings(caplog)


@pytest.mark.parametrize(("dtype", "furthest", "warned"), [
    ("bf16", 0.0019, True), ("bf16", 0.0021, False), ("fp16", 0.0002, True), ("fp16", 0.0003, False),
    ("fp32", 0, False),
])  # fmt: skip
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
    named = [f"{str(kind)[6:]} activations show nothing below" in each for each in warnings(caplog)]
    assert named == [True] * warned


@pytest.mark.parametrize(("lr", "stages_warned"), [(0.01, 0), (0.6, 2)])
def test_a_sequence_warns_once_a_stage_and_the_adapters_agree(tmp_path, caplog, lr, stages_warned):
    plan = tiny_domains.plan(tiny_base.folder(tmp_path / "base"), tmp_path, methods=[{"name": "gain", "lr": lr}])
    with caplog.at_level(logging.WARNING, logger=LOGGER):
        run_sequence(plan, tmp_path / "run")
    assert len(warnings(caplog)) == stages_warned
    assert all("self_attn.o_proj" in each for each in warnings(caplog))
    stages = survey_gains([tmp_path / "run"]).sequences[0].stages
    assert [each.figures.flipped > 0 for each in stages] == [stages_warned > 0] * 2
    saved = load_file(tmp_path / "run" / "stages" / "gain" / "01-prose" / "adapter" / WEIGHTS)
    assert stages[0].figures.largest == 1 + max(float(tensor.max()) for tensor in saved.values())


def test_the_check_changes_no_byte_of_what_is_trained(tmp_path, monkeypatch):
    plan = tiny_domains.plan(tiny_base.folder(tmp_path / "base"), tmp_path, methods=["gain-ffn"])
    run_sequence(plan, tmp_path / "with")
    monkeypatch.setattr(learning, "rules_of", lambda *_, **__: [])  # the same training, the rule left out
    run_sequence(plan, tmp_path / "without")
    for name in ("01-prose", "02-code"):
        position = f"stages/gain-ffn/{name}/adapter/{WEIGHTS}"
        assert (tmp_path / "with" / position).read_bytes() == (tmp_path / "without" / position).read_bytes()


def test_ia3_of_plain_peft_is_read_as_its_own_factors(tmp_path):
    torch.manual_seed(0)
    modules = {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    model = get_peft_model(tiny_base.model(), IA3Config(**modules, init_ia3_weights=False, task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "ia3", save_embedding_layers=False)
    factors = read_factors(tmp_path / "ia3")
    layer = model.base_model.model.model.layers[1].mlp.down_proj
    expected = layer.ia3_l["default"].detach().double().flatten().numpy()
    assert (factors.values["model.layers.1.mlp.down_proj"] == expected).all()
    assert factors.values["model.layers.0.self_attn.k_proj"].shape == (16,)
