"""Pure numbers, no model: losses, the matrix, bootstrap, intervals, changes, curves and verdicts.

May import `config`, `storage` and what lies below; imported by everything that measures, compares or reports.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
