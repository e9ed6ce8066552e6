"""lm-eval's benchmarks over a base and adapters on it: tasks, rows without the hub, stored scores, paired changes.

A new embedded set of rows is one entry in `rows/catalogue.py`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
