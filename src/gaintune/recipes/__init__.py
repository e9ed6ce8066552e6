"""The papers' experiments: what a recipe is, how its steps run, and the verdict on every claim.

May import everything but `cli`. A new experiment is one YAML file in `experiments/`, a new kind of step one function
that `steps/__init__.py` lists.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
