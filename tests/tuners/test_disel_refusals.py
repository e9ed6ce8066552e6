"""What cannot hold with gates is refused, with a reason, and before the model is touched."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import convert_to_lora
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig
from torch import nn
from transformers import AutoModelForCausalLM, MambaConfig, MixtralConfig

from gaintune.errors import ConfigError, GaintuneError, MergeError, UnsupportedModuleError
from gaintune.tuners.disel import DiselConfig
from support import tiny_models

IDS = tiny_models.tokens()


def refuse(model, config, match, error=UnsupportedModuleError):
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(error, match=match):
        get_peft_model(model, config)
    assert {name: type(module) for name, module in model.named_modules()} == before


@pytest.fixture
def model():
    model = get_peft_model(tiny_models.llama(), DiselConfig(r=2))
    model.add_adapter("other", DiselConfig(r=2))
    return tiny_models.randomise_disel(model).eval()


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload", "layer"])
@torch.no_grad()
def test_merging(model, how, safe_merge):
    expected = model(input_ids=IDS).logits
    layer = model.base_model.model.model.layers[0].self_attn.o_proj
    weight = layer.base_layer.weight.clone()
    merge = layer.merge if how == "layer" else getattr(model, how)
    with pytest.raises(MergeError, match="gates depend on the input"):
        merge(safe_merge=safe_merge)
    assert torch.equal(layer.base_layer.weight, weight) and not layer.merged
    assert torch.equal(model(input_ids=IDS).logits, expected)


def test_an_update_that_is_one_matrix(model):
    layer = model.base_model.model.model.layers[0].self_attn.o_proj
    for name in ("default", "other"):
        with pytest.raises(MergeError, match="gates depend on the input"):
            layer.get_delta_weight(name)


def test_weighted_combination(model):
    with pytest.raises(ConfigError, match="cannot be combined"):
        model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "sum")
    assert set(model.peft_config) == {"default", "other"}


def test_conversion_to_lora(model, tmp_path):
    assert not model.supports_lora_conversion() and not model.base_model.supports_lora_conversion()
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        convert_to_lora(model, rank=2)
    with pytest.raises(ConfigError, match="cannot be converted to LoRA"):
        model.base_model.subtract_mutated_init({}, "default")
    model.save_pretrained(tmp_path / "initial")
    with pytest.raises(ConfigError, match="cannot be converted to LoRA"):
        model.save_pretrained(tmp_path / "out", path_initial_model_for_weight_conversion=tmp_path / "initial")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("use_dora", True),
        ("alora_invocation_tokens", [1, 2]),
        ("use_qalora", True),
        ("velora_config", VeloraConfig()),
        ("monteclora_config", MontecloraConfig()),
        ("kasa_config", KasaConfig()),
        ("use_bdlora", BdLoraConfig()),
        ("megatron_config", {"a": 1}),
        ("lora_bias", True),
        ("target_parameters", ["lin.weight"]),
    ],
)
@pytest.mark.filterwarnings("ignore:aLoRA is currently")
def test_other_variants_on_top(name, value):
    with pytest.raises(ConfigError, match=name):
        DiselConfig(**{name: value})


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "eva", "corda", "lora_ga", "orthogonal", "mica"])
@pytest.mark.filterwarnings("ignore:`init_lora_weights` is")
def test_starts_that_change_the_base(start):
    with pytest.raises(ConfigError, match=f"init_lora_weights='{start}'"):
        DiselConfig(init_lora_weights=start)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_training_the_bases_biases(bias):
    with pytest.raises(ConfigError, match=r"bias='.*past the gates"):
        DiselConfig(bias=bias)


def test_a_setting_changed_after_the_fact():
    config = DiselConfig()
    config.bias = "all"
    refuse(tiny_models.llama(), config, "past the gates", error=ConfigError)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"gate_kind": "tanh"}, "gate_kind is 'tanh'"),
        ({"gate_weight_init": "ones"}, "gate_weight_init is 'ones'"),
        ({"gate_rank": 0}, "gate_rank is 0"),
        ({"gate_rank": 2, "gate_kind": "relu"}, "Gated LoRA"),
        ({"gate_lr_ratio": 0.0}, "gate_lr_ratio is 0"),
        ({"gate_lr_ratio": float("inf")}, "gate_lr_ratio is inf: give a finite number"),
        ({"gate_bias_init": float("nan")}, "gate_bias_init is nan: give a finite number"),
        ({"lora_alpha": float("inf")}, "lora_alpha is inf: give a finite number"),
    ],
)
def test_settings_that_mean_nothing(options, match):
    with pytest.raises(ConfigError, match=match):
        DiselConfig(**options)


@pytest.mark.parametrize(
    ("module", "kind"),
    [(nn.Embedding(4, 8), "Embedding"), (nn.Conv1d(8, 8, 1), "Conv1d"), (nn.Conv2d(8, 8, 1), "Conv2d")],
)
def test_modules_that_are_not_linear(module, kind):
    model = nn.ModuleDict({"first": nn.Linear(8, 8), "target": module})
    refuse(model, DiselConfig(target_modules=["first", "target"]), f"target is a {kind}, which DISeL does not adapt")


@pytest.mark.parametrize("target", [["out_proj"], ["attention"], "all-linear"])
def test_multihead_attention(target):
    model = nn.ModuleDict({"first": nn.Linear(8, 8), "attention": nn.MultiheadAttention(8, 2)})
    match = "is a MultiheadAttention" if target == ["attention"] else "out_proj.*never calls the module"
    refuse(model, DiselConfig(target_modules=target), match)


def test_mambas_output_projection():
    model = AutoModelForCausalLM.from_config(MambaConfig(vocab_size=61, hidden_size=16, num_hidden_layers=1))
    refuse(model, DiselConfig(target_modules=["out_proj"]), "Mamba")


def test_fused_experts_are_refused_where_they_are_named():
    config = MixtralConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    model = AutoModelForCausalLM.from_config(config)
    refuse(model, DiselConfig(target_modules=["o_proj", "down_proj"]), r"experts\.down_proj is one parameter")
    refuse(model, DiselConfig(), "fused experts")  # all linear layers, and the experts are none
    get_peft_model(model, DiselConfig(target_modules=["o_proj"]))


def test_a_module_used_in_two_places():
    model = tiny_models.llama()
    model.model.layers[1].self_attn.o_proj = model.model.layers[0].self_attn.o_proj
    refuse(model, DiselConfig(), "used in 2 places")


def test_a_tied_embedding():
    model = tiny_models.llama(tie_word_embeddings=True)
    config = DiselConfig(target_modules=["lm_head"], ensure_weight_tying=True)
    refuse(model, config, "embed_tokens is a Embedding")


@pytest.mark.filterwarnings("ignore:You are trying to modify a model", "ignore:Already found a `peft_config`")
def test_a_layer_of_another_method():
    base = tiny_models.llama()
    get_peft_model(base, LoraConfig(target_modules=["o_proj"]))
    refuse(base, DiselConfig(target_modules=["o_proj"]), r"already carries an adapter of another method \(peft\.tuners")


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # two adapters on one model are the point
def test_lora_beside_disel():
    model = tiny_models.llama()
    model.add_adapter(DiselConfig(target_modules=["o_proj"]), "gated")
    with pytest.raises(UnsupportedModuleError, match=r"takes no adapter of another kind \(LoraConfig\)"):
        model.add_adapter(LoraConfig(target_modules=["o_proj"]), "plain")


@pytest.mark.filterwarnings("ignore:You are trying to modify a model", "ignore:Already found a `peft_config`")
def test_wrapping_twice_does_not_overwrite_the_first_adapter():
    base = tiny_models.llama()
    model = tiny_models.randomise_disel(get_peft_model(base, DiselConfig(target_modules=["o_proj"])))
    before = [p.detach().clone() for p in tiny_models.adapter_tensors(model).values()]
    with pytest.raises(UnsupportedModuleError, match="already has an adapter called 'default'"):
        get_peft_model(base, DiselConfig(target_modules=["o_proj"]))
    assert all(torch.equal(a, b) for a, b in zip(before, tiny_models.adapter_tensors(model).values(), strict=True))


def test_custom_layers():
    config = DiselConfig(target_modules=["o_proj"])
    config._register_custom_module({nn.Linear: nn.Identity})
    refuse(tiny_models.llama(), config, "Custom LoRA layers")


def test_every_refusal_is_an_error_of_ours():
    assert issubclass(UnsupportedModuleError, GaintuneError) and issubclass(MergeError, GaintuneError)
