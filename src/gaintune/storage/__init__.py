"""What is on disk and survives: atomic files, checksums, run directories, locks, cached assets, the environment.

Knows nothing of plans or models; imports only `errors` and `progress`. One more kind of folder is one `Kind` in
`ownership.py`; one more asset is one entry in `assets.py`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
