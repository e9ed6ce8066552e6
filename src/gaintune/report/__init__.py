"""Tables, figures and the page of a run: one canvas, one palette, one way to write an interval.

May import `results` and what lies below; knows nothing of models.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
