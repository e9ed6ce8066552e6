"""From a domain's name to rows of tokens: where text comes from, how it is split, encoded and packed.

May import `config`, `storage` and what lies below. One more domain is one entry in `domains.py`; a set with labels is
one in `labelled.py`; a set of questions is one in `questions.py`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
