"""Tiny random transformers, and gains away from 1 to see an effect."""

import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, OPTConfig, PreTrainedConfig

VOCABULARY = 97


def llama(**kwargs):
    return causal_lm(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            **kwargs,
        )
    )


def gpt2():
    return causal_lm(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64))


def opt():
    return causal_lm(
        OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            word_embed_proj_dim=32,
            max_position_embeddings=64,
        )
    )


def causal_lm(config: PreTrainedConfig):
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(config).eval()


def tokens(rows: int = 3, length: int = 8) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(2))


def gains(model, adapter: str = "default") -> dict[str, torch.nn.Parameter]:
    """The gains of one adapter by name, sorted."""
    ending = f".gain_v.{adapter}"
    return {name: p for name, p in sorted(model.named_parameters()) if name.endswith(ending)}


def randomise(model, adapter: str = "default", seed: int = 3, scale: float = 0.5):
    """Give the adapter gains on both sides of 0, one of them exactly 0 in every layer."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in gains(model, adapter).values():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
            parameter[0] = -1.0
            parameter[1] = -2.0
    return model


def adapter_tensors(model, adapter: str = "default") -> dict[str, torch.nn.Parameter]:
    """LoRA's and DISeL's parameters of one adapter by name, sorted."""
    return {name: p for name, p in sorted(model.named_parameters()) if ".lora_" in name and f".{adapter}." in name}


def randomise_disel(model, adapter: str = "default", seed: int = 3):
    """Give the adapter an effect, and gates that are anywhere between shut and open."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapter_tensors(model, adapter).items():
            spread = 1.0 if ".lora_G." in name else 0.5
            parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))
    return model
