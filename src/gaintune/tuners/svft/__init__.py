"""SVFT: one trained number per singular direction of a frozen weight, added to its singular value."""

import peft  # noqa: F401  (first: a hook on this import may register the method, which imports the modules below)

from gaintune.tuners.svft.config import SvftConfig
from gaintune.tuners.svft.layer import SvftLinear
from gaintune.tuners.svft.model import SvftModel

__all__ = ["SvftConfig", "SvftLinear", "SvftModel"]
