"""Tiny random transformers, and adapters of GAIN and DISeL far enough from their start to see an effect."""

import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, OPTConfig, PreTrainedConfig

VOCABULARY = 97
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def llama(**changes):
    return causal_lm(LlamaConfig(**{**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, **changes}))


def gpt2():
    return causal_lm(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64))


def opt():
    return causal_lm(OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64))


def causal_lm(config: PreTrainedConfig):
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(config).eval()


def tokens(rows: int = 3, length: int = 8) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(2))


IDS = tokens()


@torch.no_grad()
def logits(model, ids: torch.Tensor = IDS, **kwargs) -> torch.Tensor:
    return model(input_ids=ids, **kwargs).logits


def trainable(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def adapter_tensors(model, adapter: str = "default") -> dict[str, torch.nn.Parameter]:
    """The parameters of one GAIN, LoRA or DISeL adapter by name, sorted."""
    parts = ((name, p, f"{name}.") for name, p in sorted(model.named_parameters()))
    return {name: p for name, p, path in parts if (".gain_v." in path or ".lora_" in path) and f".{adapter}." in path}


def copies(model, adapter: str = "default") -> dict[str, torch.Tensor]:
    """The same values, as they are now."""
    return {name: parameter.detach().clone() for name, parameter in adapter_tensors(model, adapter).items()}


def gradients(model, loss=None) -> dict[str, torch.Tensor]:
    """The gradients of an adapter, of the language model's loss on a few tokens or of what `loss` computes."""
    model.zero_grad()
    (model(input_ids=IDS, labels=IDS).loss if loss is None else loss()).backward()
    return {name: parameter.grad.clone() for name, parameter in adapter_tensors(model).items()}


def randomise(model, adapter: str = "default", seed: int = 3, scale: float = 0.5):
    """Give the adapter an effect: gains on both sides of 0, and gates anywhere between shut and open.

    Every vector of gains (stored as the gain minus 1) has one gain that is exactly 0 and one that is -1.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapter_tensors(model, adapter).items():
            spread = 1.0 if ".lora_G." in name else scale
            parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))
            if ".gain_v." in name:
                parameter[:2] = torch.tensor([-1.0, -2.0])
    return model
