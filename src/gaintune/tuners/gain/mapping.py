"""Which modules GAIN, GAIN-FFN and gains on outputs adapt by default, per transformers `model_type`."""

from __future__ import annotations

from typing import Any, NamedTuple

from gaintune.errors import UnsupportedModuleError


class Projections(NamedTuple):
    """Name endings of the attention output projections, the feed-forward down-projections, and the keys and values.

    Endings of cross-attention are listed with the others and may match nothing; each of the groups must match.
    `keys_values` is empty where one module computes queries too and mixes them with the others.
    """

    attention: tuple[str, ...]
    ffn: tuple[str, ...]
    keys_values: tuple[str, ...] = ()


_KEYS_VALUES = ("k_proj", "v_proj")
_LLAMA = Projections(("o_proj",), ("down_proj",), _KEYS_VALUES)
_NEOX = Projections(("attention.dense",), ("dense_4h_to_h",))
_FALCON = Projections(("self_attention.dense",), ("dense_4h_to_h",))
_GPT2 = Projections(("attn.c_proj", "crossattention.c_proj"), ("mlp.c_proj",), ("c_attn",))
_GPTJ = Projections(("attn.out_proj",), ("mlp.fc_out",), _KEYS_VALUES)
_OPT = Projections(("self_attn.out_proj",), ("fc2",), _KEYS_VALUES)
_BART = Projections(("self_attn.out_proj", "encoder_attn.out_proj"), ("fc2",), _KEYS_VALUES)
# "output.dense" also ends "attention.output.dense": GAIN alone needs the longer name, and adding the shorter one for
# GAIN-FFN reaches the second dense layer without touching "intermediate.dense" or the pooler.
_BERT = Projections(("attention.output.dense", "crossattention.output.dense"), ("output.dense",), ("key", "value"))
_T5 = Projections(
    ("SelfAttention.o", "EncDecAttention.o"),
    ("DenseReluDense.wo",),
    ("SelfAttention.k", "SelfAttention.v", "EncDecAttention.k", "EncDecAttention.v"),
)

_LIKE_LLAMA = """
    llama mistral ministral ministral3 qwen2 qwen3 gemma gemma2 gemma3 gemma3_text olmo olmo2 olmo3 stablelm
    cohere cohere2 granite smollm3 helium glm glm4 nemotron exaone4 seed_oss ernie4_5 arcee apertus
"""

DEFAULTS: dict[str, Projections] = {
    **dict.fromkeys(_LIKE_LLAMA.split(), _LLAMA),
    "phi3": _LLAMA._replace(keys_values=("qkv_proj",)),
    "starcoder2": Projections(("o_proj",), ("mlp.c_proj",), _KEYS_VALUES),
    "phi": Projections(("self_attn.dense",), ("mlp.fc2",), _KEYS_VALUES),
    "persimmon": Projections(("self_attn.dense",), ("mlp.dense_4h_to_h",)),
    "gpt2": _GPT2,
    "gpt_bigcode": _GPT2,
    "gpt_neo": Projections(("attn.attention.out_proj",), ("mlp.c_proj",), _KEYS_VALUES),
    "gpt_neox": _NEOX,
    "gptj": _GPTJ,
    "codegen": _GPTJ._replace(keys_values=()),
    "opt": _OPT,
    "falcon": _FALCON,
    "bloom": _FALCON,
    "mpt": Projections(("attn.out_proj",), ("ffn.down_proj",), ("Wqkv",)),
    **dict.fromkeys(["bart", "mbart", "marian", "pegasus", "blenderbot"], _BART),
    **dict.fromkeys(["bert", "roberta", "xlm-roberta", "camembert", "electra"], _BERT),
    "deberta": _BERT._replace(keys_values=()),
    "deberta-v2": _BERT._replace(keys_values=("key_proj", "value_proj")),
    "distilbert": Projections(("attention.out_lin",), ("ffn.lin2",), ("k_lin", "v_lin")),
    "albert": Projections(("attention.dense",), ("ffn_output",), ("key", "value")),
    "modernbert": Projections(("attn.Wo",), ("mlp.Wo",), ("Wqkv",)),
    **dict.fromkeys(["t5", "mt5", "umt5"], _T5),
}

_MIXED = """
    mixtral qwen2_moe qwen3_moe qwen3_next deepseek_v2 deepseek_v3 gpt_oss olmoe phimoe minimax granitemoe dbrx jamba
    llama4 llama4_text glm4_moe dots1 ernie4_5_moe hunyuan_v1_moe flex_olmo
"""

MIXTURES_OF_EXPERTS = frozenset(_MIXED.split())

# Modules that compute queries, keys and values in one product, in some model types.
FUSED_QUERIES = frozenset({"c_attn", "qkv_proj", "Wqkv", "query_key_value", "in_proj"})

# The down-projection of these sees (batch * tokens, d_ff): a row of the batch is a run of rows there.
FLATTENED_TOKENS = frozenset({"opt"})


def default_projections(model_config: dict[str, Any]) -> Projections:
    """Return the modules of a model type, or raise `UnsupportedModuleError` saying what to give instead."""
    model_type = model_config.get("model_type")
    if model_type in MIXTURES_OF_EXPERTS:
        raise UnsupportedModuleError(
            f"GAIN has no default for {model_type!r}: the experts of a mixture of experts are fused into single "
            "parameters, whose inputs cannot be scaled, so GAIN-FFN would reach the feed-forward blocks in part. "
            "Please specify `target_modules` in `peft_config`: target_modules=['o_proj'] adapts the attention alone."
        )
    if model_type not in DEFAULTS:
        raise UnsupportedModuleError(
            f"GAIN has no default for the model type {model_type!r}. Please specify `target_modules` in `peft_config`: "
            "the attention output projections for GAIN, and the feed-forward down-projections for GAIN-FFN as well. "
            f"Known types: {', '.join(sorted(DEFAULTS))}."
        )
    return DEFAULTS[model_type]


def fused_keys_values(model_config: dict[str, Any]) -> int | None:
    """Count the keys and values at the end of what a fused module computes; None where they are not all at its end."""
    value = model_config.get
    match value("model_type"):
        case "gpt2":
            return 2 * value("n_embd", 0)
        case "gpt_bigcode" if value("multi_query"):
            return 2 * value("n_embd", 0) // value("n_head", 1)
        case "phi3":
            head = value("head_dim") or value("hidden_size", 0) // value("num_attention_heads", 1)
            return 2 * head * value("num_key_value_heads", 0)
        case "mpt":
            return 2 * value("d_model", 0)
        case "modernbert":
            return 2 * value("hidden_size", 0)
    return None
