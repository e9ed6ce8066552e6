"""Adapters on disk and on a base: record, saving and loading, attaching for a while, merging into weights.

`record` reads an adapter's folder without a model, `disk` loads it onto a base and saves it, `absorption` merges it.
May import `models`, `results`, `data`, `methods` and what lies below; the packages above may import it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
