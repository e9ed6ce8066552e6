"""A grid of sequences on one machine or a cluster, its table, and methods compared at equal adaptation.

Engines are joblib's: processes here, Ray and Dask by name.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
