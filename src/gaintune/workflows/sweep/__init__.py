"""A grid of sequences on one machine or a cluster, its table, and methods compared at equal adaptation.

`grid` plans the runs, `workers` does them, `run` collects their table, `compare` and `report` compare methods. Engines
are joblib's: processes here, Ray and Dask by name; a new engine is a name and a way to connect in `workers`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
