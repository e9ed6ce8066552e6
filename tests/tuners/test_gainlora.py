"""GainLoRA: the function and gradients against float64, a branch a domain, gates shut on earlier inputs, refusals."""

import math

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from gaintune.errors import ConfigError, MergeError, UnsupportedModuleError
from gaintune.tuners.gainlora import (
    GainloraConfig,
    GainloraLinear,
    add_branch,
    gainlora_layers,
    normalized,
    outside,
    widened_basis,
)
from support import refused
from support.tiny_models import IDS, gpt2, llama, logits

IN, OUT, RANK = 12, 5, 3
NAMES = ("gainlora_A", "gainlora_B", "gainlora_gate")


def wrapped(base, branches=1, **options):
    return randomized(get_peft_model(base, GainloraConfig(r=RANK, branches=branches, **options)))


def randomized(model, adapter="default", seed=3):
    """Give every value of an adapter an effect, the frozen ones too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".gainlora_" in name and f".{adapter}" in name:
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return model


def single(kind=nn.Linear):
    return nn.Sequential(nn.Linear(IN, OUT) if kind is nn.Linear else Conv1D(OUT, IN))


def layer_of(model) -> GainloraLinear:
    return dict(gainlora_layers(model, "default"))["0"]


def bases_of(model, count):
    """A random orthonormal basis of `count` directions for every module."""
    made = {}
    for name, layer in gainlora_layers(model, "default"):
        made[name] = torch.linalg.qr(torch.randn(layer.in_features, count, dtype=torch.float64))[0]
    return made


def reference(x, layer, scaling):
    """The sum over branches, token by token, with each branch's gate as a logistic function, in float64."""
    base = layer.get_base_layer()
    weight = base.weight if isinstance(base, nn.Linear) else base.weight.T
    tensors = {name: [getattr(layer, name)["default"]] for name in NAMES}
    for name in NAMES:
        old = getattr(layer, name.replace("gainlora_", "gainlora_old_"))["default"]
        axis = 1 if name == "gainlora_B" else 0
        parts = list(old) if name == "gainlora_gate" else old.split(RANK, dim=axis) if old.numel() else []
        tensors[name] = [*parts, *tensors[name]]
    branches = [[part.double() for part in parts] for parts in zip(*tensors.values(), strict=True)]
    outputs = []
    for token in x.reshape(-1, IN):
        y = weight.double() @ token + base.bias.double()
        size = (token.pow(2).sum() / IN + 1e-6).sqrt()
        for a, b, w in branches:
            gate = (2 / (1 + torch.exp(-(w @ token) / size)) - 1).abs()
            y = y + scaling * gate * (b @ (a @ token))
        outputs.append(y)
    return torch.stack(outputs).reshape(*x.shape[:-1], OUT)


@pytest.mark.parametrize("branches", [1, 2, 3])
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_output_and_gradients_are_those_of_a_sum_of_gated_branches(kind, branches):
    model = wrapped(single(kind), branches, lora_alpha=4.5)
    layer = layer_of(model)
    x, g = torch.randn(4, 6, IN), torch.randn(4, 6, OUT)
    ours, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    result = model(ours)
    result.backward(g)
    found = {name: getattr(layer, name)["default"].grad.clone() for name in NAMES}
    model.zero_grad()
    expected = reference(exact, layer, 4.5 / RANK)
    expected.backward(g.double())
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-4, atol=1e-5)
    for name in NAMES:
        torch.testing.assert_close(found[name], getattr(layer, name)["default"].grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("build", [llama, gpt2])
def test_each_new_branch_starts_at_the_function_before_it(build):
    base = build()
    before = logits(base)
    model = get_peft_model(base, GainloraConfig(r=RANK))
    assert torch.equal(logits(model), before)
    for count in (2, 3):
        randomized(model, seed=count)
        expected = logits(model)
        assert (expected - before).abs().max() > 0.1
        held = {name: layer.gainlora_A["default"].detach().clone() for name, layer in gainlora_layers(model, "default")}
        bases = bases_of(model, 2)
        add_branch(model, "default", bases, seed=0)
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)
        assert model.peft_config["default"].branches == count
        for name, layer in gainlora_layers(model, "default"):
            gate = layer.gainlora_gate["default"].detach()
            assert gate.norm() > 0.1 and (bases[name].T.float() @ gate).norm() < 1e-6
            assert torch.equal(layer.gainlora_old_A["default"][-RANK:], held[name])
            assert not layer.gainlora_B["default"].any() and len(layer.gainlora_old_gate["default"]) == count - 1


def test_only_the_newest_branch_trains():
    model = wrapped(llama())
    add_branch(model, "default", bases_of(model, 2), seed=0)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all(".gainlora_" in name and "_old_" not in name for name in trained)
    with model.disable_adapter():  # PEFT freezes and reopens what an adapter trains
        pass
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained


def test_the_seed_draws_a_branch():
    def drawn(seed):
        model = wrapped(single())
        add_branch(model, "default", {"0": torch.zeros(IN, 0, dtype=torch.float64)}, seed=seed)
        return layer_of(model).gainlora_gate["default"]

    assert torch.equal(drawn(1), drawn(1)) and not torch.equal(drawn(1), drawn(2))


@pytest.mark.parametrize("share", [0.5, 0.9, 0.999])
def test_a_basis_grows_by_the_fewest_directions_that_hold_the_share(share):
    first, second = (np.random.default_rng(seed).normal(size=(40, IN)) * np.arange(1, IN + 1) for seed in (0, 1))
    basis = widened_basis(torch.zeros(IN, 0, dtype=torch.float64), torch.from_numpy(first.T @ first), share).numpy()
    both = widened_basis(torch.from_numpy(basis), torch.from_numpy(second.T @ second), share).numpy()
    for rows, found, start in ((first, basis, 0), (second, both, basis.shape[1])):
        np.testing.assert_allclose(found.T @ found, np.eye(found.shape[1]), atol=1e-12)
        rest = rows - rows @ found[:, :start] @ found[:, :start].T
        _, _, right = np.linalg.svd(rest)
        energy = (rows**2).sum()
        held = [(energy - ((rest - rest @ right[:n].T @ right[:n]) ** 2).sum()) / energy for n in range(IN + 1)]
        count = next(n for n, value in enumerate(held) if value >= share)
        assert found.shape[1] == start + count
        chosen = np.concatenate([found[:, :start], right[:count].T], axis=1)
        np.testing.assert_allclose(found @ found.T, chosen @ chosen.T, atol=1e-9)
    assert basis.shape[1] < both.shape[1] or both.shape[1] == IN or share == 0.5


def test_a_new_gate_stays_shut_on_earlier_inputs_while_it_learns_new_ones():
    """Earlier inputs lie in 5 of 12 directions; AdamW trains on inputs in all of them."""
    earlier = torch.randn(200, 5) @ torch.randn(5, IN)
    rows = normalized(earlier).double()
    basis = widened_basis(torch.zeros(IN, 0, dtype=torch.float64), rows.T @ rows, 1 - 1e-12)
    assert basis.shape[1] == 5
    model = wrapped(single())
    outputs = model(earlier).detach()
    add_branch(model, "default", {"0": basis}, seed=0)
    layer, seen = layer_of(model), []
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.0)
    new, target = torch.randn(64, IN), torch.randn(64, OUT)
    for _ in range(30):
        optimizer.zero_grad()
        (model(new) - target).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            layer.gainlora_gate["default"].copy_(outside(layer.gainlora_gate["default"], basis))
    layer.gate_observers.append(lambda name, gates: seen.append(gates))
    torch.testing.assert_close(model(earlier), outputs, rtol=1e-4, atol=1e-4)
    model(new)
    shut, opened = (gates[:, 1] for gates in seen)
    assert shut.max() < 1e-5 and opened.mean() > 0.2 and layer.gainlora_B["default"].abs().max() > 0.1


def test_a_saved_adapter_brings_its_branches(tmp_path):
    model = wrapped(llama())
    add_branch(model, "default", bases_of(model, 2), seed=0)
    randomized(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    assert torch.equal(logits(again), logits(model))
    for each in (model, again):
        assert all("_old_" not in name for name, parameter in each.named_parameters() if parameter.requires_grad)


def test_in_bf16_branches_train_in_float32_and_the_update_has_two_digits():
    exact = wrapped(single().double(), branches=2)
    model = wrapped(single().double(), branches=2)
    model.load_state_dict(exact.state_dict())
    model.bfloat16()
    layer, x, g = layer_of(model), torch.randn(64, IN).bfloat16(), torch.randn(64, OUT).bfloat16()
    assert layer.gainlora_A["default"].dtype == layer.gainlora_old_A["default"].dtype == torch.float32
    model(x).backward(g)
    exact(x.double()).backward(g.double())
    for name in NAMES:
        ours, theirs = (getattr(layer_of(each), name)["default"].grad for each in (model, exact))
        assert model(x).dtype == torch.bfloat16 and (ours - theirs).norm() < 0.03 * theirs.norm(), name


def test_updates_of_active_adapters_add_up():
    model = wrapped(single())
    model.add_adapter("other", GainloraConfig(r=2, branches=2))
    randomized(model, "other", seed=4)
    x, updates = torch.randn(5, IN), []
    with model.disable_adapter():
        base = model(x)
    for name in ("default", "other"):
        model.set_adapter(name)
        updates.append(model(x) - base)
    model.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(model(x), base + updates[0] + updates[1])


def test_what_gates_or_branches_forbid_is_refused():
    model = wrapped(llama())
    for call in (model.merge_adapter, model.base_model.merge_and_unload):
        refused(MergeError, "cannot be merged: its gates depend on the input", call)
    with pytest.raises(ConfigError, match="GainLoRA takes one adapter for a whole batch"):
        model(input_ids=IDS, adapter_names=["default"] * len(IDS))
    refused(
        ConfigError, "fill all 32 directions of model.layers.0", add_branch, model, "default", bases_of(model, 32), 0
    )
    refused(ConfigError, "about other modules", add_branch, model, "default", {"x": torch.zeros(3, 1)}, 0)
    for options, message in (
        ({"r": 0}, "r is 0"), ({"branches": 0}, "branches is 0"), ({"shut": 1}, "shut is 1"),
        ({"lora_alpha": math.inf}, "lora_alpha is inf"),
    ):  # fmt: skip
        refused(ConfigError, message, GainloraConfig, **options)
    refused(
        UnsupportedModuleError, "Embedding, which GainLoRA does not adapt",
        get_peft_model, llama(), GainloraConfig(target_modules=["embed_tokens"]),
    )  # fmt: skip
