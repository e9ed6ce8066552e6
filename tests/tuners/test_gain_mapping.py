"""Which modules GAIN and GAIN-FFN adapt by default, on a tiny model of every type, and how many parameters that is."""

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from transformers import AutoModel, AutoModelForCausalLM

from gaintune.errors import UnsupportedModuleError
from gaintune.tuners.gain import GainConfig, GainLayer
from gaintune.tuners.gain.mapping import DEFAULTS
from support import refused
from support.tiny_models import adapter_tensors, gpt2, llama, randomise

LLAMA = ("layers.{}.self_attn.o_proj", "layers.{}.mlp.down_proj")
NEOX = ("layers.{}.attention.dense", "layers.{}.mlp.dense_4h_to_h")
BERT = ("encoder.layer.{}.attention.output.dense", "encoder.layer.{}.output.dense")
PLAIN = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
PLAIN |= {"intermediate_size": 48, "num_key_value_heads": 4, "max_position_embeddings": 40}
SMALL = {**PLAIN, "head_dim": 8}
FUSED = ("h.{}.self_attention.dense", "h.{}.mlp.dense_4h_to_h")
OPT = {"ffn_dim": 48, "word_embed_proj_dim": 16}
DISTIL = {"vocab_size": 61, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 40}
GPT = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40, "rotary_dim": 4}
LLAMAS = ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Olmo2", "Phi3", "StableLm"]
# model type -> (class name without "Config", settings, attention modules, feed-forward modules)
MODELS = {
    **{name.lower(): (name, SMALL, *LLAMA) for name in LLAMAS},
    "gemma3_text": ("Gemma3Text", SMALL, *LLAMA),
    "starcoder2": ("Starcoder2", SMALL, "layers.{}.self_attn.o_proj", "layers.{}.mlp.c_proj"),
    "phi": ("Phi", SMALL, "layers.{}.self_attn.dense", "layers.{}.mlp.fc2"),
    "gpt_neox": ("GPTNeoX", SMALL, *NEOX),
    "gpt2": ("GPT2", GPT, "h.{}.attn.c_proj", "h.{}.mlp.c_proj"),
    "gptj": ("GPTJ", GPT, "h.{}.attn.out_proj", "h.{}.mlp.fc_out"),
    "gpt_bigcode": ("GPTBigCode", GPT, "h.{}.attn.c_proj", "h.{}.mlp.c_proj"),
    "opt": ("OPT", {**SMALL, **OPT}, "decoder.layers.{}.self_attn.out_proj", "decoder.layers.{}.fc2"),
    "falcon": ("Falcon", PLAIN, *FUSED),
    "bloom": ("Bloom", {"vocab_size": 61, "hidden_size": 32, "n_layer": 2, "n_head": 4}, *FUSED),
    "bert": ("Bert", SMALL, *BERT),
    "roberta": ("Roberta", SMALL, *BERT),
    "deberta-v2": ("DebertaV2", SMALL, *BERT),
    "distilbert": ("DistilBert", DISTIL, "transformer.layer.{}.attention.out_lin", "transformer.layer.{}.ffn.lin2"),
    "modernbert": ("ModernBert", {**SMALL, "global_attn_every_n_layers": 1}, "layers.{}.attn.Wo", "layers.{}.mlp.Wo"),
}


def config_of(name, settings):
    return getattr(transformers, f"{name}Config")(**settings)


def adapted(model) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, GainLayer)}


@pytest.mark.parametrize("ffn", [False, True])
@pytest.mark.parametrize("model_type", MODELS)
@torch.no_grad()
def test_adapts_exactly_these_modules_and_starts_at_the_base(model_type, ffn):
    name, settings, attention, down = MODELS[model_type]
    config = config_of(name, settings)
    assert config.model_type == model_type
    model = AutoModel.from_config(config).eval()
    ids = torch.randint(1, 61, (2, 9))
    before = model(ids).last_hidden_state
    peft_model = get_peft_model(model, GainConfig(ffn=ffn))
    expected = {attention.format(layer) for layer in range(2)}
    if ffn:
        expected |= {down.format(layer) for layer in range(2)}
    assert adapted(model) == expected and torch.equal(peft_model(ids).last_hidden_state, before)
    randomise(peft_model)
    assert not torch.allclose(peft_model(ids).last_hidden_state, before)


@pytest.mark.parametrize("ffn", [False, True])
@torch.no_grad()
def test_encoder_decoder_covers_cross_attention(ffn):
    settings = {"vocab_size": 61, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_heads": 4, "num_layers": 2}
    model = AutoModel.from_config(config_of("T5", settings)).eval()
    ids = torch.randint(1, 61, (2, 9))
    before = model(input_ids=ids, decoder_input_ids=ids).last_hidden_state
    peft_model = get_peft_model(model, GainConfig(ffn=ffn))
    expected = {f"{side}.block.{i}.layer.0.SelfAttention.o" for side in ("encoder", "decoder") for i in range(2)}
    expected |= {f"decoder.block.{i}.layer.1.EncDecAttention.o" for i in range(2)}
    if ffn:
        expected |= {f"encoder.block.{i}.layer.1.DenseReluDense.wo" for i in range(2)}
        expected |= {f"decoder.block.{i}.layer.2.DenseReluDense.wo" for i in range(2)}
    assert adapted(model) == expected
    assert torch.equal(peft_model(input_ids=ids, decoder_input_ids=ids).last_hidden_state, before)


@pytest.mark.parametrize(("name", "build"), [("attn.c_proj", gpt2), ("o_proj", llama)])
def test_the_saved_names_are_those_that_matched(name, build, tmp_path, recwarn):
    model = get_peft_model(build(), GainConfig())
    assert model.peft_config["default"].target_modules == {name}
    model.save_pretrained(tmp_path)
    recwarn.clear()
    PeftModel.from_pretrained(build(), tmp_path)
    assert not [w for w in recwarn if "target_modules" in str(w.message)]


def test_cross_attention_of_gpt2_is_adapted():
    settings = {key: value for key, value in GPT.items() if key != "rotary_dim"}
    model = AutoModelForCausalLM.from_config(config_of("GPT2", {**settings, "add_cross_attention": True}))
    get_peft_model(model, GainConfig())
    kinds = ("attn", "crossattention")
    assert adapted(model) == {f"transformer.h.{i}.{kind}.c_proj" for i in range(2) for kind in kinds}


def test_a_vision_tower_is_left_alone():
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = Gemma3Config(text_config=SMALL, vision_config={**vision, "image_size": 28, "patch_size": 14})
    with torch.device("meta"):
        model = Gemma3ForConditionalGeneration(config)
    get_peft_model(model, GainConfig(ffn=True))
    assert {name.rsplit("language_model.", 1)[-1] for name in adapted(model)} == {
        pattern.format(layer) for pattern in LLAMA for layer in range(2)
    }


def test_a_classification_head_is_not_an_attention_output():
    model = transformers.AutoModelForSequenceClassification.from_config(config_of("Roberta", SMALL))
    get_peft_model(model, GainConfig(ffn=True, task_type="SEQ_CLS"))
    assert adapted(model) == {f"roberta.{pattern.format(layer)}" for pattern in BERT for layer in range(2)}
    assert model.classifier.modules_to_save["default"].out_proj.weight.requires_grad


def test_layers_can_be_chosen():
    model = llama()
    get_peft_model(model, GainConfig(ffn=True, layers_to_transform=[1]))
    assert adapted(model) == {"model.layers.1.self_attn.o_proj", "model.layers.1.mlp.down_proj"}
    model = gpt2()
    get_peft_model(model, GainConfig(layers_to_transform=0, layers_pattern="h"))
    assert adapted(model) == {"transformer.h.0.attn.c_proj"}
    model = llama()
    get_peft_model(model, GainConfig(ffn=True, exclude_modules=["layers.0.mlp.down_proj"]))
    assert adapted(model) == {*("model." + LLAMA[0].format(i) for i in range(2)), "model.layers.1.mlp.down_proj"}


def test_settings_that_contradict_each_other_are_refused():
    refused(ValueError, "`layers_to_transform`", GainConfig, layers_to_transform=[0], target_modules=".*o_proj")
    refused(ValueError, "`layers_pattern`", GainConfig, layers_pattern="h")


def test_an_unknown_type_names_the_known_ones_with_every_required_one_among_them():
    model = AutoModel.from_config(config_of("Mamba", {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 1}))
    refused(UnsupportedModuleError, r"'mamba'.*target_modules.*llama", get_peft_model, model, GainConfig())
    required = "llama mistral qwen2 qwen3 gemma gemma2 gemma3 gemma3_text phi phi3 gpt2 gpt_neox gptj opt falcon bloom "
    required += "olmo2 bert roberta distilbert deberta-v2 t5"
    assert set(required.split()) <= set(DEFAULTS)


L2_13B = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
L2_70B = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
PAPER = {  # the counts for GAIN and, where the paper has it, for GAIN-FFN
    "GPT-2 large": (transformers.GPT2Config(n_embd=1280, n_layer=36, n_head=20), 46_080, 230_400),
    "Mistral-7B": (transformers.MistralConfig(), 131_072, 589_824),  # its defaults are Mistral-7B's
    "Llama-2-13B": (transformers.LlamaConfig(**L2_13B), 204_800),
    "Llama-2-70B": (transformers.LlamaConfig(**L2_70B, num_key_value_heads=8), 655_360),
}


@pytest.mark.parametrize("name", PAPER)
def test_trainable_parameters_of_the_papers_models(name):
    config, *counts = PAPER[name]
    for ffn, count in enumerate(counts):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        assert get_peft_model(model, GainConfig(ffn=bool(ffn))).get_nb_trainable_parameters()[0] == count


def test_the_gain_is_as_wide_as_the_heads_together_not_as_the_model():
    config = config_of("Qwen3", {**SMALL, "head_dim": 16})  # 4 heads of 16 in a model of 32
    model = get_peft_model(AutoModelForCausalLM.from_config(config), GainConfig())
    assert [v.shape for v in adapter_tensors(model).values()] == [(64,), (64,)]
