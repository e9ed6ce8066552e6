"""GainLoRA: a low-rank branch for every domain, each behind a gate that stays shut on the inputs of earlier domains."""

import peft  # noqa: F401  (first: a hook on this import may register the method, which imports the modules below)

from gaintune.tuners.gainlora.config import GainloraConfig
from gaintune.tuners.gainlora.layer import (
    GainloraLinear,
    add_branch,
    gainlora_layers,
    normalized,
    outside,
    widened_basis,
)
from gaintune.tuners.gainlora.model import GainloraModel

__all__ = [
    "GainloraConfig",
    "GainloraLinear",
    "GainloraModel",
    "add_branch",
    "gainlora_layers",
    "normalized",
    "outside",
    "widened_basis",
]
