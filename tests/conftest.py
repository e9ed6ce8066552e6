"""What all tests share."""

import gc
import os

os.environ.pop("COLUMNS", None)  # a parallel run gives its workers one, and consoles made with it would keep it


def pytest_collection_finish() -> None:
    """Leave what was imported out of later garbage collections: adapters are let go with one, a hundred times a run."""
    gc.collect()
    gc.freeze()
