"""Adapters on disk and on a base: their record, saving and loading, lending for a while, absorbing into weights.

May import `models`, `results`, `data` and what lies below.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
