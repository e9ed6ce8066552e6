"""DISeL over bitsandbytes' 8-bit and 4-bit layers: the start, the formula, training, several adapters."""

import pytest
import torch
from peft import get_peft_model
from torch import nn

from gaintune.errors import MergeError, UnsupportedModuleError
from gaintune.tuners.disel import DiselConfig
from gaintune.tuners.disel.model import refuse_layer
from support import tiny_models

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")


class Block(nn.Module):
    """One quantized layer, marked as transformers marks a quantized model."""

    def __init__(self, layer, mark):
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


@pytest.mark.parametrize("options", [{}, {"gate_rank": 2}, {"gate_kind": "relu"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("build", [eight_bit, four_bit])
def test_forward(build, dtype, options):
    base = build().eval()
    x = torch.randn(3, 5, 64).to(dtype)
    with torch.no_grad():
        plain = base(x)
        model = get_peft_model(base, DiselConfig(r=4, target_modules=["proj"], **options)).eval()
        assert type(base.proj).__name__ in ("Linear8bitLt", "Linear4bit") and base.proj.lora_A
        assert torch.equal(model(x), plain)
        tiny_models.randomise_disel(model)
        assert {p.dtype for p in tiny_models.adapter_tensors(model).values()} == {torch.float32}
        layer = base.proj
        hidden = x.float() @ layer.lora_A["default"].weight.T
        if "default" in layer.lora_G:
            gate = layer.lora_G["default"]
            matrix = gate.weight if gate.weight_in is None else gate.weight @ gate.weight_in
            gates = torch.sigmoid(x.float() @ matrix.T + gate.bias)
        else:
            gates = (hidden > 0).float()
        update = 2 * (gates * hidden) @ layer.lora_B["default"].weight.T
        output = model(x)
        assert output.dtype == plain.dtype
        torch.testing.assert_close(output, (plain + update).to(plain.dtype), rtol=0.02, atol=0.02)
        model.add_adapter("other", DiselConfig(r=2, target_modules=["proj"]))
        tiny_models.randomise_disel(model, "other", seed=4)
        mixed = model(x, adapter_names=["default", "__base__", "other"])
        torch.testing.assert_close(mixed[0], output[0])
        torch.testing.assert_close(mixed[1], plain[1])


@pytest.mark.parametrize("options", [{}, {"gate_rank": 2}, {"gate_kind": "relu"}], ids=str)
@pytest.mark.parametrize("build", [eight_bit, four_bit])
def test_training(build, options):
    model = get_peft_model(build(), DiselConfig(r=4, target_modules=["proj"], **options))
    model.add_adapter("other", DiselConfig(r=2, target_modules=["proj"]))
    tiny_models.randomise_disel(model)
    x = torch.randn(3, 5, 64).bfloat16().requires_grad_()
    model(x).float().square().sum().backward()
    assert x.grad.abs().max() > 0
    for name, parameter in tiny_models.adapter_tensors(model).items():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    assert all(p.grad is None for p in tiny_models.adapter_tensors(model, "other").values())


@pytest.mark.parametrize("build", [eight_bit, four_bit])
@pytest.mark.filterwarnings("ignore:Merge lora module")
def test_merging_is_refused(build):
    base = build()
    model = get_peft_model(base, DiselConfig(r=4, target_modules=["proj"]))
    weight = base.proj.base_layer.weight.data.clone()
    with pytest.raises(MergeError):
        model.merge_adapter()
    with pytest.raises(MergeError):
        base.proj.merge(safe_merge=True)
    assert torch.equal(base.proj.base_layer.weight.data, weight)


def test_a_layer_that_knows_no_gates_is_refused():
    from peft.tuners import lora

    class OtherBackend(lora.Linear):
        """As PEFT derives its layers over torchao's weights and others: merging there knows no variants."""

    made = (nn.Linear(4, 8), "default", lora.LoraConfig(r=2))
    refuse_layer(lora.Linear(*made, r=2), "proj")
    with pytest.raises(UnsupportedModuleError, match="proj became a OtherBackend"):
        refuse_layer(OtherBackend(*made, r=2), "proj")
