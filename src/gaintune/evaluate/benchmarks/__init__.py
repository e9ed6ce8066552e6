"""lm-eval's benchmarks over a base and adapters on it: tasks, rows without the hub, stored scores, paired changes.

A new benchmark that runs without the hub is an entry of `TASKS` in `rows.py`; any other task of lm-eval needs none.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
