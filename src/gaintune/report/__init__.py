"""Tables, figures and the page of a run: one canvas, one palette, one way to write an interval.

May import `results` and what lies below; knows nothing of models. A figure of the page is a function in `page.py`, its
table one in `tables.py`, its sentences in `words.py`; other packages draw with the names below.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
