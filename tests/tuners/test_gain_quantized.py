"""GAIN in front of quantized layers: the forward pass everywhere, merging where the weight can be read and written."""

import copy

import pytest
import torch
from peft import get_peft_model
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend
from torch import nn

from gaintune.errors import UnsupportedModuleError
from gaintune.tuners.gain import GainConfig, GainLinear
from gaintune.tuners.gain.layer import scale_features
from support import tiny_models

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")


class Block(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.proj = layer

    def forward(self, x):
        return self.proj(x)


def eight_bit():
    source = nn.Linear(64, 32, bias=True)
    layer = bnb.nn.Linear8bitLt(64, 32, bias=True, has_fp16_weights=False, threshold=0.0)
    layer.load_state_dict(source.state_dict())
    return Block(layer).to("cpu")


def four_bit():
    layer = bnb.nn.Linear4bit(64, 32, bias=True, compute_dtype=torch.bfloat16, quant_type="nf4")
    return Block(layer).to("cpu")


def adapt(base):
    return tiny_models.randomise(get_peft_model(base, GainConfig(target_modules=["proj"]))).eval()


@pytest.mark.parametrize("build", [eight_bit, four_bit])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@torch.no_grad()
def test_forward_is_the_base_on_scaled_input(build, dtype):
    base = build().eval()
    twin = copy.deepcopy(base)
    x = torch.randn(5, 64).to(dtype)
    expected_dtype = twin(x).dtype
    identity = get_peft_model(copy.deepcopy(base), GainConfig(target_modules=["proj"])).eval()
    assert torch.equal(identity(x), twin(x))
    model = adapt(base)
    assert model(x).dtype == expected_dtype
    assert torch.equal(model(x), twin(scale_features(x, base.proj.gain_v["default"])))


@pytest.mark.parametrize("build", [eight_bit, four_bit])
def test_gains_learn_in_front_of_quantized_layers(build):
    model = adapt(build()).train()
    x = torch.randn(5, 64).bfloat16().requires_grad_()
    model(x).float().square().sum().backward()
    (v,) = tiny_models.gains(model).values()
    assert v.grad.dtype == torch.float32 and v.grad.abs().max() > 0
    assert x.grad.dtype == torch.bfloat16 and x.grad.abs().max() > 0


@pytest.mark.parametrize("run_before", [False, True])
@torch.no_grad()
def test_eight_bit_merging_and_restoring(run_before):
    base = eight_bit()
    x = torch.randn(5, 64)
    if run_before:  # the first forward pass moves the quantization scales from the weight to the state
        base(x)
    model = adapt(base)
    adapted = model(x) if run_before else None
    data, scales = base.proj.base_layer.weight.data.clone(), base.proj.get_base_weight().clone()
    model.merge_adapter(safe_merge=True)
    assert not torch.equal(base.proj.base_layer.weight.data, data)
    merged = model(x)
    model.unmerge_adapter()
    assert torch.equal(base.proj.base_layer.weight.data, data)
    assert torch.equal(base.proj.get_base_weight(), scales)
    again = model(x)
    if adapted is not None:
        assert torch.equal(again, adapted)
    error = (merged - again).norm() / again.norm()
    assert 0 < error < 0.03  # merging quantizes once more


@torch.no_grad()
def test_eight_bit_merge_and_unload():
    base = eight_bit()
    x = torch.randn(5, 64)
    model = adapt(base)
    expected = model(x)
    merged = model.merge_and_unload()
    assert isinstance(merged.proj, bnb.nn.Linear8bitLt)
    assert merged.proj.weight.dtype == torch.int8
    assert (merged(x) - expected).norm() < 0.03 * expected.norm()


@pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="on the CPU bitsandbytes packs 4-bit weights at the first evaluation and dequantizes them wrongly after",
)
@torch.no_grad()
def test_four_bit_merging_and_restoring():
    base = four_bit().cuda()
    x = torch.randn(5, 64, device="cuda").bfloat16()
    model = adapt(base)
    adapted, data = model(x), base.proj.base_layer.weight.data.clone()
    model.merge_adapter()
    merged = model(x)
    model.unmerge_adapter()
    assert torch.equal(base.proj.base_layer.weight.data, data)
    assert torch.equal(model(x), adapted)
    assert (merged - adapted).norm() < 0.2 * adapted.norm()


@torch.no_grad()
def test_layers_that_cannot_be_dequantized_run_and_refuse_to_merge():
    # the backend that PEFT uses for GPTQ, AWQ, AQLM, EETQ, INC and TransformerEngine, in front of a layer we have
    model = adapt(Block(nn.Linear(64, 32)))
    layer = model.base_model.model.proj
    layer.quantization_backend = ForwardOnlyQuantizationBackend("gptq")
    x = torch.randn(5, 64)
    expected = model(x)
    with pytest.raises(UnsupportedModuleError, match="cannot be merged into gptq layers"):
        model.merge_adapter()
    assert torch.equal(model(x), expected)


def test_the_layer_says_how_its_base_is_quantized():
    model = adapt(eight_bit())
    layer = model.base_model.model.proj
    assert isinstance(layer, GainLinear)
    assert "bnb 8bit" in repr(layer)
