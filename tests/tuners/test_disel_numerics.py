"""DISeL computes its formula: against float64, at the start, with gates forced open, in every dtype it runs in."""

import copy
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from gaintune.tuners.disel import DiselConfig, disel_layers
from gaintune.tuners.disel.layer import add_product, stacked_product
from support.tiny_models import IDS, adapter_tensors, gpt2, llama, logits, opt, randomise

KINDS = [{}, {"gate_rank": 2}, {"gate_kind": "relu"}]


def one_layer(base=None, **options):
    """A model of one linear layer, 24 to 10, and its adapted layer with gates anywhere between shut and open."""
    base = nn.Linear(24, 10) if base is None else base
    config = DiselConfig(r=4, lora_alpha=6, target_modules=["0"], **options)
    model = randomise(get_peft_model(nn.Sequential(base), config))
    return model, model.base_model.model[0]


def parameters(layer):
    """A, B and, where there is a gate, its bias and one or two matrices."""
    gate = sorted(layer.lora_G["default"].named_parameters()) if "default" in layer.lora_G else []
    return [layer.lora_A["default"].weight, layer.lora_B["default"].weight, *(p for _, p in gate)]


def reference(layer, x):
    """The formula in float64, one token at a time, on leaves of its own: output, and leaves [A, B, bias, weight...]."""
    a, b, *gate = leaves = [leaf.detach().double().requires_grad_() for leaf in parameters(layer)]
    weight, bias = (p.detach().double() for p in (layer.base_layer.weight, layer.base_layer.bias))
    w = weight if isinstance(layer.base_layer, nn.Linear) else weight.T
    rows = []
    for token in x.reshape(-1, x.shape[-1]):
        if not gate:
            g = (a @ token > 0).double()
        else:
            c, matrix = gate[0], gate[1] if len(gate) == 2 else gate[1] @ gate[2]
            g = 1 / (1 + torch.exp(-(matrix @ token + c)))
        rows.append(w @ token + bias + layer.scaling["default"] * (b @ torch.diag(g) @ a @ token))
    return torch.stack(rows).reshape(*x.shape[:-1], -1), leaves


@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("build", [nn.Linear, Conv1D])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_forward_and_gradients_equal_the_formula(options, build, dtype, tolerance):
    base = nn.Linear(24, 10) if build is nn.Linear else Conv1D(10, 24)
    model, layer = one_layer(base.to(dtype), **options)
    x = torch.randn(2, 5, 24, dtype=dtype, requires_grad=True)
    x64 = x.detach().double().requires_grad_()
    expected, leaves = reference(layer, x64)
    weights = torch.randn(2, 5, 10, dtype=torch.float64)
    (expected * weights).sum().backward()
    output = model(x)
    (output * weights.to(dtype)).sum().backward()
    close = {"rtol": tolerance, "atol": tolerance * 10}
    torch.testing.assert_close(output.double(), expected, **close)
    torch.testing.assert_close(x.grad.double(), x64.grad, **close)
    assert len(parameters(layer)) == len(leaves) == {"{}": 4, "{'gate_rank': 2}": 5}.get(str(options), 2)
    for parameter, leaf in zip(parameters(layer), leaves, strict=True):
        assert parameter.grad.dtype == dtype
        torch.testing.assert_close(parameter.grad.double(), leaf.grad, **close)


@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("build", [llama, gpt2, opt])
def test_the_start_is_the_base_to_the_bit(build, dtype, options):
    base = build().to(dtype)
    expected = logits(base)
    model = get_peft_model(base, DiselConfig(**options)).eval()
    assert torch.equal(logits(model), expected)
    assert sum(1 for _ in disel_layers(model)) >= 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forced_open_it_is_pefts_lora(dtype):
    base = llama().to(dtype)
    config = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"}
    lora = get_peft_model(copy.deepcopy(base), LoraConfig(**config))
    disel = get_peft_model(base, DiselConfig(**config, gate_bias_init=60.0))
    randomise(lora)
    names = dict(lora.named_parameters())
    with torch.no_grad():
        for name, parameter in adapter_tensors(disel).items():
            if ".lora_G." not in name:
                parameter.copy_(names[name])
    for model in (lora, disel):
        model(input_ids=IDS, labels=IDS).loss.backward()
    close = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.02}
    torch.testing.assert_close(disel(input_ids=IDS).logits, lora(input_ids=IDS).logits, **close)
    for name, parameter in adapter_tensors(disel).items():
        if ".lora_G." not in name:
            torch.testing.assert_close(parameter.grad, names[name].grad, **close)


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", KINDS, ids=str)
def test_a_bf16_base_without_autocast(adapter_dtype, options):
    base = nn.Linear(24, 10).bfloat16()
    config = DiselConfig(r=4, lora_alpha=6, target_modules=["0"], **options)
    model = get_peft_model(nn.Sequential(base), config, autocast_adapter_dtype=adapter_dtype == torch.float32)
    layer = randomise(model).base_model.model[0]
    parts = {name: p.dtype for name, p in adapter_tensors(model).items()}
    assert {dtype for name, dtype in parts.items() if ".lora_G." not in name} == {adapter_dtype}
    assert all(dtype == torch.float32 for name, dtype in parts.items() if ".lora_G." in name)
    x = torch.randn(2, 5, 24).bfloat16().requires_grad_()
    output = model(x)
    assert output.dtype == torch.bfloat16
    x64 = x.detach().double().requires_grad_()
    expected, leaves = reference(layer, x64)
    assert (output.double() - expected).norm() < 0.01 * expected.norm()
    output.float().sum().backward()
    expected.sum().backward()
    assert x.grad.dtype == torch.bfloat16
    assert (x.grad.double() - x64.grad).norm() < 0.02 * x64.grad.norm()
    tolerance = 1e-3 if adapter_dtype == torch.float32 else 0.03
    for parameter, leaf in zip(parameters(layer), leaves, strict=True):
        assert parameter.grad.dtype == parameter.dtype
        assert (parameter.grad.double() - leaf.grad).norm() < tolerance * leaf.grad.norm()


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_under_autocast(options):
    model, layer = one_layer(**options)
    x = torch.randn(2, 5, 24, requires_grad=True)
    expected, leaves = reference(layer, x.detach().double())
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x)
    assert output.dtype == torch.bfloat16
    assert (output.double() - expected).norm() < 0.02 * expected.norm()
    output.float().sum().backward()
    expected.sum().backward()
    weight_a, leaf = layer.lora_A["default"].weight, leaves[0]
    assert weight_a.grad.dtype == x.grad.dtype == torch.float32
    assert (weight_a.grad.double() - leaf.grad).norm() < 0.05 * leaf.grad.norm()


def test_products_pass_gradcheck_twice_and_vmap():
    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    def stacked(x, a, b):
        return stacked_product(x, (a, b), torch.float64)

    def added(result, hidden, weight):
        return add_product(result, hidden, weight, torch.float64)

    inputs = (draw(2, 3, 5), draw(4, 5), draw(2, 5))
    assert torch.autograd.gradcheck(stacked, inputs) and torch.autograd.gradgradcheck(stacked, inputs)
    x, a, b = inputs
    torch.testing.assert_close(stacked(x, a, b), torch.cat([x @ a.T, x @ b.T], -1))
    inputs = (draw(2, 3, 5), draw(2, 3, 4), draw(5, 4))
    assert torch.autograd.gradcheck(added, inputs) and torch.autograd.gradgradcheck(added, inputs)
    gradient_of_row = torch.func.grad(lambda w, row: stacked(row, w, b).square().sum())
    of_each = torch.func.vmap(gradient_of_row, in_dims=(None, 0))(a, x)
    for row, gradient in zip(x, of_each, strict=True):
        torch.testing.assert_close(gradient, torch.autograd.grad(stacked(row, a, b).square().sum(), a)[0])


def test_only_the_input_itself_is_kept_for_the_gradient():
    base = nn.Linear(256, 10).bfloat16().requires_grad_(False)
    model, _ = one_layer(base)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        x = torch.randn(64, 256).bfloat16()
        model(x)
    wide = [t for t in kept if t.numel() >= x.numel()]
    assert wide and {t.data_ptr() for t in wide} == {x.data_ptr()}


@pytest.mark.parametrize("training", [True, False])
def test_dropout_reaches_the_gates_in_training_only(training):
    model, layer = one_layer(lora_dropout=0.5)
    model.train(training)
    seen = []
    layer.gate_observers.append(lambda name, gates: seen.append((name, gates)))
    x = torch.randn(3, 7, 24)
    torch.manual_seed(5)
    output = model(x)
    torch.manual_seed(5)
    read = nn.functional.dropout(x, 0.5, training)
    gate = layer.lora_G["default"]
    gates = torch.sigmoid(read @ gate.weight.T + gate.bias)
    ((name, observed),) = seen
    assert name == "default" and not observed.requires_grad
    torch.testing.assert_close(observed, gates)
    update = (gates * (read @ layer.lora_A["default"].weight.T)) @ layer.lora_B["default"].weight.T
    torch.testing.assert_close(output, layer.base_layer(x) + 1.5 * update)


def test_start_values():
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(4096, 8)), DiselConfig(r=16))
    layer = model.base_model.model[0]
    gate, bound = layer.lora_G["default"], 1 / math.sqrt(4096)
    assert torch.equal(gate.bias, torch.full((16,), -3.0))  # at every width
    assert 0.99 * bound < gate.weight.abs().max() <= bound
    assert gate.weight.detach().std() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert not layer.lora_B["default"].weight.any() and layer.scaling["default"] == 2.0
    seen = []
    layer.gate_observers.append(lambda name, gates: seen.append(gates))
    model(torch.randn(200, 4096))
    assert seen[0].shape == (200, 16) and seen[0].mean().item() == pytest.approx(0.0474, abs=0.01)


def test_start_values_chosen():
    config = DiselConfig(r=3, gate_bias_init=-7.0, gate_weight_init="zeros", gate_rank=2)
    gate = get_peft_model(nn.Sequential(nn.Linear(24, 8)), config).base_model.model[0].lora_G["default"]
    assert gate.weight_in.shape == (2, 24) and gate.weight.shape == (3, 2)
    assert gate.weight_in.any() and not gate.weight.any() and torch.equal(gate.bias, torch.full((3,), -7.0))


def test_patterns_and_rank_stabilised_scale():
    config = DiselConfig(r=4, rank_pattern={"o_proj": 2}, alpha_pattern={"q_proj": 12}, target_modules="all-linear")
    model = get_peft_model(llama(), config)
    for name, layer in disel_layers(model):
        rank = 2 if name.endswith("o_proj") else 4
        gate = layer.lora_G["default"]
        assert len(layer.lora_A["default"].weight) == len(gate.weight) == len(gate.bias) == rank
        assert layer.scaling["default"] == {"o_proj": 4.0, "q_proj": 3.0}.get(name.rpartition(".")[2], 2.0)
    stabilised = get_peft_model(llama(), DiselConfig(r=4, use_rslora=True))
    assert {layer.scaling["default"] for _, layer in disel_layers(stabilised)} == {4.0}


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant):
    model = randomise(get_peft_model(llama(), DiselConfig())).train()
    model.enable_input_require_grads()
    model(input_ids=IDS, labels=IDS).loss.backward()
    expected = {name: p.grad.clone() for name, p in adapter_tensors(model).items()}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    passes = []
    next(layer for _, layer in disel_layers(model)).gate_observers.append(lambda *seen: passes.append(seen))
    loss = model(input_ids=IDS, labels=IDS).loss
    assert len(passes) == 1
    loss.backward()
    assert len(passes) == 2  # what was not kept is computed again
    for name, parameter in adapter_tensors(model).items():
        torch.testing.assert_close(parameter.grad, expected[name])


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_it_compiles_as_one_graph(options):
    model, _ = one_layer(**options)
    x = torch.randn(2, 5, 24)
    model(x).sum().backward()
    expected = {name: p.grad.clone() for name, p in adapter_tensors(model).items()}
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
    compiled(x).sum().backward()
    for name, parameter in adapter_tensors(model).items():
        torch.testing.assert_close(parameter.grad, expected[name])
