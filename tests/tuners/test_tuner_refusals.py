"""What cannot be adapted correctly, or cannot hold with gates, is refused with a reason before the model is touched."""

from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import convert_to_lora
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import MambaConfig, MixtralConfig, Qwen2MoeConfig

from gaintune.errors import ConfigError, GaintuneError, MergeError, UnsupportedModuleError
from gaintune.tuners.disel import DiselConfig
from gaintune.tuners.gain import GainConfig, GainLayer
from support import refused
from support.tiny_models import SIZES, adapter_tensors, causal_lm, copies, llama, logits, randomise

configs = pytest.mark.parametrize("config", [GainConfig, DiselConfig])
MAMBA = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 1}
EXPERTS = {**SIZES, "vocab_size": 61, "intermediate_size": 48, "num_hidden_layers": 1, "num_key_value_heads": 2}


def refuse(model, config, match, error=UnsupportedModuleError):
    before = {name: type(module) for name, module in model.named_modules()}
    refused(error, match, get_peft_model, model, config)
    assert {name: type(module) for name, module in model.named_modules()} == before


def mixtral():
    return causal_lm(MixtralConfig(**EXPERTS, num_local_experts=4))


def qwen2_moe():
    sizes = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 4}
    return causal_lm(Qwen2MoeConfig(**EXPERTS, **sizes))


experts = pytest.mark.parametrize("build", [mixtral, qwen2_moe])


@experts
def test_a_mixture_of_experts_has_no_default_for_gains_and_fused_experts_are_refused_rather_than_left_out(build):
    model = build()
    for ffn in (False, True):
        refuse(model, GainConfig(ffn=ffn), r"mixture of experts.*target_modules=\['o_proj'\]")
    refuse(model, GainConfig(target_modules=["o_proj"], ffn=True), "fused experts")
    refuse(model, DiselConfig(), "fused experts")  # all linear layers, and the experts are none


@experts
@configs
@pytest.mark.filterwarnings("ignore:target_modules names down_proj, which no module")
def test_beside_experts_that_are_refused_by_name_attention_can_be_adapted(config, build):
    # qwen2_moe's shared expert is a linear layer called down_proj, too: half of what was named
    refuse(build(), config(target_modules=["o_proj", "down_proj"]), r"experts\.down_proj is one parameter")
    model = get_peft_model(build(), config(target_modules=["o_proj"]))
    assert all(name.startswith("base_model.model.model.layers.0.self_attn.o_proj.") for name in adapter_tensors(model))


class Outer(nn.Linear):
    def __init__(self):
        super().__init__(8, 8)
        self.inner = nn.Linear(8, 8)


def beside(module):
    return nn.ModuleDict({"first": nn.Linear(8, 8), "target": module})


def shared():
    model = llama()
    model.model.layers[1].self_attn.o_proj = model.model.layers[0].self_attn.o_proj
    return model


def with_lora():
    model = llama()
    get_peft_model(model, LoraConfig(target_modules=["o_proj"]))
    return model


ATTENTION = partial(beside, nn.MultiheadAttention(8, 2))
NEVER_CALLED = "out_proj.*never calls the module"
HELD = r"already carries an adapter of another method \(peft\.tuners\.lora"
NOT_LINEAR = [nn.Embedding(4, 8), nn.Conv1d(8, 8, 1), nn.LayerNorm(8), nn.Sequential(nn.Linear(8, 8))]
NOT_LINEAR += [nn.Bilinear(8, 8, 8), nn.Conv2d(8, 8, 1)]
WHY_NOT = "(not a linear layer|which DISeL does not adapt)"
REFUSED = {  # a model, the modules to adapt, and the reason why neither method adapts them
    "multihead attention by name": (ATTENTION, ["target"], "is a MultiheadAttention"),
    "its projection by name": (ATTENTION, ["out_proj"], NEVER_CALLED),
    "its projection by pattern": (ATTENTION, r".*out_proj", NEVER_CALLED),
    "its projection among all linear layers": (ATTENTION, "all-linear", NEVER_CALLED),
    "mamba's output projection": (lambda: causal_lm(MambaConfig(**MAMBA)), ["out_proj"], "Mamba"),
    "a module in two places": (shared, ["o_proj"], "used in 2 places"),
    "a layer of another method": (with_lora, ["o_proj"], HELD),
} | {
    (name := type(module).__name__): (partial(beside, module), ["first", "target"], f"target is a {name}, {WHY_NOT}")
    for module in NOT_LINEAR
}


@configs
@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.filterwarnings("ignore:You are trying to modify a model", "ignore:Already found a `peft_config`")
def test_modules_that_cannot_be_adapted_are_refused(config, case):
    build, targets, reason = REFUSED[case]
    refuse(build(), config(target_modules=targets), reason)


def changed(config, **fields):
    for name, value in fields.items():
        setattr(config, name, value)
    return config


def custom(config):
    config._register_custom_module({nn.Linear: nn.Identity})
    return config


FAST_PATH = (lambda: nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16)), GainConfig(target_modules=["linear2"]))
NESTED = (lambda: nn.ModuleDict({"outer": Outer()}), GainConfig(target_modules=["outer", "inner"]))
NO_DEFAULT = (llama, GainConfig(ffn=True, exclude_modules=["down_proj"]))
TIED = (lambda: llama(tie_word_embeddings=True), DiselConfig(target_modules=["lm_head"], ensure_weight_tying=True))


@pytest.mark.parametrize(
    ("build", "config", "reason", "error"),
    [
        (*FAST_PATH, "fast path", UnsupportedModuleError),
        (*NESTED, "outer.inner lies inside outer", UnsupportedModuleError),
        (*NO_DEFAULT, "No feed-forward down-projections found", UnsupportedModuleError),
        (*TIED, "embed_tokens is a Embedding", UnsupportedModuleError),
        (llama, custom(DiselConfig(target_modules=["o_proj"])), "Custom LoRA layers", UnsupportedModuleError),
        (llama, changed(DiselConfig(), bias="all"), "past the gates", ConfigError),
    ],
    ids=["torch's transformer layer", "a module inside another", "no default left", "a tied embedding",
         "custom layers", "a setting changed after the fact"],
)  # fmt: skip
def test_what_one_method_cannot_adapt_is_refused(build, config, reason, error):
    refuse(build(), config, reason, error)


def test_names_that_match_nothing_are_named_and_refused_where_they_are_all():
    with pytest.warns(UserWarning, match="absent, which no module"):
        refuse(llama(), GainConfig(target_modules=["absent"]), "absent", error=ValueError)
    with pytest.warns(UserWarning, match="down_porj, which no module"):
        get_peft_model(llama(), GainConfig(target_modules=["o_proj", "down_porj"]))


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # two adapters on one model are the point
def test_lora_beside_disel_is_refused():
    model = llama()
    model.add_adapter(DiselConfig(target_modules=["o_proj"]), "gated")
    with pytest.raises(UnsupportedModuleError, match=r"takes no adapter of another kind \(LoraConfig\)"):
        model.add_adapter(LoraConfig(target_modules=["o_proj"]), "plain")


@configs
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_wrapping_twice_does_not_overwrite_the_first_adapter(config):
    base = llama()
    model = randomise(get_peft_model(base, config(target_modules=["o_proj"])))
    before = copies(model)
    match = "already has an adapter called 'default': a second adapter needs a name of its own"
    with pytest.warns(UserWarning, match="second time"), pytest.raises(UnsupportedModuleError, match=match):
        get_peft_model(base, config(target_modules=["o_proj"]))
    assert all(torch.equal(before[name], p) for name, p in adapter_tensors(model).items())


def test_a_tensor_parallel_layer_is_refused():
    model = nn.ModuleDict({"proj": nn.Linear(8, 8)})
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("tp",))
        model["proj"].weight = nn.Parameter(distribute_tensor(model["proj"].weight.detach(), mesh, [Shard(1)]))
        refuse(model, GainConfig(target_modules=["proj"]), "tensor parallelism")
    finally:
        torch.distributed.destroy_process_group()


def test_linear_layers_in_a_list_of_experts_are_adapted():
    model = nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(8, 8) for _ in range(3))})
    get_peft_model(model, GainConfig(target_modules=r"experts\.\d"))
    assert sum(isinstance(module, GainLayer) for module in model.modules()) == 3


@pytest.fixture
def gated():
    model = get_peft_model(llama(), DiselConfig(r=2))
    model.add_adapter("other", DiselConfig(r=2))
    return randomise(model).eval()


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload", "layer"])
def test_merging_gates_is_refused(gated, how, safe_merge):
    expected = logits(gated)
    layer = gated.base_model.model.model.layers[0].self_attn.o_proj
    weight = layer.base_layer.weight.clone()
    merge = layer.merge if how == "layer" else getattr(gated, how)
    refused(MergeError, "gates depend on the input", merge, safe_merge=safe_merge)
    assert torch.equal(layer.base_layer.weight, weight) and not layer.merged
    assert torch.equal(logits(gated), expected)


def test_gates_are_no_single_matrix_and_cannot_be_combined(gated):
    layer = gated.base_model.model.model.layers[0].self_attn.o_proj
    for name in ("default", "other"):
        refused(MergeError, "gates depend on the input", layer.get_delta_weight, name)
    refused(ConfigError, "cannot be combined", gated.add_weighted_adapter, ["default", "other"], [0.5, 0.5], "sum")
    assert set(gated.peft_config) == {"default", "other"}


def test_conversion_to_lora_is_refused(gated, tmp_path):
    assert not gated.supports_lora_conversion() and not gated.base_model.supports_lora_conversion()
    refused(TypeError, "do not support LoRA conversion", convert_to_lora, gated, rank=2)
    refused(ConfigError, "cannot be converted to LoRA", gated.base_model.subtract_mutated_init, {}, "default")
    gated.save_pretrained(tmp_path / "initial")
    with pytest.raises(ConfigError, match="cannot be converted to LoRA"):
        gated.save_pretrained(tmp_path / "out", path_initial_model_for_weight_conversion=tmp_path / "initial")


STARTS = ["pissa", "pissa_niter_4", "olora", "eva", "corda", "lora_ga", "orthogonal", "mica"]


@pytest.mark.parametrize(("options", "match"), [
    ({"use_dora": True}, "use_dora"),
    ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
    ({"use_qalora": True}, "use_qalora"),
    ({"velora_config": VeloraConfig()}, "velora_config"),
    ({"monteclora_config": MontecloraConfig()}, "monteclora_config"),
    ({"kasa_config": KasaConfig()}, "kasa_config"),
    ({"use_bdlora": BdLoraConfig()}, "use_bdlora"),
    ({"megatron_config": {"a": 1}}, "megatron_config"),
    ({"lora_bias": True}, "lora_bias"),
    ({"target_parameters": ["lin.weight"]}, "target_parameters"),
    *(({"init_lora_weights": start}, f"init_lora_weights='{start}'") for start in STARTS),
    ({"bias": "all"}, r"bias='.*past the gates"),
    ({"bias": "lora_only"}, r"bias='.*past the gates"),
    ({"gate_kind": "tanh"}, "gate_kind is 'tanh'"),
    ({"gate_weight_init": "ones"}, "gate_weight_init is 'ones'"),
    ({"gate_rank": 0}, "gate_rank is 0"),
    ({"gate_rank": 2, "gate_kind": "relu"}, "Gated LoRA"),
    ({"gate_lr_ratio": 0.0}, "gate_lr_ratio is 0"),
    ({"gate_lr_ratio": float("inf")}, "gate_lr_ratio is inf: give a finite number"),
    ({"gate_bias_init": float("nan")}, "gate_bias_init is nan: give a finite number"),
    ({"lora_alpha": float("inf")}, "lora_alpha is inf: give a finite number"),
], ids=lambda value: ",".join(value) if isinstance(value, dict) else None)  # fmt: skip
@pytest.mark.filterwarnings("ignore:aLoRA is currently", "ignore:`init_lora_weights` is")
def test_variants_starts_and_settings_that_cannot_hold_with_gates_are_refused(options, match):
    refused(ConfigError, match, DiselConfig, **options)


def test_every_refusal_is_an_error_of_ours():
    assert issubclass(UnsupportedModuleError, GaintuneError) and issubclass(MergeError, GaintuneError)
