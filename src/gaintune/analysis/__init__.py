"""Analyses: what can be learned from adapters and their models beyond one loss a domain.

Every analysis is a folder: `__init__.py` describes it, `survey.py` measures and computes, `report.py` makes tables and
figures. To add one: a folder, and its class in `catalogue.py`; see `base.py`. What they share is in `drawing.py`,
`positions.py` and `provenance.py`. The recipes and the command line may import this package.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
