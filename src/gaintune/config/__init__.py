"""The plan as data: its sections, how it is read, overridden and written, and how its mistakes are explained.

May import `storage` and `errors`. One more setting is one field of a section in `plan.py`; marked with `Flag`, it is a
command-line option, too.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
