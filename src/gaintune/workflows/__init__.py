"""Work that a user starts: adapt to text or labels, run a sequence, merge; `sweep` runs many sequences.

A workflow is one function that takes a plan and a folder; a new one is a module here, a name in `__init__.pyi` and a
command in `cli`. May import everything but `analysis`, `recipes` and `cli`, which may import it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
