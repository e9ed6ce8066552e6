"""GAIN, DISeL, SVFT and GainLoRA as PEFT tuners, and how they register.

Imports nothing of ours but `errors`, so that it could be lifted into PEFT as it stands.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
