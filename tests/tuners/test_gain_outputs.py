"""Gains on the outputs of keys and values beside those on inputs: GAIN and (IA)3 in one adapter."""

import copy
import warnings

import pytest
import torch
import transformers
from peft import IA3Config, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from torch import nn
from transformers import AutoModel, PhiConfig
from transformers.pytorch_utils import Conv1D

from gaintune.errors import AdapterError, UnsupportedModuleError
from gaintune.tuners.gain import GainConfig, GainLayer
from support import refused
from support.tiny_models import IDS, SIZES, adapter_tensors, causal_lm, gpt2, llama, logits, randomise, tokens

BOTH = {"ffn": True, "output_modules": True}
SMALL = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "pad_token_id": 0, "max_position_embeddings": 40}
OTHER_SIZES = {"d_model": 32, "n_heads": 4, "n_layers": 2, "n_embd": 32, "n_head": 4, "n_layer": 2, "vocab_size": 97}


def phi():
    """A model whose keys and values have biases, random ones."""
    model = causal_lm(PhiConfig(**{**SIZES, "intermediate_size": 48, "max_position_embeddings": 64}))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return model


def adapted(build=llama, seed=3, **options):
    return randomise(get_peft_model(build(), GainConfig(**{**BOTH, **options})), seed=seed).eval()


@torch.no_grad()
def scaled_by_hand(model, gains, queries=0):
    """The base in float64 with its weights multiplied: rows and biases of keys and values, columns of the others."""
    model = copy.deepcopy(model).double()
    for name, module in model.named_modules():
        gain = gains.get(name)
        if gain is None:
            continue
        weight = module.weight.T if isinstance(module, Conv1D) else module.weight
        if name.endswith(("k_proj", "v_proj", "c_attn", "qkv_proj")):
            weight[queries:] *= gain[:, None]
            if module.bias is not None:
                module.bias[queries:] *= gain
        else:
            weight *= gain
    return model


def gains_of(model, adapter="default"):
    return {
        name.removeprefix("base_model.model."): 1 + layer.gain_v[adapter].detach().double()
        for name, layer in model.named_modules()
        if isinstance(layer, GainLayer) and adapter in layer.gain_v
    }


@pytest.mark.parametrize(("build", "queries"), [(llama, 0), (phi, 0), (gpt2, 32)])
def test_it_computes_what_the_weights_scaled_by_hand_compute_and_so_does_the_merged_model(build, queries):
    base = build()
    model = get_peft_model(copy.deepcopy(base), GainConfig(**BOTH)).eval()
    assert torch.equal(logits(model), logits(base))
    randomise(model)
    reference = logits(scaled_by_hand(base, gains_of(model), queries))
    torch.testing.assert_close(logits(model.double()), reference, rtol=1e-6, atol=1e-6)  # gains were drawn in fp32
    model = adapted(build)
    expected = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload(safe_merge=True)), expected, rtol=1e-4, atol=1e-4)


def test_on_keys_and_values_alone_it_is_ia3_of_peft_in_output_and_gradient():
    names = ["k_proj", "v_proj"]
    ours = randomise(get_peft_model(phi(), GainConfig(target_modules=names, output_modules=names)))
    theirs = get_peft_model(phi(), IA3Config(target_modules=names, feedforward_modules=[]))
    factors = {name: p for name, p in theirs.named_parameters() if "ia3_l" in name}
    gains = adapter_tensors(ours)
    assert {name.replace("ia3_l", "gain_v") for name in factors} == set(gains)
    with torch.no_grad():
        for name, factor in factors.items():
            factor.copy_((1 + gains[name.replace("ia3_l", "gain_v")]).view_as(factor))
    losses = [model(input_ids=IDS, labels=IDS).loss for model in (ours, theirs)]
    for loss in losses:
        loss.backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    for name, factor in factors.items():
        own = gains[name.replace("ia3_l", "gain_v")].grad
        torch.testing.assert_close(own, factor.grad.flatten(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("name", "changes"), [
    ("Phi3", {"head_dim": 8}), ("Mpt", {}), ("ModernBert", {"global_attn_every_n_layers": 1}), ("GPTBigCode", {}),
])  # fmt: skip
@torch.no_grad()
def test_of_a_fused_module_the_keys_and_values_are_scaled_and_the_queries_are_not(name, changes):
    settings = {**(OTHER_SIZES if name in ("Mpt", "GPTBigCode") else SMALL), **changes}
    model = AutoModel.from_config(getattr(transformers, f"{name}Config")(**settings)).eval()
    before = model(IDS).last_hidden_state
    wrapped = get_peft_model(model, GainConfig(output_modules=True)).eval()
    assert torch.equal(wrapped(IDS).last_hidden_state, before)
    layers = [layer for layer in model.modules() if isinstance(layer, GainLayer) and layer.outputs]
    assert len(layers) == 2
    width = {"Phi3": 32, "GPTBigCode": 16}.get(name, 64)  # of keys and values: heads times 8, twice
    for layer in layers:
        assert layer.gain_v["default"].shape == (width,)
        x = torch.randn(1, 3, layer.in_features)
        plain = layer(x)
        layer.gain_v["default"].fill_(1.0)
        queries = layer.out_features - width
        assert queries == 32 and torch.equal(layer(x)[..., :queries], plain[..., :queries])
        assert torch.equal(layer(x)[..., queries:], 2 * plain[..., queries:])


@pytest.mark.parametrize(("name", "settings"), [
    ("GPTNeoX", SMALL), ("Bloom", {**OTHER_SIZES, "hidden_size": 32}), ("Falcon", SMALL),
    ("GPTBigCode", {**OTHER_SIZES, "multi_query": False}),
])  # fmt: skip
def test_where_queries_are_mixed_in_it_is_refused(name, settings):
    settings = {key: value for key, value in settings.items() if name != "Falcon" or key != "intermediate_size"}
    model = AutoModel.from_config(getattr(transformers, f"{name}Config")(**settings))
    fused = "c_attn" if name == "GPTBigCode" else "query_key_value"
    refused(UnsupportedModuleError, "queries, keys and values", get_peft_model, model, GainConfig(output_modules=True))
    named = GainConfig(target_modules=[], output_modules=[fused])
    refused(UnsupportedModuleError, "would scale queries too", get_peft_model, model, named)
    assert not any(isinstance(module, GainLayer) for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerging_restores_every_bit_biases_too_and_a_broken_merge_changes_nothing(dtype):
    base = phi().to(dtype)
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    model = randomise(get_peft_model(base, GainConfig(**BOTH))).eval()
    expected = logits(model)

    def kept():
        names = {name.replace(".base_layer", ""): p for name, p in base.named_parameters() if "gain_v" not in name}
        return all(torch.equal(names[name], p) for name, p in before.items())

    model.merge_adapter(safe_merge=True)
    assert not kept() and not torch.equal(base.model.layers[0].self_attn.k_proj.base_layer.bias,
                                          before["model.layers.0.self_attn.k_proj.bias"])  # fmt: skip
    model.unmerge_adapter()
    assert kept() and torch.equal(logits(model), expected)
    layer = base.model.layers[1].self_attn.v_proj
    with torch.no_grad():
        layer.base_layer.weight[4], layer.gain_v["default"][4] = 0, 1.0
        layer.base_layer.bias[4] = torch.finfo(dtype).max  # only the bias leaves the dtype's range
    weight = layer.base_layer.weight.clone()
    refused(ValueError, "NaNs detected", layer.merge, safe_merge=True)
    assert torch.equal(layer.base_layer.weight, weight) and not layer.merged


@pytest.mark.parametrize("build", [llama, gpt2])
def test_several_adapters_multiply_mix_in_a_batch_and_combine(build):
    model = adapted(build)
    model.add_adapter("other", GainConfig(**BOTH))
    randomise(model, "other", seed=4)
    model.add_adapter("plain", GainConfig())  # lacks keys, values and the feed-forward blocks
    randomise(model, "plain", seed=5)
    single = {}
    for name in ("default", "other", "plain"):
        model.set_adapter(name)
        single[name] = logits(model)
    with model.disable_adapter():
        single["__base__"] = logits(model)
    ids, names = IDS.repeat(2, 1)[:4], ["other", "__base__", "plain", "default"]
    mixed = logits(model, ids, adapter_names=names)
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row], single[name][row % 3], rtol=1e-4, atol=1e-5)
    model.base_model.set_adapter(["default", "other"])
    together = logits(model)
    model.merge_adapter(adapter_names=["default"])
    torch.testing.assert_close(logits(model), together, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    model.base_model.add_weighted_adapter(["default", "plain"], [0.5, 2.0], "sum")
    first, second, total = (gains_of(model, name) for name in ("default", "plain", "sum"))
    for name, gain in total.items():
        torch.testing.assert_close(gain, 1 + 0.5 * (first[name] - 1) + 2 * (second.get(name, 1.0) - 1))


def test_it_is_saved_loaded_and_swapped_and_a_file_of_the_other_side_is_refused(tmp_path):
    model = adapted()
    model.base_model.add_weighted_adapter(["default"], [1.0], "twin")
    model.save_pretrained(tmp_path)
    for folder, adapter in ((tmp_path, "default"), (tmp_path / "twin", "twin")):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            loaded = PeftModel.from_pretrained(llama(), folder).eval()
        assert torch.equal(logits(loaded), logits(model)), adapter
    target = adapted(seed=8)
    hotswap_adapter(target, str(tmp_path), "default", torch_device="cpu")
    assert torch.equal(logits(target), logits(model))
    square = {"num_key_value_heads": 4}
    inputs = get_peft_model(llama(**square), GainConfig(target_modules=["v_proj"])).eval()
    get_peft_model(llama(**square), GainConfig(target_modules=[], output_modules=["v_proj"])).save_pretrained(
        tmp_path / "square"
    )
    swap = (hotswap_adapter, inputs, str(tmp_path / "square"), "default")
    refused(AdapterError, "gains on its input here, and on its output in the new file", *swap, torch_device="cpu")
    second = GainConfig(target_modules=[], output_modules=["v_proj"])
    refused(UnsupportedModuleError, "has gains on its input already", inputs.add_adapter, "second", second)


def test_a_plain_adapter_has_no_word_of_outputs_in_its_file(tmp_path):
    get_peft_model(llama(), GainConfig(ffn=True)).save_pretrained(tmp_path)
    assert "output_modules" not in (tmp_path / "adapter_config.json").read_text()
    refused(ValueError, "list of names, or True", GainConfig, output_modules="v_proj")
    refused(UnsupportedModuleError, "`output_modules` names", get_peft_model, llama(),
            GainConfig(target_modules="o_proj|.*o_proj", output_modules=["v_proj"]))  # fmt: skip


def test_generation_with_one_adapter_a_row_reads_scaled_keys_from_the_cache():
    model = adapted()
    model.add_adapter("other", GainConfig(**BOTH))
    randomise(model, "other", seed=4)
    ids = tokens(2, 5)
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mixed = model.generate(input_ids=ids, adapter_names=["other", "default"], **settings)
    for row, name in enumerate(("other", "default")):
        model.set_adapter(name)
        alone = model.generate(input_ids=ids[row : row + 1], use_cache=False, **settings)
        assert torch.equal(mixed[row], alone[0])


@torch.no_grad()
def test_an_eight_bit_layer_scales_its_output_and_merges_weight_and_bias():
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear8bitLt(64, 32, bias=True, has_fp16_weights=False, threshold=0.0)
    layer.load_state_dict(nn.Linear(64, 32, bias=True).state_dict())
    base = nn.Sequential(layer).to("cpu").eval()
    base.is_loaded_in_8bit = True
    x = torch.randn(5, 64)
    plain = base(x)
    model = randomise(get_peft_model(base, GainConfig(target_modules=[], output_modules=["0"]))).eval()
    expected = plain * (1 + base[0].gain_v["default"])
    torch.testing.assert_close(model(x), expected)
    model.merge_adapter(safe_merge=True)
    assert 0 < (model(x) - expected).norm() < 0.03 * expected.norm()  # merging quantizes once more
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), expected)


@torch.no_grad()
def test_a_four_bit_layer_scales_its_output():
    bnb = pytest.importorskip("bitsandbytes")
    base = nn.Sequential(bnb.nn.Linear4bit(64, 32, bias=True, compute_dtype=torch.bfloat16, quant_type="nf4")).to("cpu")
    base.is_loaded_in_4bit = True
    twin, x = copy.deepcopy(base).eval(), torch.randn(5, 64).bfloat16()
    model = randomise(get_peft_model(base, GainConfig(target_modules=[], output_modules=["0"]))).eval()
    plain, v = twin(x), base[0].gain_v["default"]
    assert model(x).dtype == plain.dtype
    torch.testing.assert_close(model(x).float(), plain.float() * (1 + v), rtol=0.01, atol=0.01)
