"""GAIN: one learned factor per input feature of the attention output (and down) projections of a frozen model."""

import peft  # noqa: F401  (first: a hook on this import may register the method, which imports the modules below)

from gaintune.tuners.gain.config import GainConfig
from gaintune.tuners.gain.layer import GainLayer, GainLinear
from gaintune.tuners.gain.mapping import default_projections
from gaintune.tuners.gain.model import GainModel

__all__ = ["GainConfig", "GainLayer", "GainLinear", "GainModel", "default_projections"]
