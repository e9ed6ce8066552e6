"""Merging absorbs the gains into the weights; unmerging brings back the very weights that were there."""

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn

from gaintune.tuners.gain import GainConfig
from support import refused
from support.tiny_models import IDS, adapter_tensors, gpt2, llama, logits, randomise


def weights(model):
    """Weights of every base layer by their name in the base, exactly."""
    return {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): p.detach().clone()
        for name, p in model.named_parameters()
        if "gain_v" not in name
    }


def assert_same_weights(left, right):
    assert left.keys() == right.keys()
    for name, weight in left.items():
        assert torch.equal(weight, right[name]), name


def one(build=llama, ffn=True):
    return randomise(get_peft_model(build(), GainConfig(ffn=ffn))).eval()


def two(ffn=False):
    """A model with adapters "first", which is active, and "second"."""
    model = get_peft_model(llama(), GainConfig(ffn=ffn), "first")
    model.add_adapter("second", GainConfig())
    return randomise(randomise(model, "first"), "second", seed=4).eval()


@pytest.mark.parametrize("build", [llama, gpt2])
def test_merged_equals_unmerged_with_zero_and_negative_gains(build):
    model = one(build)
    expected, merged = logits(model), model.merge_and_unload(safe_merge=True)
    assert not any("gain" in name for name, _ in merged.named_modules())
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("build", [llama, gpt2])
def test_unmerging_or_disabling_restores_every_bit_in_a_copy_too(build, dtype):
    base = build().to(dtype)
    before, plain = weights(base), logits(base)
    model = randomise(get_peft_model(base, GainConfig(ffn=True))).eval()
    expected = logits(model)
    model.merge_adapter(safe_merge=True)
    assert sum(not torch.equal(before[name], weight) for name, weight in weights(model).items()) == 4
    twin = copy.deepcopy(model)
    twin.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    for restored in (model, twin):
        assert_same_weights(weights(restored), before)
        assert torch.equal(logits(restored), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merging_rounds_once_from_float32(dtype):
    base = nn.Sequential(nn.Linear(64, 32)).to(dtype)
    weight = base[0].weight.detach().clone()
    model = get_peft_model(base, GainConfig(target_modules=["0"]))
    v = 0.003 * torch.arange(64)  # rounding 1 + v to bfloat16 first would be visible
    with torch.no_grad():
        base[0].gain_v["default"].copy_(v)
    merged = model.merge_and_unload()[0].weight
    assert merged.dtype == dtype and torch.equal(merged, (weight.float() * (1 + v)).to(dtype))


def test_conv1d_scales_rows():
    base = gpt2()
    weight = base.transformer.h[0].attn.c_proj.weight.detach().clone()  # (in, out)
    model = randomise(get_peft_model(base, GainConfig()))
    gain = 1 + base.transformer.h[0].attn.c_proj.gain_v["default"].detach()
    assert torch.equal(model.merge_and_unload().transformer.h[0].attn.c_proj.weight, gain.diag() @ weight)


def test_merging_one_of_two_active_adapters_keeps_the_other():
    model = two(ffn=True)
    before = weights(model)
    model.base_model.set_adapter(["first", "second"])
    both = logits(model)
    model.merge_adapter(adapter_names=["first"])
    torch.testing.assert_close(logits(model), both, rtol=1e-4, atol=1e-5)
    with pytest.warns(UserWarning, match="additionally merging"):
        model.merge_adapter(adapter_names=["second"])
    torch.testing.assert_close(logits(model), both, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert_same_weights(weights(model), before)
    model.merge_adapter()
    together = weights(model)
    model.unmerge_adapter()
    model.merge_adapter(adapter_names=["second"])
    with pytest.warns(UserWarning, match="additionally merging"):
        model.merge_adapter(adapter_names=["first"])
    for name, weight in together.items():
        torch.testing.assert_close(weights(model)[name], weight)


def test_training_goes_on_beside_a_merged_adapter():
    model = two()
    model.base_model.set_adapter(["first", "second"])
    model.merge_adapter(adapter_names=["first"])
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(v.grad.abs().max() > 0 for v in adapter_tensors(model, "second").values())
    assert all(v.grad is None for v in adapter_tensors(model, "first").values())


@pytest.mark.filterwarnings("ignore:Already following adapters were merged")
@pytest.mark.parametrize("earlier", [False, True])
def test_a_safe_merge_that_fails_changes_nothing(earlier):
    base = llama()
    model = get_peft_model(base, GainConfig(), "good")
    model.add_adapter("broken", GainConfig())
    randomise(model, "good")
    model.base_model.set_adapter(["good", "broken"])
    if earlier:
        model.merge_adapter(adapter_names=["good"])
    before = weights(model)
    with torch.no_grad():
        base.model.layers[0].self_attn.o_proj.gain_v["broken"][3] = float("nan")
    layer = base.model.layers[0].self_attn.o_proj
    refused(ValueError, "NaNs detected", layer.merge, safe_merge=True, adapter_names=["broken"])
    assert_same_weights(weights(model), before)
    assert layer.merged_adapters == (["good"] if earlier else [])


def test_a_weight_shared_with_another_module_is_not_scaled_there():
    base = nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "b": nn.Linear(4, 4, bias=False)})
    base["b"].weight = base["a"].weight
    before = base["a"].weight.detach().clone()
    model = randomise(get_peft_model(base, GainConfig(target_modules=["a"])))
    model.merge_adapter()
    assert torch.equal(base["b"].weight, before) and not torch.equal(base["a"].base_layer.weight, before)
    model.unmerge_adapter()
    assert base["a"].base_layer.weight is base["b"].weight


def test_an_adapter_name_chosen_for_merging():
    model = two()
    model.set_adapter("second")
    expected = logits(model)
    model.set_adapter("first")
    torch.testing.assert_close(logits(model.merge_and_unload(adapter_names=["second"])), expected, rtol=1e-4, atol=1e-5)
