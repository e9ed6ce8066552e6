"""DISeL: LoRA whose rank-one parts are switched on token by token, by gates that read the layer's input."""

import peft  # noqa: F401  (first: a hook on this import may register the method, which imports the modules below)

from gaintune.tuners.disel.config import DiselConfig
from gaintune.tuners.disel.layer import disel_layers
from gaintune.tuners.disel.model import DiselModel

__all__ = ["DiselConfig", "DiselModel", "disel_layers"]
