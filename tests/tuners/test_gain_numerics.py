"""The arithmetic of GAIN, against (IA)3, float64 and the closed form."""

import pytest
import torch
from peft import IA3Config, get_peft_model
from torch import nn

from gaintune.tuners.gain import GainConfig
from gaintune.tuners.gain.layer import scale_features
from support.tiny_models import IDS, adapter_tensors, gpt2, llama, randomise

TARGETS = {llama: ["o_proj", "down_proj"], gpt2: ["attn.c_proj", "mlp.c_proj"]}


def gradients(model, run=None):
    """Of all gains, for the loss of one batch, computed by the model or by what wraps it."""
    model.zero_grad()
    (model if run is None else run)(input_ids=IDS, labels=IDS).loss.backward()
    return [v.grad.clone() for v in adapter_tensors(model).values()]


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
        assert vector.grad.abs().max() > 0
        assert torch.equal(v.grad, vector.grad.view_as(v.grad))


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
    x = torch.randn(512, 32).bfloat16()
    seen = []
    layer.base_layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    assert layer(x).dtype == torch.bfloat16
    ratio = ((seen[0].detach().double() - x.double()) * x.double()).sum() / x.double().square().sum()
    assert ratio == pytest.approx(0.005, rel=0.2)
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gradients(dtype):
    x, g = torch.randn(4, 50, 24).to(dtype).requires_grad_(), torch.randn(4, 50, 24).to(dtype)
    v = (0.1 * torch.randn(24)).requires_grad_()
    scale_features(x, v).backward(g)
    assert v.grad.dtype == torch.float32 and x.grad.dtype == dtype
    exact_v = (g.double() * x.detach().double()).sum((0, 1))
    exact_x = g.double() * (1 + v.detach().double())
    assert (v.grad - exact_v).norm() < 5e-3 * exact_v.norm()
    assert (x.grad - exact_x).norm() < 5e-3 * exact_x.norm()


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
    linear = base.model.layers[1].mlp.down_proj
    seen = []
    linear.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        expected = base(IDS).logits.dtype
        model = randomise(get_peft_model(base, GainConfig(ffn=True)))
        out = model(input_ids=IDS, labels=IDS)
    out.loss.backward()
    assert out.logits.dtype == expected
    assert seen[0] == seen[1] == torch.bfloat16
    assert all(v.grad.dtype == torch.float32 and v.grad.abs().max() > 0 for v in adapter_tensors(model).values())


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_checkpointing_changes_nothing(use_reentrant, dtype):
    model = randomise(get_peft_model(llama().to(dtype), GainConfig(ffn=True))).train()
    plain = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    for expected, got in zip(plain, gradients(model), strict=True):
        assert expected.abs().max() > 0
        assert torch.equal(expected, got)


def test_torch_compile_gives_the_same():
    model = randomise(get_peft_model(llama(num_hidden_layers=1).bfloat16(), GainConfig(ffn=True)))
    eager = gradients(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for expected, got in zip(eager, gradients(model, compiled), strict=True):
        torch.testing.assert_close(got, expected, rtol=3e-2, atol=1e-3)


def test_distributed_data_parallel_gives_the_same_gradients():
    model = randomise(get_peft_model(llama().bfloat16(), GainConfig(ffn=True)))
    alone = gradients(model)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        shared = gradients(model, nn.parallel.DistributedDataParallel(model))
    finally:
        torch.distributed.destroy_process_group()
    assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))


def test_a_layer_used_twice_sums_its_gradients():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(6, 6)

        def forward(self, x):
            return self.lin(self.lin(x)) + self.lin(x)

    base = Twice().bfloat16()
    model = randomise(get_peft_model(base, GainConfig(target_modules=["lin"])), scale=0.1)
    v = base.lin.gain_v["default"]
    x = torch.randn(32, 6).bfloat16()
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
