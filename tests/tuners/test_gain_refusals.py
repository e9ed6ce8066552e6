"""What cannot be adapted correctly is refused, with a reason, before the model is touched."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, MambaConfig, MixtralConfig, Qwen2MoeConfig

from gaintune.errors import UnsupportedModuleError
from gaintune.tuners.gain import GainConfig, GainLayer
from support import tiny_models


def refuse(model, config, match, error=UnsupportedModuleError):
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(error, match=match):
        get_peft_model(model, config)
    assert {name: type(module) for name, module in model.named_modules()} == before


def mixtral():
    return AutoModelForCausalLM.from_config(
        MixtralConfig(
            vocab_size=61,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
        )
    )


def qwen2_moe():
    return AutoModelForCausalLM.from_config(
        Qwen2MoeConfig(
            vocab_size=61,
            hidden_size=32,
            intermediate_size=48,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_experts=4,
        )
    )


@pytest.mark.parametrize("ffn", [False, True])
@pytest.mark.parametrize("build", [mixtral, qwen2_moe])
def test_a_mixture_of_experts_has_no_default(build, ffn):
    refuse(build(), GainConfig(ffn=ffn), r"mixture of experts.*target_modules=\['o_proj'\]")


@pytest.mark.filterwarnings("ignore:target_modules names down_proj, which no module")
@pytest.mark.parametrize("build", [mixtral, qwen2_moe])
def test_fused_experts_are_refused_rather_than_left_out(build):
    # qwen2_moe's shared expert is a linear layer called down_proj, too: half of what was asked for
    refuse(build(), GainConfig(target_modules=["o_proj", "down_proj"]), r"experts\.down_proj is one parameter")
    refuse(build(), GainConfig(target_modules=["o_proj"], ffn=True), r"fused experts")


@pytest.mark.parametrize("build", [mixtral, qwen2_moe])
def test_the_attention_of_a_mixture_of_experts_can_be_adapted(build):
    model = get_peft_model(build(), GainConfig(target_modules=["o_proj"]))
    assert list(tiny_models.gains(model)) == ["base_model.model.model.layers.0.self_attn.o_proj.gain_v.default"]


@pytest.mark.parametrize("target", [["out_proj"], "all-linear", r".*out_proj"])
def test_multihead_attention_is_refused(target):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(8, 8)
            self.attention = nn.MultiheadAttention(8, 2)

        def forward(self, x):
            return self.attention(self.first(x), x, x)[0]

    refuse(Block(), GainConfig(target_modules=target), "out_proj.*never calls the module")


def test_torchs_transformer_layer_is_refused():
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16))
    refuse(model, GainConfig(target_modules=["linear2"]), "fast path")


def test_mambas_output_projection_is_refused():
    model = AutoModelForCausalLM.from_config(MambaConfig(vocab_size=61, hidden_size=16, num_hidden_layers=1))
    refuse(model, GainConfig(target_modules=["out_proj"]), "Mamba")


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (nn.Embedding(4, 8), "Embedding"),
        (nn.Conv1d(8, 8, 1), "Conv1d"),
        (nn.LayerNorm(8), "LayerNorm"),
        (nn.Sequential(nn.Linear(8, 8)), "Sequential"),
        (nn.Bilinear(8, 8, 8), "Bilinear"),
    ],
)
def test_modules_that_are_not_linear_are_refused(module, kind):
    model = nn.ModuleDict({"first": nn.Linear(8, 8), "target": module})
    refuse(model, GainConfig(target_modules=["first", "target"]), f"target is a {kind}, not a linear layer")


def test_no_module_matched():
    with pytest.warns(UserWarning, match="absent, which no module"):
        refuse(tiny_models.llama(), GainConfig(target_modules=["absent"]), "absent", error=ValueError)


def test_an_excluded_default_group_is_refused():
    config = GainConfig(ffn=True, exclude_modules=["down_proj"])
    refuse(tiny_models.llama(), config, "No feed-forward down-projections found")


def test_a_name_that_matches_nothing_beside_one_that_does_is_said():
    with pytest.warns(UserWarning, match="down_porj, which no module"):
        get_peft_model(tiny_models.llama(), GainConfig(target_modules=["o_proj", "down_porj"]))


def test_a_module_used_in_two_places_is_refused():
    model = tiny_models.llama()
    model.model.layers[1].self_attn.o_proj = model.model.layers[0].self_attn.o_proj
    refuse(model, GainConfig(), "used in 2 places")


def test_a_module_inside_another_target_is_refused():
    class Outer(nn.Linear):
        def __init__(self):
            super().__init__(8, 8)
            self.inner = nn.Linear(8, 8)

    model = nn.ModuleDict({"outer": Outer()})
    refuse(model, GainConfig(target_modules=["outer", "inner"]), "outer.inner lies inside outer")


@pytest.mark.filterwarnings("ignore:You are trying to modify a model", "ignore:Already found a `peft_config`")
def test_a_layer_of_another_method_is_refused():
    base = tiny_models.llama()
    get_peft_model(base, LoraConfig(target_modules=["o_proj"]))
    refuse(base, GainConfig(), r"already carries an adapter of another method \(peft\.tuners\.lora")


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_wrapping_twice_does_not_overwrite_the_first_adapter():
    base = tiny_models.llama()
    model = tiny_models.randomise(get_peft_model(base, GainConfig()))
    before = [v.detach().clone() for v in tiny_models.gains(model).values()]
    with (
        pytest.warns(UserWarning, match="second time"),
        pytest.raises(UnsupportedModuleError, match="already has gains of an adapter called 'default'"),
    ):
        get_peft_model(base, GainConfig())
    assert all(torch.equal(a, b) for a, b in zip(before, tiny_models.gains(model).values(), strict=True))


def test_a_tensor_parallel_layer_is_refused():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    model = nn.ModuleDict({"proj": nn.Linear(8, 8)})
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("tp",))
        model["proj"].weight = nn.Parameter(distribute_tensor(model["proj"].weight.detach(), mesh, [Shard(1)]))
        refuse(model, GainConfig(target_modules=["proj"]), "tensor parallelism")
    finally:
        torch.distributed.destroy_process_group()


def test_linear_layers_in_a_list_of_experts_are_supported():
    model = nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(8, 8) for _ in range(3))})
    get_peft_model(model, GainConfig(target_modules=r"experts\.\d"))
    assert sum(isinstance(module, GainLayer) for module in model.modules()) == 3
