"""Analyses: what can be learned from adapters and their models beyond one loss a domain.

A folder each, all alike: `__init__.py` says what the analysis is, `survey.py` measures, `statistics.py` computes from
plain arrays, `report.py` makes tables and figures. To add one: a folder and a line in `catalogue.py`; see `base.py`.
The recipes and the command line may import this package.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
