"""One adaptation on `transformers.Trainer`: its loop, its checkpoints and the snapshots kept on the way.

May import `methods`, `adapters`, `data`, `models` and what lies below.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
