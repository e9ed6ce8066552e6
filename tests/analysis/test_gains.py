"""Factors read from saved adapters are those that were put there; regimes, sign flips, and the warning in training."""

import json
import logging
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from peft import IA3Config, get_peft_model
from safetensors.torch import load_file, save_file

import tiny_base
import tiny_domains
from gaintune.analysis.gain_factors import read_factors
from gaintune.analysis.gain_report import layer_table, markdown, stage_table, verdict, write
from gaintune.analysis.gains import describe, regime_of, survey_gains
from gaintune.errors import AdapterError, ConfigError
from gaintune.runs import write_manifest
from gaintune.sequence import run_sequence
from gaintune.tuners.gain import GainConfig

O_PROJ, DOWN = "model.layers.0.self_attn.o_proj", "model.layers.1.mlp.down_proj"
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tiny run of two stages, with gains, (IA)3 and LoRA."""
    folder = tmp_path_factory.mktemp("gains")
    base = tiny_base.folder(folder / "base")
    plan = tiny_domains.plan(base, folder, methods=["gain-ffn", "ia3", {"name": "lora", "rank": 2}])
    run_sequence(plan, folder / "run")
    return folder / "run"


def stage(run, label, name):
    return run / "stages" / label / name / "adapter"


def put(folder, changes: dict[str, torch.Tensor]):
    """Write values into an adapter's tensors, as training would have left them."""
    tensors = load_file(folder / WEIGHTS)
    for name, values in changes.items():
        key = f"base_model.model.{name}.gain_v"
        tensors[key] = values.expand_as(tensors[key]).clone()
    save_file(tensors, folder / WEIGHTS)
    write_manifest(folder)


def test_figures_count_both_ends_and_everything_at_or_below_zero():
    figures = describe(np.array([0.95, 1.05, 1.0500001, 1.06, 0.9499, 0.0, -0.5, 1.0]))
    assert (figures.count, figures.smallest, figures.largest, figures.flipped) == (8, -0.5, 1.06, 2)
    assert figures.near == pytest.approx(4 / 8)
    assert figures.mean == pytest.approx(5.5599001 / 8)
    with pytest.raises(ValueError, match="no factor"):
        describe(np.array([]))


@pytest.mark.parametrize(
    ("flipped", "planned", "regime"),
    [
        ([0, 0, 0], 8, "stable"),
        ([0, 3, 9], 8, "unstable"),  # the paper: negative by domain 2
        ([0, 0, 0, 0, 1], 8, "mildly unstable"),  # the paper: negative by domain 5
        ([0, 0, 0, 2], 8, "unstable"),
        ([5], 1, "unstable"),
    ],
)
def test_the_regime_is_when_the_first_sign_flips(flipped, planned, regime):
    assert regime_of(flipped, planned) == regime


def test_a_run_is_read_stage_by_stage_and_methods_without_factors_are_named(run):
    survey = survey_gains([run])
    assert [(each.label, len(each.stages)) for each in survey.sequences] == [("gain-ffn", 2), ("ia3", 2)]
    assert survey.left_out == ("lora",)
    assert "left out: lora" in markdown(survey)
    gains, ia3 = survey.sequences
    assert gains.regime == "stable" and gains.planned == 2
    for index, (one, name) in enumerate(zip(gains.stages, ("01-prose", "02-code"), strict=True)):
        saved = load_file(stage(run, "gain-ffn", name) / WEIGHTS)
        values = 1 + torch.cat([tensor.double() for tensor in saved.values()]).numpy()
        assert (one.index, one.domain, one.figures.count) == (index, name[3:], 2 * (32 + 48))
        assert one.figures.smallest == values.min() and one.figures.largest == values.max()
        assert one.figures.near == ((values >= 0.95 - 1e-6) & (values <= 1.05 + 1e-6)).mean()
        assert one.figures.deviation == pytest.approx(values.std())
        assert [each.place.projection for each in one.layers] == ["o_proj", "down_proj"] * 2
    assert ia3.stages[0].figures.count == 2 * (16 + 16 + 48)  # keys, values and what enters the down-projection
    saved = load_file(stage(run, "ia3", "01-prose") / WEIGHTS)
    assert ia3.stages[0].figures.largest == max(float(tensor.max()) for tensor in saved.values())


def test_sign_flips_change_the_regime_and_stand_in_the_tables(run, tmp_path):
    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    put(stage(copied, "gain-ffn", "02-code"), {O_PROJ: torch.tensor(-1.25), DOWN: torch.tensor(-1.0)})
    survey = survey_gains([copied])
    gains = survey.sequences[0]
    assert gains.regime == "mildly unstable"
    assert "from stage 2 (code) on" in verdict(gains)
    out = tmp_path / "out"
    write(survey, out)
    stages = pd.read_csv(out / "gains.csv").set_index(["sequence", "stage", "projection"])
    assert stages.loc[("gain-ffn", 2, "all"), "flipped"] == 32 + 48
    assert stages.loc[("gain-ffn", 2, "o_proj"), "flipped"] == 32
    assert stages.loc[("gain-ffn", 1, "all"), "flipped"] == 0
    layers = pd.read_csv(out / "gains-layers.csv").set_index(["sequence", "stage", "module"])
    assert layers.loc[("gain-ffn", 2, O_PROJ), "smallest"] == -0.25
    assert layers.loc[("gain-ffn", 2, DOWN), "largest"] == 0
    told = json.loads((out / "gains.json").read_text())
    assert told["sequences"][0]["regime"] == "mildly unstable"
    assert len(told["provenance"]["adapters"]) == 4
    assert told["provenance"]["adapters"][0]["base_fingerprint"]
    figures = {f"gains-{name}.{kind}" for name in ("heatmap", "trajectory") for kind in ("png", "svg")}
    assert {file.name for file in out.iterdir()} == figures | {
        "gains.csv", "gains-layers.csv", "gains.md", "gains.json",
    }  # fmt: skip


def test_an_adapter_alone_is_one_stage_and_half_precision_is_widened(tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(tiny_base.model(), GainConfig(task_type="CAUSAL_LM", init_weights=False))
    model.save_pretrained(tmp_path / "plain", save_embedding_layers=False)
    survey = survey_gains([tmp_path / "plain"])
    (sequence,) = survey.sequences
    assert (len(sequence.stages), sequence.planned) == (1, 1)
    saved = load_file(tmp_path / "plain" / WEIGHTS)
    halved = {name: tensor.bfloat16() for name, tensor in saved.items()}
    save_file(halved, tmp_path / "plain" / WEIGHTS)
    factors = read_factors(tmp_path / "plain")
    key = f"base_model.model.{O_PROJ}.gain_v"
    assert (factors.values[O_PROJ] == 1 + halved[key].double().numpy()).all()
    assert len(stage_table(survey)) == 2 and len(layer_table(survey)) == 2  # one projection, and all; two layers


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
    assert (factors.values[DOWN] == layer.ia3_l["default"].detach().double().flatten().numpy()).all()
    assert factors.values["model.layers.0.self_attn.k_proj"].shape == (16,)


def test_what_has_no_factors_is_refused_in_one_line(run, tmp_path):
    with pytest.raises(AdapterError, match="method lora has no gains"):
        survey_gains([stage(run, "lora", "01-prose")])
    with pytest.raises(AdapterError, match="no such folder"):
        survey_gains([tmp_path / "missing"])
    with pytest.raises(AdapterError, match="not an adapter"):
        survey_gains([tmp_path])
    with pytest.raises(ConfigError, match="each once"):
        survey_gains([run, run])
    with pytest.raises(ConfigError, match="each once"):
        survey_gains([])
    copied = tmp_path / "adapter"
    shutil.copytree(stage(run, "gain-ffn", "01-prose"), copied)
    put(copied, {O_PROJ: torch.tensor(float("nan"))})
    with pytest.raises(AdapterError, match=rf"gains of {O_PROJ} are not finite"):
        survey_gains([copied])
    (copied / "manifest.json").unlink()
    with pytest.raises(AdapterError, match="damaged adapter"):
        survey_gains([copied])


@pytest.mark.parametrize(("lr", "stages_warned"), [(0.01, 0), (0.6, 2)])
def test_training_warns_once_a_stage_when_gains_fall_below_zero(tmp_path, caplog, lr, stages_warned):
    base = tiny_base.folder(tmp_path / "base")
    plan = tiny_domains.plan(base, tmp_path, methods=[{"name": "gain", "lr": lr}])
    with caplog.at_level(logging.WARNING, logger="gaintune.gain_signs"):
        run_sequence(plan, tmp_path / "run")
    told = [record.getMessage() for record in caplog.records if record.name == "gaintune.gain_signs"]
    assert len(told) == stages_warned
    assert all("are at or below 0 (the lowest, -" in each and "self_attn.o_proj" in each for each in told)
    flipped = [each.figures.flipped > 0 for each in survey_gains([tmp_path / "run"]).sequences[0].stages]
    assert flipped == [stages_warned > 0] * 2


def test_the_check_changes_no_byte_of_what_is_learnt(tmp_path, monkeypatch):
    """The same stage with and without it; a mock of nothing, the rule is only left out."""
    from gaintune import learning

    base = tiny_base.folder(tmp_path / "base")
    plan = tiny_domains.plan(base, tmp_path, methods=["gain-ffn"])
    run_sequence(plan, tmp_path / "with")
    monkeypatch.setattr(learning, "rules_of", lambda *_, **__: [])
    run_sequence(plan, tmp_path / "without")
    for name in ("01-prose", "02-code"):
        pair = [load_file(stage(tmp_path / each, "gain-ffn", name) / WEIGHTS) for each in ("with", "without")]
        assert all(torch.equal(pair[0][key], pair[1][key]) for key in pair[0])
