"""Adapt language models to domain after domain without making them forget, and measure what was kept.

Importing this package registers GAIN, DISeL, SVFT and GainLoRA with PEFT: at once if PEFT is already imported, else as
soon as it is. The public names stand in `__init__.pyi` and load at first use, so that importing gaintune costs next to
nothing.
"""

from __future__ import annotations

from typing import Any

import lazy_loader
import wrapt

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


@wrapt.when_imported("peft")
def _register(peft: Any) -> None:
    from gaintune.tuners import register

    register()
