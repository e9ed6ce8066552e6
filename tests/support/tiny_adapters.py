"""Adapters whose parameters were moved at random, saved as training saves them."""

from pathlib import Path

import torch

from gaintune.adapters import AdapterRecord, save_adapter
from gaintune.config import MethodConfig
from gaintune.methods import attach
from gaintune.models import load_base


def save(base: Path, folder: Path, method: str | MethodConfig, seed=4, *, scale=0.1, domain="prose") -> Path:
    """Save an adapter of a method on a base in fp32, and return its folder."""
    loaded = load_base(str(base), dtype=torch.float32)
    method = MethodConfig(name=method, label=method) if isinstance(method, str) else method
    model, generator = attach(loaded.model, method, seed=0), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    save_adapter(model, folder, AdapterRecord(str(base), loaded.fingerprint, method.name, method.name, (domain,)))
    return folder
