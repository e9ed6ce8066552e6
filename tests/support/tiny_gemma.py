"""A random Gemma 3 of a few thousand weights, with a tokenizer that knows a beginning of text and does not add it."""

from pathlib import Path

import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast

from support.tiny_base import byte_tokenizer

SPECIAL = ("<pad>", "<eos>", "<bos>")
BEGIN = SPECIAL.index("<bos>")


def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer(SPECIAL, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>")


def folder(path: Path, seed: int = 0) -> Path:
    """Write the model and its tokenizer."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 64, "max_position_embeddings": 256}
    torch.manual_seed(seed)
    Gemma3ForCausalLM(Gemma3TextConfig(vocab_size=len(SPECIAL) + 256, **sizes)).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path
