"""Our tuners over quantized layers: forward and training everywhere, merging where a weight can be written."""

import copy

import pytest
import torch
from peft import get_peft_model
from peft.tuners import lora
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend
from torch import nn

from gaintune.errors import MergeError, UnsupportedModuleError
from gaintune.tuners.disel import DiselConfig
from gaintune.tuners.disel.model import refuse_layer
from gaintune.tuners.gain import GainConfig, GainLinear
from gaintune.tuners.gain.layer import scale_features
from gaintune.tuners.gainlora import GainloraConfig, gainlora_layers
from gaintune.tuners.svft import SvftConfig
from support import refused
from support.tiny_models import adapter_tensors, randomise

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")


class Block(nn.Module):
    """One layer, marked as transformers marks a quantized model."""

    def __init__(self, layer, mark="is_plain"):
        super().__init__()
        self.proj = layer
        setattr(self, mark, True)

    def forward(self, x):
        return self.proj(x)


def eight_bit():
    layer = bnb.nn.Linear8bitLt(64, 32, bias=True, has_fp16_weights=False, threshold=0.0)
    layer.load_state_dict(nn.Linear(64, 32, bias=True).state_dict())
    return Block(layer, "is_loaded_in_8bit").to("cpu")


def four_bit():
    layer = bnb.nn.Linear4bit(64, 32, bias=True, compute_dtype=torch.bfloat16, quant_type="nf4")
    return Block(layer, "is_loaded_in_4bit").to("cpu")


builds = pytest.mark.parametrize("build", [eight_bit, four_bit])
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
gates = pytest.mark.parametrize("options", [{}, {"gate_rank": 2}, {"gate_kind": "relu"}], ids=str)


def gain(base):
    return randomise(get_peft_model(base, GainConfig(target_modules=["proj"]))).eval()


@builds
@dtypes
@torch.no_grad()
def test_with_gains_it_is_the_base_on_scaled_input(build, dtype):
    base = build().eval()
    twin, x = copy.deepcopy(base), torch.randn(5, 64).to(dtype)
    identity = get_peft_model(copy.deepcopy(base), GainConfig(target_modules=["proj"])).eval()
    assert torch.equal(identity(x), twin(x))
    output = gain(base)(x)
    assert output.dtype == twin(x).dtype
    assert torch.equal(output, twin(scale_features(x, base.proj.gain_v["default"])))


@gates
@dtypes
@builds
@torch.no_grad()
def test_with_gates_it_is_the_base_and_the_gated_update(build, dtype, options):
    base, x = build().eval(), torch.randn(3, 5, 64).to(dtype)
    plain = base(x)
    model = get_peft_model(base, DiselConfig(r=4, target_modules=["proj"], **options)).eval()
    layer = base.proj
    assert type(layer).__name__ in ("Linear8bitLt", "Linear4bit") and layer.lora_A
    assert torch.equal(model(x), plain)
    randomise(model)
    assert {p.dtype for p in adapter_tensors(model).values()} == {torch.float32}
    hidden = x.float() @ layer.lora_A["default"].weight.T
    if "default" in layer.lora_G:
        gate = layer.lora_G["default"]
        matrix = gate.weight if gate.weight_in is None else gate.weight @ gate.weight_in
        openness = torch.sigmoid(x.float() @ matrix.T + gate.bias)
    else:
        openness = (hidden > 0).float()
    update = 2 * (openness * hidden) @ layer.lora_B["default"].weight.T
    output = model(x)
    assert output.dtype == plain.dtype
    torch.testing.assert_close(output, (plain + update).to(plain.dtype), rtol=0.02, atol=0.02)
    model.add_adapter("other", DiselConfig(r=2, target_modules=["proj"]))
    randomise(model, "other", seed=4)
    mixed = model(x, adapter_names=["default", "__base__", "other"])
    torch.testing.assert_close(mixed[0], output[0])
    torch.testing.assert_close(mixed[1], plain[1])


@builds
@pytest.mark.parametrize(
    "config",
    [GainConfig, lambda **o: DiselConfig(r=4, **o), lambda **o: DiselConfig(r=4, gate_rank=2, **o),
     lambda **o: DiselConfig(r=4, gate_kind="relu", **o)],
    ids=["gain", "disel", "disel with low-rank gates", "gated-lora"],
)  # fmt: skip
def test_the_active_adapter_gets_gradients_in_float32(build, config):
    model = get_peft_model(build(), config(target_modules=["proj"]))
    model.add_adapter("other", config(target_modules=["proj"]))
    randomise(model).train()
    x = torch.randn(3, 5, 64).bfloat16().requires_grad_()
    model(x).float().square().sum().backward()
    assert x.grad.dtype == torch.bfloat16 and x.grad.abs().max() > 0
    for name, parameter in adapter_tensors(model).items():
        assert parameter.grad.dtype == torch.float32 and parameter.grad.abs().max() > 0, name
    assert all(p.grad is None for p in adapter_tensors(model, "other").values())


@pytest.mark.parametrize("run_before", [False, True])
@torch.no_grad()
def test_eight_bit_merging_and_restoring(run_before):
    base, x = eight_bit(), torch.randn(5, 64)
    if run_before:  # the first forward pass moves the quantization scales from the weight to the state
        base(x)
    model = gain(base)
    adapted = model(x) if run_before else None
    assert isinstance(base.proj, GainLinear) and "bnb 8bit" in repr(base.proj)
    data, scales = base.proj.base_layer.weight.data.clone(), base.proj.get_base_weight().clone()
    model.merge_adapter(safe_merge=True)
    assert not torch.equal(base.proj.base_layer.weight.data, data)
    merged = model(x)
    model.unmerge_adapter()
    assert torch.equal(base.proj.base_layer.weight.data, data) and torch.equal(base.proj.get_base_weight(), scales)
    again = model(x)
    if adapted is not None:
        assert torch.equal(again, adapted)
    assert 0 < (merged - again).norm() < 0.03 * again.norm()  # merging quantizes once more
    unloaded = model.merge_and_unload()
    assert isinstance(unloaded.proj, bnb.nn.Linear8bitLt) and unloaded.proj.weight.dtype == torch.int8
    assert (unloaded(x) - again).norm() < 0.03 * again.norm()


@pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="on the CPU bitsandbytes packs 4-bit weights at the first evaluation and dequantizes them wrongly after",
)
@torch.no_grad()
def test_four_bit_merging_and_restoring():
    base, x = four_bit().cuda(), torch.randn(5, 64, device="cuda").bfloat16()
    model = gain(base)
    adapted, data = model(x), base.proj.base_layer.weight.data.clone()
    model.merge_adapter()
    merged = model(x)
    model.unmerge_adapter()
    assert torch.equal(base.proj.base_layer.weight.data, data) and torch.equal(model(x), adapted)
    assert (merged - adapted).norm() < 0.2 * adapted.norm()


@builds
@pytest.mark.filterwarnings("ignore:Merge lora module")
def test_merging_gates_is_refused(build):
    base = build()
    model = get_peft_model(base, DiselConfig(r=4, target_modules=["proj"]))
    weight = base.proj.base_layer.weight.data.clone()
    with pytest.raises(MergeError):
        model.merge_adapter()
    with pytest.raises(MergeError):
        base.proj.merge(safe_merge=True)
    assert torch.equal(base.proj.base_layer.weight.data, weight)


@torch.no_grad()
def test_layers_that_cannot_be_dequantized_run_with_gains_and_refuse_to_merge():
    # the backend that PEFT uses for GPTQ, AWQ, AQLM, EETQ, INC and TransformerEngine, in front of a layer we have
    model = gain(Block(nn.Linear(64, 32)))
    model.base_model.model.proj.quantization_backend = ForwardOnlyQuantizationBackend("gptq")
    x = torch.randn(5, 64)
    expected = model(x)
    refused(UnsupportedModuleError, "cannot be merged into gptq layers", model.merge_adapter)
    assert torch.equal(model(x), expected)


def test_a_layer_that_knows_no_gates_is_refused():
    class OtherBackend(lora.Linear):
        """As PEFT derives its layers over torchao's weights and others: merging there knows no variants."""

    made = (nn.Linear(4, 8), "default", lora.LoraConfig(r=2))
    refuse_layer(lora.Linear(*made, r=2), "proj")
    refused(UnsupportedModuleError, "proj became a OtherBackend", refuse_layer, OtherBackend(*made, r=2), "proj")


@builds
def test_branches_train_over_a_quantized_layer(build):
    base, x = build(), torch.randn(5, 64)
    expected = copy.deepcopy(base)(x)
    model = get_peft_model(base, GainloraConfig(r=3, target_modules=["proj"]))
    torch.testing.assert_close(model(x), expected)
    ((_, layer),) = gainlora_layers(model, "default")
    with torch.no_grad():
        layer.gainlora_B["default"].normal_()
    a, b, gate = (getattr(layer, f"gainlora_{name}")["default"].double() for name in ("A", "B", "gate"))
    wide = x.double()
    opened = torch.tanh(wide @ gate / wide.square().mean(1).sqrt() / 2).abs()
    update = 2 * opened[:, None] * (wide @ a.T @ b.T)
    torch.testing.assert_close((model(x) - expected).double(), update, rtol=1e-3, atol=1e-3)
    model(x).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)


@builds
def test_singular_values_of_a_quantized_layer_are_refused(build):
    refused(
        UnsupportedModuleError,
        "is quantized .* Load the base unquantized",
        get_peft_model,
        build(),
        SvftConfig(target_modules=["proj"]),
    )
