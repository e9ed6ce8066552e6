"""Several adapters on one model: active together, one a row, trained, combined, copied, switched off, deleted."""

import copy
from dataclasses import replace

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForSeq2SeqLM, GenerationConfig, T5Config

from gaintune.tuners.disel import DiselConfig, disel_layers
from gaintune.tuners.gain import GainConfig, GainLayer
from support import refused
from support.tiny_models import IDS, adapter_tensors, copies, gpt2, llama, logits, opt, randomise, tokens, trainable

ADAPTERS = {  # "default", which is active, and "other"
    "gain": (GainConfig(ffn=True), GainConfig(ffn=True)),
    "disel": (DiselConfig(r=4), DiselConfig(r=2, gate_rank=3, target_modules=["o_proj", "down_proj"])),
    "gain of other layers": (GainConfig(), GainConfig(target_modules=["down_proj"], layers_to_transform=[1])),
}
both = pytest.mark.parametrize("two", ["gain", "disel"], indirect=True)
gain = pytest.mark.parametrize("two", ["gain"], indirect=True)
disel = pytest.mark.parametrize("two", ["disel"], indirect=True)
ROWS = tokens(rows=4)
ROW_ADAPTERS = ["default", "other", "__base__", "other"]


def pair(name, build=llama, task_type=None):
    """A model with two adapters, the first active."""
    first, second = (replace(config, task_type=task_type) for config in ADAPTERS[name])
    model = get_peft_model(build(), first)
    model.add_adapter("other", second)
    return randomise(randomise(model), "other", seed=4).eval()


@pytest.fixture
def two(request):
    return pair(request.param)


def alone(model, name, compute=logits):
    """What the model computes with one adapter, or with none."""
    if name == "__base__":
        with model.disable_adapter():
            return compute(model)
    model.set_adapter(name)
    return compute(model)


@both
def test_only_the_active_adapters_are_trainable(two):
    one, other = set(adapter_tensors(two)), set(adapter_tensors(two, "other"))
    assert trainable(two) == one
    two.set_adapter("other")
    assert trainable(two) == other
    two.base_model.set_adapter(["default", "other"])
    assert trainable(two) == one | other
    two(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad.abs().max() > 0 for name in ("default", "other") for p in adapter_tensors(two, name).values())


@disel
def test_an_optimizer_leaves_an_inactive_adapters_gates_alone(two):
    two.base_model.set_adapter(["default", "other"])
    two.set_requires_grad("default", requires_grad=False)
    assert trainable(two) == set(adapter_tensors(two, "other")) and any(".lora_G.other." in n for n in trainable(two))
    before = copies(two)
    optimizer = torch.optim.AdamW(two.parameters(), lr=0.1, weight_decay=0.5)
    two(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert all(torch.equal(before[name], p) for name, p in adapter_tensors(two).items())


@pytest.mark.parametrize("build", [llama, gpt2])
@pytest.mark.parametrize(
    "options", [{}, {"gate_rank": 2}, {"rank_pattern": {"o_proj": 2}}, {"gate_kind": "relu"}], ids=str
)
@pytest.mark.filterwarnings("ignore:The following rank_pattern", "ignore:fan_in_fan_out")
def test_only_the_adapter_is_updated_and_all_of_it(build, options):
    model = get_peft_model(build(), DiselConfig(**options)).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(2):  # at the first B is 0, and only B has a gradient
        optimizer.zero_grad()
        model(input_ids=ROWS, labels=ROWS).loss.backward()
        optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(adapter_tensors(model))


@gain
def test_gains_of_active_adapters_multiply(two):
    two.base_model.set_adapter(["default", "other"])
    together = logits(two)
    two.set_adapter("default")
    pairs = zip(adapter_tensors(two).values(), adapter_tensors(two, "other").values(), strict=True)
    with torch.no_grad():
        for v, w in pairs:
            v.copy_((1 + v) * (1 + w) - 1)
    torch.testing.assert_close(logits(two), together, rtol=1e-4, atol=1e-5)


def test_updates_of_active_gated_adapters_add_up():
    model = get_peft_model(nn.Sequential(nn.Linear(8, 6)), DiselConfig(r=4))
    model.add_adapter("other", DiselConfig(r=2, gate_kind="relu"))
    randomise(randomise(model), "other", seed=4)
    x = torch.randn(5, 8)
    base, updates = model.base_model.model[0].base_layer(x), []
    for name in ("default", "other"):
        model.set_adapter(name)
        updates.append(model(x) - base)
        assert updates[-1].abs().max() > 0.1
    model.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(model(x), base + updates[0] + updates[1])


@pytest.mark.parametrize(
    ("name", "build"),
    [("disel", llama), ("gain of other layers", llama), *(("gain", build) for build in (llama, gpt2, opt))],
)
def test_each_row_may_have_its_own_adapter(name, build):
    model = pair(name, build)  # OPT runs its feed-forward block on (batch * tokens, features)
    mixed = logits(model, ROWS, adapter_names=ROW_ADAPTERS)
    for row, adapter in enumerate(ROW_ADAPTERS):
        single = alone(model, adapter, lambda m, row=row: logits(m, ROWS)[row])
        torch.testing.assert_close(mixed[row], single, rtol=1e-5, atol=1e-6)


@disel
def test_a_mixed_batch_in_bf16(two):
    two.bfloat16()
    mixed = logits(two, ROWS, adapter_names=ROW_ADAPTERS)
    with two.disable_adapter():
        base = logits(two, ROWS)
    ungated = copy.deepcopy(two)
    for _, layer in disel_layers(ungated):
        for gate in layer.lora_G.values():
            gate.bias.data += 60
    close = {"rtol": 0.05, "atol": 0.02}
    torch.testing.assert_close(mixed[2], base[2], **close)
    for row, name in ((0, "default"), (1, "other"), (3, "other")):
        for model in (two, ungated):
            model.set_adapter(name)
        torch.testing.assert_close(mixed[row], logits(two, ROWS)[row], **close)
        for other in (base, logits(ungated, ROWS)):  # what no update, or an ungated one, gives is far outside of that
            assert (mixed[row] - other[row]).abs().max() > 0.1


def t5():
    torch.manual_seed(1)
    sizes = {"vocab_size": 97, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_heads": 4, "num_layers": 2}
    return AutoModelForSeq2SeqLM.from_config(T5Config(**sizes, decoder_start_token_id=0))


GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
BEAMS = {**GREEDY, "num_beams": 3}
FROM_CONFIG = {"generation_config": GenerationConfig(max_new_tokens=4, num_beams=2, pad_token_id=0)}


@pytest.mark.parametrize(
    ("build", "settings"),
    [*((build, settings) for build in (llama, opt) for settings in (GREEDY, BEAMS)), (llama, FROM_CONFIG), (t5, BEAMS)],
)
def test_generation_with_one_adapter_a_row(build, settings):
    model = pair("gain", build, task_type="SEQ_2_SEQ_LM" if build is t5 else None)
    names = ["default", "__base__", "other"]
    mixed = model.generate(input_ids=IDS, adapter_names=names, **settings)
    for row, name in enumerate(names):
        single = alone(model, name, lambda m, row=row: m.generate(input_ids=IDS[row : row + 1], **settings)[0])
        assert torch.equal(mixed[row], single)
    assert len({tuple(row.tolist()) for row in mixed[:, 0 if build is t5 else IDS.shape[1] :]}) > 1


@disel
def test_generation_with_a_cache_equals_none(two):
    options = {"input_ids": ROWS, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(two.generate(**options), two.generate(**options, use_cache=False))


@pytest.mark.parametrize("names", [["default"], ["default"] * 2, ["default"] * 6])
@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_a_wrong_number_of_names_is_refused(names, task_type):
    # three rows take neither one name (which divides 3) nor six
    model = get_peft_model(llama(), GainConfig(task_type=task_type)).eval()
    refused(ValueError, "Length of `adapter_names`", model, input_ids=IDS, adapter_names=names)
    model(input_ids=IDS)  # nothing is left behind


@gain
def test_wrong_rows_names_and_training_are_refused(two):
    layer = two.base_model.model.model.layers[0].mlp.down_proj
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        # an expert of a mixture sees some tokens of some rows, which may happen to be a multiple of the rows
        layer(torch.randn(6, 48), adapter_names=["default", "other", "default"])
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): absent"):
        two(input_ids=IDS, adapter_names=["default", "absent", "default"])
    refused(ValueError, "training mode", two.train(), input_ids=IDS, adapter_names=["default"] * 3)


@gain
def test_weighted_adapters(two):
    weights = [0.3, -1.7]
    two.add_weighted_adapter(["default", "other"], weights, "mix")
    first, second, mix = (list(adapter_tensors(two, name).values()) for name in ("default", "other", "mix"))
    assert len(mix) == 4
    for g, a, b in zip(mix, first, second, strict=True):
        expected = 1 + weights[0] * ((1 + a.double()) - 1) + weights[1] * ((1 + b.double()) - 1)
        torch.testing.assert_close(1 + g.double(), expected, rtol=0, atol=1e-6)
    assert two.active_adapters == ["default"] and trainable(two) == set(adapter_tensors(two))


def test_weighted_adapters_over_different_layers_survive_saving(tmp_path):
    model = get_peft_model(llama(), GainConfig())
    model.add_adapter("other", GainConfig(target_modules=r".*layers\.1\.mlp\.down_proj"))
    randomise(randomise(model), "other")
    model.add_weighted_adapter(["default", "other"], [1.0, 0.5], "mix")
    mix, other = adapter_tensors(model, "mix"), adapter_tensors(model, "other")
    assert len(mix) == 3
    name = "base_model.model.model.layers.1.mlp.down_proj.gain_v"
    assert torch.equal(mix[f"{name}.mix"], 0.5 * other[f"{name}.other"])
    model.set_adapter("mix")
    expected = logits(model.eval())
    model.save_pretrained(tmp_path, selected_adapters=["mix"])
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path / "mix")), expected)


@gain
def test_weighted_adapters_refuse_what_they_cannot_combine(two):
    two.add_adapter("head", GainConfig(modules_to_save=["lm_head"]))
    for names, weights, new, message in (
        (["default", "absent"], [1, 1], "mix", "does not exist"),
        (["default"], [1], "other", "already exists"),
        (["default", "other"], [1], "mix", "2 adapters and 1 weights"),
        (["default", "head"], [1, 1], "mix", "modules_to_save"),
    ):
        refused(ValueError, message, two.add_weighted_adapter, names, weights, new)
    assert set(two.peft_config) == {"default", "other", "head"}


@both
def test_disabling_gives_the_base_back_to_the_bit(two):
    base = logits(llama())
    layers = [module for module in two.modules() if isinstance(module, GainLayer)]
    assert len(layers) in (0, 4) and all(repr(layer).startswith("gain.GainLinear") for layer in layers)
    assert not torch.allclose(logits(two), base) and torch.equal(alone(two, "__base__"), base)
    assert torch.equal(logits(two.unload()), base)


@both
def test_deleting_an_adapter_leaves_the_other_and_takes_its_gates_along(two):
    expected = alone(two, "other")
    two.delete_adapter("default")
    assert torch.equal(logits(two), expected) and not adapter_tensors(two)
    assert all("default" not in layer.lora_G and "default" not in layer.lora_variant for _, layer in disel_layers(two))


@disel
def test_gates_are_observed(two):
    layers = dict(disel_layers(two))
    assert len(layers) == 14 and all(layer.gate_observers == [] for layer in layers.values())
    seen = []
    for name, layer in layers.items():
        layer.gate_observers.append(lambda adapter, gates, name=name: seen.append((name, adapter, gates)))
    logits(two, ROWS)
    assert {name for name, _, _ in seen} == set(layers) and {adapter for _, adapter, _ in seen} == {"default"}
    assert all(gates.shape == (*ROWS.shape, 4) and gates.min() >= 0 and gates.max() <= 1 for _, _, gates in seen)
    seen.clear()
    logits(two, ROWS, adapter_names=["other", "default", "default", "__base__"])
    rows = {adapter: {gates.shape for _, name, gates in seen if name == adapter} for adapter in ("default", "other")}
    assert rows == {"default": {(2, 8, 4)}, "other": {(1, 8, 2)}}
    for layer in layers.values():
        layer.gate_observers.clear()
    seen.clear()
    logits(two)
    assert not seen


def test_every_gate_is_where_its_layer_is():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8, device="meta"))
    model = get_peft_model(model, DiselConfig(r=2))
    devices = [{p.device.type for p in layer.lora_G["default"].parameters()} for _, layer in disel_layers(model)]
    assert devices == [{"cpu"}, {"meta"}]
    model.double()
    assert model.base_model.model[0].lora_G["default"].weight.dtype == torch.float64


@disel
def test_a_copy_is_a_model_of_its_own(two):
    twin, before = copy.deepcopy(two), logits(two)
    assert torch.equal(logits(twin), before)
    randomise(twin, seed=9)
    assert torch.equal(logits(two), before) and not torch.equal(logits(twin), before)


def test_layers_to_transform_and_replication():
    model = get_peft_model(llama(), DiselConfig(target_modules=["o_proj"], layers_to_transform=[1]))
    assert [name for name, _ in disel_layers(model)] == ["base_model.model.model.layers.1.self_attn.o_proj"]
    layers = dict(disel_layers(get_peft_model(llama(), DiselConfig(layer_replication=[(0, 2), (1, 2)]))))
    assert len(layers) == 21 and any(".layers.2." in name for name in layers)
    assert len({id(layer.lora_G["default"]) for layer in layers.values()}) == 21


def test_mixing_with_other_methods_in_one_mixed_model_is_refused():
    refused(ValueError, "not compatible", get_peft_model, llama(), GainConfig(), mixed=True)
