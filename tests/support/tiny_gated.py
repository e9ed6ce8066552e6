"""Tiny random transformers with DISeL adapters whose gates are anywhere between shut and open."""

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from gaintune.tuners.disel import DiselConfig
from support.tiny_models import SIZES, VOCABULARY

RANK = 3


def llama(layers: int = 3):
    return LlamaConfig(**{**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "num_hidden_layers": layers})


def gpt2():
    return GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=64)


def model(config=None, **options):
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_config(config or llama())
    settings = {"r": RANK, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    return randomise(get_peft_model(base, DiselConfig(**settings))).eval()


@torch.no_grad()
def randomise(gated, adapter: str = "default", seed: int = 3):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(gated.named_parameters()):
        if f".{adapter}" in name and ("lora_G" in name or "lora_B" in name):
            scale = 3 if "lora_G" in name else 0.1
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return gated


def tokens(rows: int = 4, length: int = 8, seed: int = 2) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
