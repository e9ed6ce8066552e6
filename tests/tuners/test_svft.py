"""SVFT: the function and gradients against numpy in float64, merging, saving, several adapters, and refusals."""

import copy

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from gaintune.errors import ConfigError, UnsupportedModuleError
from gaintune.tuners.svft import SvftConfig, SvftLinear
from support import refused
from support.tiny_models import IDS, gpt2, llama, logits

IN, OUT = 7, 5


def linear(kind=nn.Linear):
    return nn.Sequential(nn.Linear(IN, OUT) if kind is nn.Linear else Conv1D(OUT, IN))


def svft(model, scale=0.3, **options):
    model = get_peft_model(model, SvftConfig(**options))
    return disturbed(model, scale=scale)


def disturbed(model, adapter="default", scale=0.3, seed=3):
    generator = torch.Generator().manual_seed(seed)
    for layer in layers(model):
        m = layer.svft_m[adapter].data
        m.copy_(scale * torch.randn(m.shape, generator=generator))
    return model


def layers(model):
    return [module for module in model.modules() if isinstance(module, SvftLinear)]


def singular_parts(weight):
    """U and V^T of a weight `(out, in)` by numpy, in float64, with the largest entry of each left vector positive."""
    left, _, right = np.linalg.svd(weight.detach().double().numpy(), full_matrices=False)
    signs = np.sign(left[np.abs(left).argmax(axis=0), np.arange(left.shape[1])])
    return left * signs, right * signs[:, None]


def banded(diagonals, k, width):
    """M `(k, k)` of diagonals that follow one another: main, +1, -1, +2, -2."""
    matrix, rest = np.zeros((k, k)), list(diagonals)
    for offset in (0, *(sign * distance for distance in range(1, width + 1) for sign in (1, -1))):
        length = k - abs(offset)
        matrix += np.diag(rest[:length], offset)
        rest = rest[length:]
    assert not rest
    return matrix


@pytest.mark.parametrize("width", [0, 1, 2])
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_output_and_gradients_are_those_of_the_closed_form(kind, width):
    base = linear(kind)
    weight = (base[0].weight if kind is nn.Linear else base[0].weight.T).detach().double().numpy()
    bias = base[0].bias.detach().double().numpy()
    model = svft(base, off_diagonals=width)
    (layer,) = layers(model)
    x, g = torch.randn(4, 3, IN, requires_grad=True), torch.randn(4, 3, OUT)
    result = model(x)
    result.backward(g)
    left, right = singular_parts(torch.from_numpy(weight))
    m = layer.svft_m["default"]
    matrix = banded(m.detach().double().numpy(), OUT, width)
    adapted = weight + left @ matrix @ right
    rows, grads = x.detach().double().numpy(), g.double().numpy()
    np.testing.assert_allclose(result.detach().numpy(), rows @ adapted.T + bias, rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(x.grad.numpy(), grads @ adapted, rtol=2e-5, atol=2e-6)
    full = np.einsum("btk,btl->kl", grads @ left, rows @ right.T)  # the gradient of a dense M
    offsets = (0, *(sign * distance for distance in range(1, width + 1) for sign in (1, -1)))
    expected = np.concatenate([np.diagonal(full, offset) for offset in offsets])
    np.testing.assert_allclose(m.grad.numpy(), expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("build", [llama, gpt2])
def test_it_starts_at_the_base_merges_exactly_and_gives_the_weight_back(build):
    base = build()
    before = logits(base)
    model = get_peft_model(base, SvftConfig(off_diagonals=1))
    assert torch.equal(logits(model), before)
    disturbed(model)
    expected, weights = logits(model), [layer.get_base_layer().weight for layer in layers(model)]
    assert (expected - before).abs().max() > 0.1
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert all(layer.get_base_layer().weight is weight for layer, weight in zip(layers(model), weights, strict=True))
    assert torch.equal(logits(model), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)


def test_a_broken_adapter_leaves_the_weight():
    model = svft(linear())
    (layer,) = layers(model)
    weight, layer.svft_m["default"].data[0] = layer.get_base_layer().weight, float("nan")
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    assert layer.get_base_layer().weight is weight and not layer.merged


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_adapter_computes_the_same_on_a_fresh_base(tmp_path, dtype):
    model = svft(llama().to(dtype), off_diagonals=1)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 20_000  # no singular vectors
    again = PeftModel.from_pretrained(llama().to(dtype), tmp_path)
    assert again.peft_config["default"].base_dtype == str(dtype).removeprefix("torch.")
    assert torch.equal(logits(again), logits(model))
    assert {layer.svft_m["default"].dtype for layer in layers(again)} == {torch.float32}


def test_a_bf16_adapter_on_a_wider_base_means_the_singular_vectors_it_was_trained_on(tmp_path):
    base = llama()
    svft(copy.deepcopy(base).bfloat16()).save_pretrained(tmp_path)
    wide = PeftModel.from_pretrained(base, tmp_path)
    for layer in layers(wide):
        left, right = singular_parts(layer.get_base_layer().weight.bfloat16())
        np.testing.assert_allclose(layer.left.double().numpy(), left, atol=1e-4)
        np.testing.assert_allclose(layer.right.double().numpy(), right, atol=1e-4)


def test_in_bf16_values_train_in_float32_and_the_update_has_two_digits():
    exact = svft(linear().double())
    model = copy.deepcopy(exact).bfloat16()
    assert layers(model)[0].svft_m["default"].dtype == torch.float32
    x, g = torch.randn(64, IN).bfloat16(), torch.randn(64, OUT).bfloat16()
    model(x).backward(g)
    exact(x.double()).backward(g.double())
    ours, theirs = layers(model)[0].svft_m["default"].grad, layers(exact)[0].svft_m["default"].grad
    assert model(x).dtype == torch.bfloat16 and (ours - theirs).norm() < 0.03 * theirs.norm()


@pytest.mark.filterwarnings("ignore:Already following adapters were merged:UserWarning")  # by this test
def test_active_adapters_add_up_and_an_inactive_one_is_frozen():
    model = svft(linear())
    model.add_adapter("other", SvftConfig(off_diagonals=1))
    disturbed(model, "other", seed=4)
    assert not layers(model)[0].svft_m["other"].requires_grad
    x = torch.randn(6, IN)
    with model.disable_adapter():
        base = model(x)
    updates = []
    for name in ("default", "other"):
        model.set_adapter(name)
        updates.append(model(x) - base)
    model.base_model.set_adapter(["default", "other"])
    both = base + sum(updates)
    torch.testing.assert_close(model(x), both)
    model.merge_adapter(adapter_names=["other"])
    torch.testing.assert_close(model(x), both)
    model.merge_adapter(adapter_names=["default"])
    torch.testing.assert_close(model(x), both)
    model.unmerge_adapter()
    model.delete_adapter("other")
    torch.testing.assert_close(model(x), base + updates[0])


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time:UserWarning")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
def test_what_cannot_be_adapted_is_refused():
    refused(
        UnsupportedModuleError,
        "Embedding, which SVFT does not adapt",
        get_peft_model,
        llama(),
        SvftConfig(target_modules=["embed_tokens"]),
    )
    refused(ConfigError, "off_diagonals is -1", SvftConfig, off_diagonals=-1)
    refused(ConfigError, "base_dtype is 'wide'", SvftConfig, base_dtype="wide")
    model = svft(llama())
    refused(UnsupportedModuleError, "adapters? called 'default'", get_peft_model, model.base_model.model, SvftConfig())
    with pytest.raises(ConfigError, match="SVFT takes one adapter for a whole batch"):
        model(input_ids=IDS, adapter_names=["default"] * len(IDS))
    config = SvftConfig(base_dtype="bfloat16")
    with pytest.raises(UnsupportedModuleError, match="singular vectors of bfloat16 weights"):
        model.add_adapter("other", config)
