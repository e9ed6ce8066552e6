"""`disel` and `gated-lora` of the catalogue: start, options, learning, size, saving and loading, resuming."""

import shutil

import pytest
import torch

from gaintune.adapters import AdapterRecord, load_adapter, save_adapter
from gaintune.config import MethodConfig, ModelConfig, TrainConfig
from gaintune.data import Examples
from gaintune.errors import AdapterError, ConfigError
from gaintune.methods import METHODS, StagePosition, attach, check_method, prepare_method, trainable_parameters
from gaintune.models import load_base
from gaintune.training import train_stage
from gaintune.tuners import parameter_groups
from gaintune.workflows import merge_adapter
from support import tiny_base

D, FFN, KV, LAYERS = 32, 48, 16, 2
LINEARS = [(D, D), (D, KV), (D, KV), (D, D), (D, FFN), (D, FFN), (FFN, D)]  # (in, out) of q k v o gate up down
LORA = LAYERS * sum(sum(shape) for shape in LINEARS)  # trained numbers for each rank
GATES = LAYERS * sum(inputs + 1 for inputs, _ in LINEARS)
SIZES = {
    "disel": ({}, 8 * (LORA + GATES)),
    "disel, rank 2": ({"rank": 2}, 2 * (LORA + GATES)),
    "disel, gate rank 3": ({"gate_rank": 3}, 8 * LORA + LAYERS * sum(3 * i + 8 * 3 + 8 for i, _ in LINEARS)),
    "gated-lora": ({}, 8 * LORA),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_base.folder(tmp_path_factory.mktemp("base"))


def base_of(folder):
    return load_base(ModelConfig(name=str(folder), dtype="bf16", device="cpu"))


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(tiny_base.blocks(2, 16, seed=9)).logits


def taught(model, method, checkpoints, steps=4, checkpoint_steps=100):
    plan = TrainConfig(batch_size=4, epochs=steps, lr=0.02, weight_decay=0.1, checkpoint_steps=checkpoint_steps)
    rows = Examples.of_blocks(tiny_base.blocks(4, 16))
    prepared = prepare_method(method, ModelConfig(dtype="bf16", device="cpu"), plan)
    return train_stage(model, prepared, rows, plan, StagePosition(), checkpoints=checkpoints)


@pytest.mark.parametrize("case", SIZES)
def test_it_starts_at_the_base_learns_and_is_loaded_as_it_was(folder, tmp_path, case):
    options, size = SIZES[case]
    method = MethodConfig.model_validate({"name": case.partition(",")[0], **options})
    base = base_of(folder)
    before = logits(base.model)
    model = attach(base.model, method, seed=0)
    assert torch.equal(logits(model), before)
    assert trainable_parameters(model) == size
    losses = taught(model, method, tmp_path / "checkpoints").losses
    assert losses[-1] < losses[0] - 0.05
    after = logits(model)
    record = AdapterRecord("tiny", base.fingerprint, method.name, "x", ("prose",))
    save_adapter(model, tmp_path / "adapter", record)
    assert torch.equal(logits(load_adapter(base_of(folder), tmp_path / "adapter")), after)


def test_a_stopped_adaptation_ends_with_the_same_bytes(folder, tmp_path):
    method = MethodConfig(name="disel", rank=2)
    model = attach(base_of(folder).model, method, seed=0)
    taught(model, method, tmp_path, checkpoint_steps=2)
    shutil.rmtree(tmp_path / "checkpoint-4")
    again = attach(base_of(folder).model, method, seed=0)
    taught(again, method, tmp_path, checkpoint_steps=2)
    whole, resumed = dict(model.named_parameters()), dict(again.named_parameters())
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_options_reach_the_adapter_and_the_optimizer(folder):
    method = MethodConfig(
        name="disel", rank=4, alpha=3, gate_bias=-7, gate_lr_ratio=2, gate_rank=2, targets=("o_proj",)
    )
    model = attach(base_of(folder).model, method, seed=0)
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.gate_bias_init, config.gate_rank) == (4, 3, -7, 2)
    assert config.target_modules == {"o_proj"}
    for multipliers in (METHODS[method.name].rates(method), None):
        groups = parameter_groups(model, 0.01, 0.1, multipliers)
        rates = {(group["lr"], group["weight_decay"]) for group in groups if "lora_G" in group["name"]}
        assert rates == {(0.02, 0.0)}
    assert attach(base_of(folder).model, MethodConfig(name="disel"), seed=0).peft_config["default"].gate_lr_ratio == 5.0


@pytest.mark.parametrize("option", ["gate_bias", "gate_lr_ratio", "gate_rank"])
def test_gated_lora_has_no_gates_to_set(option):
    with pytest.raises(ConfigError, match=f"no option '{option}'"):
        check_method(MethodConfig.model_validate({"name": "gated-lora", option: 1}))


def test_merging_is_refused_before_a_model_is_loaded(folder, tmp_path):
    base = base_of(folder)
    model = attach(base.model, MethodConfig(name="disel", rank=2), seed=0)
    save_adapter(model, tmp_path / "adapter", AdapterRecord("tiny", base.fingerprint, "disel", "x", ("prose",)))
    with pytest.raises(AdapterError, match="an adapter of type DISEL has no weights to merge"):
        merge_adapter(tmp_path / "adapter", tmp_path / "out", texts=["some text"])
