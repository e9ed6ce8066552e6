"""The base model: loading, fingerprint, checkpoints, GGUF conversion, heads, devices, and the loss in chunks.

May import `config`, `tuners`, `storage` and what lies below. A new source of bases is one branch in `checkpoints.py`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
