"""What GAIN and DISeL compute, against (IA)3, LoRA, float64 and the closed forms, in every dtype they run in."""

import copy
import math

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from gaintune.tuners.disel import DiselConfig, disel_layers
from gaintune.tuners.disel.layer import add_product, stacked_product
from gaintune.tuners.gain import GainConfig
from gaintune.tuners.gain.layer import scale_features
from support.tiny_models import IDS, adapter_tensors, gpt2, gradients, llama, logits, opt, randomise

TARGETS = {llama: ["o_proj", "down_proj"], gpt2: ["attn.c_proj", "mlp.c_proj"]}


@pytest.mark.parametrize("ffn", [False, True])
@pytest.mark.parametrize("build", TARGETS)
def test_forward_and_gradients_equal_ia3_in_float32(build, ffn):
    targets = TARGETS[build] if ffn else TARGETS[build][:1]
    gain = randomise(get_peft_model(build(), GainConfig(ffn=ffn)))
    config = IA3Config(target_modules=targets, feedforward_modules=targets, fan_in_fan_out=build is gpt2)
    ia3 = get_peft_model(build(), config)
    vectors = {name: p for name, p in sorted(ia3.named_parameters()) if "ia3_l" in name}
    assert len(vectors) == len(adapter_tensors(gain)) == (4 if ffn else 2)
    with torch.no_grad():
        for v, vector in zip(adapter_tensors(gain).values(), vectors.values(), strict=True):
            vector.copy_((1 + v).view_as(vector))
    ours, theirs = gain(input_ids=IDS, labels=IDS), ia3(input_ids=IDS, labels=IDS)
    assert torch.equal(ours.logits, theirs.logits)
    ours.loss.backward()
    theirs.loss.backward()
    for v, vector in zip(adapter_tensors(gain).values(), vectors.values(), strict=True):
        assert vector.grad.abs().max() > 0 and torch.equal(v.grad, vector.grad.view_as(v.grad))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("percent", [0.3, 0.5, 1.0, 2.0, -0.5])
def test_small_gains_act_in_half_precision(dtype, percent):
    # bfloat16's neighbours of 1 are 0.8 % above and 0.4 % below: a gain that is cast acts as 0 or as 0.75 %
    x = torch.randn(64, 512, dtype=torch.float64).to(dtype)
    y = scale_features(x, torch.full((512,), percent / 100))
    assert y.dtype == dtype
    change = (y.double() - x.double()) * x.double()
    assert change.sum() / x.double().square().sum() * 100 == pytest.approx(percent, rel=0.2)


def test_small_gains_act_in_a_bfloat16_model():
    base = llama().to(torch.bfloat16)
    model = get_peft_model(base, GainConfig())
    layer = base.model.layers[0].self_attn.o_proj
    with torch.no_grad():
        layer.gain_v["default"].fill_(0.005)
    x, seen = torch.randn(512, 32).bfloat16(), []
    layer.base_layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    assert layer(x).dtype == torch.bfloat16
    ratio = ((seen[0].detach().double() - x.double()) * x.double()).sum() / x.double().square().sum()
    assert ratio == pytest.approx(0.005, rel=0.2) and model.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gradients(dtype):
    x, g = torch.randn(4, 50, 24).to(dtype).requires_grad_(), torch.randn(4, 50, 24).to(dtype)
    v = (0.1 * torch.randn(24)).requires_grad_()
    scale_features(x, v).backward(g)
    assert v.grad.dtype == torch.float32 and x.grad.dtype == dtype
    exact_v = (g.double() * x.detach().double()).sum((0, 1))
    exact_x = g.double() * (1 + v.detach().double())
    assert (v.grad - exact_v).norm() < 5e-3 * exact_v.norm() and (x.grad - exact_x).norm() < 5e-3 * exact_x.norm()


def test_gradients_do_not_overflow_in_float16_and_pass_a_frozen_adapter():
    x = torch.full((8, 4), 300.0, dtype=torch.float16)
    v = torch.zeros(4, requires_grad=True)
    scale_features(x, v).backward(torch.full((8, 4), 300.0, dtype=torch.float16))
    assert torch.equal(v.grad, torch.full((4,), 8 * 90000.0))
    x = torch.randn(3, 5).bfloat16().requires_grad_()
    scale_features(x, torch.full((5,), 0.5)).sum().backward()
    assert torch.equal(x.grad, torch.full((3, 5), 1.5, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtype_and_layout_are_kept(dtype):
    x = torch.randn(6, 4, 3).to(dtype).transpose(1, 2)
    v = 0.1 * torch.randn(4)
    y = scale_features(x, v)
    assert y.dtype == dtype
    rtol = 8e-3 if dtype.itemsize == 2 else 1e-6
    torch.testing.assert_close(y.double(), x.double() * (1 + v.double()), rtol=rtol, atol=0)


def test_autocast_keeps_the_bases_dtypes():
    base = llama()
    linear, seen = base.model.layers[1].mlp.down_proj, []
    linear.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        expected = base(IDS).logits.dtype
        model = randomise(get_peft_model(base, GainConfig(ffn=True)))
        out = model(input_ids=IDS, labels=IDS)
    out.loss.backward()
    assert out.logits.dtype == expected and seen[0] == seen[1] == torch.bfloat16
    assert all(v.grad.dtype == torch.float32 and v.grad.abs().max() > 0 for v in adapter_tensors(model).values())


def test_distributed_data_parallel_gives_the_same_gradients():
    model = randomise(get_peft_model(llama().bfloat16(), GainConfig(ffn=True)))
    alone = gradients(model)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(model)
        shared = gradients(model, lambda: parallel(input_ids=IDS, labels=IDS).loss)
    finally:
        torch.distributed.destroy_process_group()
    assert all(torch.equal(gradient, shared[name]) for name, gradient in alone.items())


def test_a_layer_used_twice_sums_its_gradients():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(6, 6)

        def forward(self, x):
            return self.lin(self.lin(x)) + self.lin(x)

    base = Twice().bfloat16()
    model = randomise(get_peft_model(base, GainConfig(target_modules=["lin"])), scale=0.1)
    v, x = base.lin.gain_v["default"], torch.randn(32, 6).bfloat16()
    model(x).sum().backward()
    weight, bias = base.lin.base_layer.weight.double(), base.lin.base_layer.bias.double()
    exact = v.detach().double().requires_grad_()

    def layer(x):
        return (x * (1 + exact)) @ weight.T + bias

    (layer(layer(x.double())) + layer(x.double())).sum().backward()
    assert (v.grad - exact.grad).norm() < 2e-2 * exact.grad.norm()


def test_gains_move_in_a_bfloat16_model_by_steps_below_its_resolution():
    model = get_peft_model(llama().bfloat16(), GainConfig())
    v = next(iter(adapter_tensors(model).values()))
    optimizer = torch.optim.SGD([v], lr=1e-3)
    for _ in range(100):
        v.grad = torch.ones_like(v)
        optimizer.step()
    assert v.detach().mean() == pytest.approx(-0.1, rel=1e-3)


@pytest.mark.parametrize("zeros", [0, 3, 10])
def test_proposition_1_the_output_space_does_not_grow(zeros):
    """range(W diag(s)) lies in range(W), and equals it where no gain is 0 (paper, Proposition 1); W has rank 5."""
    low_rank = torch.randn(16, 5, dtype=torch.float64) @ torch.randn(5, 12, dtype=torch.float64)
    base = nn.Sequential(nn.Linear(12, 16, bias=False).double())
    base[0].weight.data = low_rank.clone()
    model = get_peft_model(base, GainConfig(target_modules=["0"]))
    s = torch.linspace(-1.5, 2, 12)  # negative gains among them
    s[:zeros] = 0.0
    with torch.no_grad():
        base[0].gain_v["default"].copy_(s - 1)
    merged = model.merge_and_unload()[0].weight.detach()
    torch.testing.assert_close(merged, low_rank * s, rtol=1e-5, atol=1e-6)
    assert torch.linalg.matrix_rank(torch.cat([low_rank, merged], dim=1)) == 5
    assert torch.linalg.matrix_rank(merged) == min(5, 12 - zeros)
    additive = torch.cat([low_rank, torch.randn(16, 1, dtype=torch.float64)], dim=1)
    assert torch.linalg.matrix_rank(additive) == 6  # what an additive update can do


KINDS = [{}, {"gate_rank": 2}, {"gate_kind": "relu"}]


def one_layer(base=None, autocast_adapter_dtype=True, **options):
    """A model of one linear layer, 24 to 10, and its adapted layer with gates anywhere between shut and open."""
    base = nn.Linear(24, 10) if base is None else base
    config = DiselConfig(r=4, lora_alpha=6, target_modules=["0"], **options)
    model = get_peft_model(nn.Sequential(base), config, autocast_adapter_dtype=autocast_adapter_dtype)
    randomise(model)
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


def near(found, expected, tolerance):
    """Every element where nothing but rounding differs, and the norm of the difference in 16 bits."""
    if tolerance < 1e-4:
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance * 10)
    else:
        assert (found.double() - expected).norm() < tolerance * expected.norm()


HALF = torch.bfloat16
MODES = {  # dtypes of base and adapter, and tolerances of the output and of gradients of the input and the adapter
    "float64": (torch.float64, torch.float64, 1e-12, 1e-12, 1e-12),
    "float32": (torch.float32, torch.float32, 1e-5, 1e-5, 1e-5),
    "bf16 base": (HALF, torch.float32, 0.01, 0.02, 1e-3),
    "bf16 base and adapter": (HALF, HALF, 0.01, 0.02, 0.03),
    "autocast to bf16": (torch.float32, torch.float32, 0.02, 0.05, 0.05),
}


@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("build", [nn.Linear, Conv1D])
@pytest.mark.parametrize("mode", MODES)
def test_forward_and_gradients_equal_the_formula(options, build, mode):
    dtype, adapter_dtype, *tolerances = MODES[mode]
    base = (nn.Linear(24, 10) if build is nn.Linear else Conv1D(10, 24)).to(dtype)
    model, layer = one_layer(base, autocast_adapter_dtype=adapter_dtype != HALF, **options)
    parts = {name: p.dtype for name, p in adapter_tensors(model).items()}
    assert {kind for name, kind in parts.items() if ".lora_G." not in name} == {adapter_dtype}
    wide = torch.float64 if mode == "float64" else torch.float32
    assert all(kind == wide for name, kind in parts.items() if ".lora_G." in name)
    x = torch.randn(2, 5, 24).to(dtype).requires_grad_()
    x64 = x.detach().double().requires_grad_()
    expected, leaves = reference(layer, x64)
    weights = torch.randn(2, 5, 10).bfloat16()  # the same numbers in every dtype
    (expected * weights.double()).sum().backward()
    with torch.autocast("cpu", HALF, enabled=mode == "autocast to bf16"):
        output = model(x)
    assert output.dtype == (HALF if "bf16" in mode else dtype)
    near(output, expected, tolerances[0])
    (output.to(wide) * weights.to(wide)).sum().backward()
    assert x.grad.dtype == dtype
    near(x.grad, x64.grad, tolerances[1])
    assert len(parameters(layer)) == len(leaves) == {"{}": 4, "{'gate_rank': 2}": 5}.get(str(options), 2)
    for parameter, leaf in zip(parameters(layer), leaves, strict=True):
        assert parameter.grad.dtype == parameter.dtype
        near(parameter.grad, leaf.grad, tolerances[2])


@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("build", [llama, gpt2, opt])
def test_the_start_is_the_base_to_the_bit(build, dtype, options):
    base = build().to(dtype)
    expected = logits(base)
    model = get_peft_model(base, DiselConfig(**options)).eval()
    assert torch.equal(logits(model), expected) and sum(1 for _ in disel_layers(model)) >= 8


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
    for row, gradient in zip(x, torch.func.vmap(gradient_of_row, in_dims=(None, 0))(a, x), strict=True):
        torch.testing.assert_close(gradient, torch.autograd.grad(stacked(row, a, b).square().sum(), a)[0])


def test_only_the_input_itself_is_kept_for_the_gradient():
    model, _ = one_layer(nn.Linear(256, 10).bfloat16().requires_grad_(False))
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
    for name, layer in disel_layers(get_peft_model(llama(), config)):
        rank = 2 if name.endswith("o_proj") else 4
        gate = layer.lora_G["default"]
        assert len(layer.lora_A["default"].weight) == len(gate.weight) == len(gate.bias) == rank
        assert layer.scaling["default"] == {"o_proj": 4.0, "q_proj": 3.0}.get(name.rpartition(".")[2], 2.0)
    stabilised = get_peft_model(llama(), DiselConfig(r=4, use_rslora=True))
    assert {layer.scaling["default"] for _, layer in disel_layers(stabilised)} == {4.0}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [GainConfig(ffn=True), DiselConfig()], ids=["gain", "disel"])
def test_gradient_checkpointing_changes_nothing(config, dtype, reentrant):
    model = randomise(get_peft_model(llama().to(dtype), copy.copy(config))).train()
    expected, passes = gradients(model), []
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    layer = model.base_model.model.model.layers[0].self_attn.o_proj
    layer.register_forward_pre_hook(lambda module, args: passes.append(torch.is_grad_enabled()))
    found = gradients(model)
    assert len(passes) == 2  # what was not kept is computed again
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0 and torch.equal(found[name], gradient), name


def test_gains_give_the_same_in_a_compiled_model():
    model = randomise(get_peft_model(llama(num_hidden_layers=1).bfloat16(), GainConfig(ffn=True)))
    eager = gradients(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = gradients(model, lambda: compiled(input_ids=IDS, labels=IDS).loss)
    for name, gradient in eager.items():
        torch.testing.assert_close(found[name], gradient, rtol=3e-2, atol=1e-3)


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_gates_compile_as_one_graph(options):
    model, _ = one_layer(**options)
    x = torch.randn(2, 5, 24)
    eager = gradients(model, lambda: model(x).sum())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
    found = gradients(model, lambda: compiled(x).sum())
    for name, gradient in eager.items():
        torch.testing.assert_close(found[name], gradient)
