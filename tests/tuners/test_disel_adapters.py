"""Several DISeL adapters on one model: active together, in mixed batches, trained, switched off, deleted."""

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn

from gaintune.tuners.disel import DiselConfig, disel_layers
from support import tiny_models

IDS = tiny_models.tokens(rows=4)


@torch.no_grad()
def logits(model, **kwargs):
    return model(input_ids=IDS, **kwargs).logits


@pytest.fixture
def two():
    """A model with adapters 'default' (rank 4, active) and 'other' (rank 2, a low-rank gate, fewer modules)."""
    model = get_peft_model(tiny_models.llama(), DiselConfig(r=4))
    model.add_adapter("other", DiselConfig(r=2, gate_rank=3, target_modules=["o_proj", "down_proj"]))
    tiny_models.randomise_disel(model)
    return tiny_models.randomise_disel(model, "other", seed=4).eval()


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_an_inactive_adapters_gates_do_not_train(two):
    assert trainable(two) == set(tiny_models.adapter_tensors(two))
    two.set_adapter("other")
    assert trainable(two) == set(tiny_models.adapter_tensors(two, "other"))
    assert any(".lora_G.other." in name for name in trainable(two))
    two.base_model.set_adapter(["default", "other"])
    assert trainable(two) == set(tiny_models.adapter_tensors(two)) | set(tiny_models.adapter_tensors(two, "other"))
    two.set_requires_grad("default", requires_grad=False)
    assert trainable(two) == set(tiny_models.adapter_tensors(two, "other"))
    before = {name: p.detach().clone() for name, p in tiny_models.adapter_tensors(two).items()}
    optimizer = torch.optim.AdamW(two.parameters(), lr=0.1, weight_decay=0.5)
    two(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert all(torch.equal(before[name], p) for name, p in tiny_models.adapter_tensors(two).items())


@pytest.mark.parametrize("build", [tiny_models.llama, tiny_models.gpt2])
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
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(tiny_models.adapter_tensors(model))


def test_active_adapters_add_up():
    model = get_peft_model(nn.Sequential(nn.Linear(8, 6)), DiselConfig(r=4))
    model.add_adapter("other", DiselConfig(r=2, gate_kind="relu"))
    tiny_models.randomise_disel(tiny_models.randomise_disel(model), "other", seed=4)
    x = torch.randn(5, 8)
    base = model.base_model.model[0].base_layer(x)
    updates = []
    for name in ("default", "other"):
        model.set_adapter(name)
        updates.append(model(x) - base)
        assert updates[-1].abs().max() > 0.1
    model.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(model(x), base + updates[0] + updates[1])


def test_mixed_batches(two):
    names = ["default", "other", "__base__", "other"]
    mixed = logits(two, adapter_names=names)
    for row, name in enumerate(names):
        if name == "__base__":
            with two.disable_adapter():
                alone = logits(two)[row]
        else:
            two.set_adapter(name)
            alone = logits(two)[row]
        torch.testing.assert_close(mixed[row], alone)


def test_a_mixed_batch_in_bf16(two):
    two.bfloat16()
    names = ["default", "other", "__base__", "other"]
    mixed = logits(two, adapter_names=names)
    with two.disable_adapter():
        base = logits(two)
    ungated = copy.deepcopy(two)
    for _, layer in disel_layers(ungated):
        for gate in layer.lora_G.values():
            gate.bias.data += 60
    close = {"rtol": 0.05, "atol": 0.02}
    torch.testing.assert_close(mixed[2], base[2], **close)
    for row, name in ((0, "default"), (1, "other"), (3, "other")):
        for model in (two, ungated):
            model.set_adapter(name)
        torch.testing.assert_close(mixed[row], logits(two)[row], **close)
        for other in (base, logits(ungated)):  # what no update, or an ungated one, would give is far outside of that
            assert (mixed[row] - other[row]).abs().max() > 0.1


def test_disabling_gives_the_base_back_to_the_bit(two):
    expected = logits(two.unload())
    model = tiny_models.randomise_disel(get_peft_model(tiny_models.llama(), DiselConfig(r=4))).eval()
    assert not torch.allclose(logits(model), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)


def test_deleting_takes_the_gates_along(two):
    two.set_adapter("other")
    expected = logits(two)
    two.delete_adapter("default")
    assert torch.equal(logits(two), expected)
    assert not tiny_models.adapter_tensors(two)
    assert all("default" not in layer.lora_G and "default" not in layer.lora_variant for _, layer in disel_layers(two))


def test_gates_are_observed(two):
    layers = dict(disel_layers(two))
    assert len(layers) == 14 and all(layer.gate_observers == [] for layer in layers.values())
    seen = []
    for name, layer in layers.items():
        layer.gate_observers.append(lambda adapter, gates, name=name: seen.append((name, adapter, gates)))
    logits(two)
    assert {name for name, _, _ in seen} == set(layers) and {adapter for _, adapter, _ in seen} == {"default"}
    assert all(gates.shape == (*IDS.shape, 4) and gates.min() >= 0 and gates.max() <= 1 for _, _, gates in seen)
    seen.clear()
    logits(two, adapter_names=["other", "default", "default", "__base__"])
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


def test_a_copy_is_a_model_of_its_own(two):
    twin = copy.deepcopy(two)
    assert torch.equal(logits(twin), logits(two))
    before = logits(two)
    tiny_models.randomise_disel(twin, seed=9)
    assert torch.equal(logits(two), before) and not torch.equal(logits(twin), before)


def test_layers_to_transform_and_replication():
    model = get_peft_model(tiny_models.llama(), DiselConfig(target_modules=["o_proj"], layers_to_transform=[1]))
    assert [name for name, _ in disel_layers(model)] == ["base_model.model.model.layers.1.self_attn.o_proj"]
    model = get_peft_model(tiny_models.llama(), DiselConfig(layer_replication=[(0, 2), (1, 2)]))
    names = [name for name, _ in disel_layers(model)]
    assert len(names) == 21 and any(".layers.2." in name for name in names)
    assert len({id(layer.lora_G["default"]) for _, layer in disel_layers(model)}) == 21


def test_generation_with_a_cache_equals_none(two):
    with torch.no_grad():
        options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        cached = two.generate(input_ids=IDS, **options)
        assert torch.equal(cached, two.generate(input_ids=IDS, use_cache=False, **options))
