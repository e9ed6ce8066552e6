"""A random Llama of a few thousand weights with its own small tokenizer, as a user's model folder."""

from collections.abc import Sequence
from pathlib import Path

import torch
from gguf import GGMLQuantizationType, GGUFWriter, TokenType, quantize
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 300
GGUF_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def byte_tokenizer(special: Sequence[str], post_processor=None, **names: str) -> PreTrainedTokenizerFast:
    """Make a tokenizer with special tokens and one token a byte; `names` says which special token is what."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({token: number for number, token in enumerate([*special, *letters])}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    if post_processor is not None:
        made.post_processor = post_processor
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer(["<end>"], eos_token="<end>", bos_token="<end>")


def config(**changes) -> LlamaConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"vocab_size": VOCABULARY, "num_key_value_heads": 2, "max_position_embeddings": 128}
    return LlamaConfig(**{**sizes, "bos_token_id": 0, "eos_token_id": 0, **changes})


@torch.no_grad()
def sharpen(model):
    """Make a model as peaked as a trained one, so that a small change of a weight shows in its output."""
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.mul_(6)
    return model


def model(seed: int = 0, **changes) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return sharpen(LlamaForCausalLM(config(**changes)))


def folder(path: Path, seed: int = 0, dtype: torch.dtype = torch.bfloat16, **changes) -> Path:
    """Write a tiny model with its tokenizer; its values are bf16's, whatever dtype they are written in."""
    model(seed, **changes).to(torch.bfloat16).to(dtype).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def blocks(count: int = 4, length: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 257, (count, length), generator=torch.Generator().manual_seed(seed))


def gguf(path: Path, kind: GGMLQuantizationType = GGMLQuantizationType.Q8_0, **adds: bool) -> LlamaForCausalLM:
    """Write a tiny model as llama.cpp does, and return the model whose weights were written, before quantization.

    `adds` is what the file says of the tokens around every text: `bos` and `eos`.
    """
    tiny = model(hidden_size=64, intermediate_size=64, num_attention_heads=2, num_key_value_heads=2)
    writer = GGUFWriter(str(path), "llama")
    sizes = {"context_length": 128, "embedding_length": 64, "feed_forward_length": 64, "vocab_size": VOCABULARY}
    counts = {"block_count": 2, "head_count": 2, "head_count_kv": 2, "bos_token_id": 0, "eos_token_id": 0}
    for name, value in {**sizes, **counts, "layer_norm_rms_eps": 1e-6, "rope_freq_base": 10000.0}.items():
        getattr(writer, f"add_{name}")(value)
    known = sorted(tokenizer().get_vocab().items(), key=lambda entry: entry[1])
    tokens = [*(token for token, _ in known), "th", *(f"<unused{i}>" for i in range(VOCABULARY - 258))]
    special = [token.startswith("<") and len(token) > 1 for token in tokens]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL if odd else TokenType.NORMAL for odd in special])
    writer.add_token_merges(["t h"])
    for token, added in adds.items():
        writer.add_bool(f"tokenizer.ggml.add_{token}_token", added)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    for name, tensor in tiny.state_dict().items():
        values, name = tensor.numpy(), name.removesuffix(".weight").removeprefix("model.")
        if name.startswith("layers."):
            _, number, module = name.split(".", 2)
            name = f"blk.{number}.{GGUF_NAMES[module]}"
            if "q_proj" in module or "k_proj" in module:  # llama.cpp pairs rotary dimensions next to each other
                values = values.reshape(2, 2, 16, 64).swapaxes(1, 2).reshape(64, 64)
        name = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}.get(name, name)
        kept = GGMLQuantizationType.F32 if values.ndim == 1 else kind
        writer.add_tensor(f"{name}.weight", quantize(values, kept), raw_dtype=kept)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tiny
