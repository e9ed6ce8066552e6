"""What a user starts: adapt, classify, run a sequence, merge; `sweep` runs many sequences.

May import everything but `recipes` and `cli`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
