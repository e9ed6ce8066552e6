"""Numbers without a model: losses, the matrix, bootstrap, intervals, changes, curves and verdicts.

May import `config`, `storage` and what lies below; imported by everything that measures, compares or reports.
A new figure of a sequence is a name in `bootstrap.FIGURES`, its formula in `summary_figures`, and a field of `Summary`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
