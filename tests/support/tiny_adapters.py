"""Adapters of the tiny base: made, moved as training would, saved with a record, and measured."""

from pathlib import Path

import torch
from peft import IA3Config, LoraConfig, get_peft_model

from gaintune.adapters import AdapterRecord, save_adapter
from gaintune.config import MethodConfig, ModelConfig
from gaintune.methods import attach
from gaintune.models import Base, load_base
from gaintune.tuners.gain import GainConfig
from support import tiny_base

TARGETS = ["o_proj", "down_proj"]
CONFIGS = {
    "gain-ffn": lambda: GainConfig(ffn=True, task_type="CAUSAL_LM"),
    "ia3": lambda: IA3Config(target_modules=TARGETS, feedforward_modules=TARGETS, task_type="CAUSAL_LM"),
    "lora": lambda: LoraConfig(r=2, target_modules=TARGETS, task_type="CAUSAL_LM"),
}


def config_of(folder: Path, dtype: str = "bf16") -> ModelConfig:
    return ModelConfig(name=str(folder), device="cpu", dtype=dtype)


def base_of(folder: Path, dtype: str = "bf16") -> Base:
    return load_base(config_of(folder, dtype))


def record_of(base: Base, method: str, **changes) -> AdapterRecord:
    values = {"base_name": base.name, "base_fingerprint": base.fingerprint, "method": method, "label": method}
    return AdapterRecord(**{**values, "domains": ("medical", "law"), **changes})


def adapted(base: Base, method: str, scale: float = 0.05):
    """The base with an adapter of one method, or its own weights, moved as training would."""
    torch.manual_seed(0)
    return moved(base.model if method == "full" else get_peft_model(base.model, CONFIGS[method]()), scale)


def moved(model, scale: float = 0.05, seed: int = 1):
    """Move every trainable weight, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype), alpha=scale)
    return model.eval()


def saved(tiny: Path, folder: Path, method: str = "lora", scale: float = 0.05, **changes) -> torch.Tensor:
    """Save an adapter of the tiny base, and return what the adapted model computes."""
    base = base_of(tiny)
    model = adapted(base, method, scale)
    save_adapter(model, folder, record_of(base, method, **changes))
    return logits(model)


def save(tiny: Path, folder: Path, method: str | MethodConfig, seed: int = 4, scale=0.1, domain="prose") -> Path:
    """Save an adapter of any method of the catalogue on the base in fp32, and return its folder."""
    base, config = base_of(tiny, "fp32"), MethodConfig(name=method) if isinstance(method, str) else method
    model = moved(attach(base.model, config, seed=0), scale, seed)
    save_adapter(model, folder, record_of(base, config.name, domains=(domain,)))
    return folder


@torch.inference_mode()
def logits(model) -> torch.Tensor:
    return model.eval()(tiny_base.blocks()).logits
