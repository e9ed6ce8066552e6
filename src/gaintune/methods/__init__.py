"""The catalogue of methods and what they bring: PEFT configurations, rules around updates, penalties.

May import `models`, `data`, `results` and what lies below. A new method is one entry in `catalogue.py`; new mathematics
is a folder in `tuners` beside it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
