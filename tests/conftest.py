"""What all tests share."""

import gc


def pytest_collection_finish() -> None:
    """Leave what was imported out of later garbage collections: adapters are let go with one, a hundred times a run."""
    gc.collect()
    gc.freeze()
