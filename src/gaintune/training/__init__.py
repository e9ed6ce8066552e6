"""One adaptation on `transformers.Trainer`: its loop, its checkpoints and the snapshots kept during training.

May import `methods`, `adapters`, `data`, `models` and what lies below; `workflows`, `analysis` and the packages above
may import it. A method or penalty acts on updates through a `TrainingRule` of `methods`, not through code here.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
