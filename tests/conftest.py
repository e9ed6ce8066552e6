"""What all tests share."""

import gc
import os

import pytest

os.environ.pop("COLUMNS", None)  # a parallel run gives its workers one, and consoles made with it would keep it


def pytest_collection_finish() -> None:
    """Leave what was imported out of later garbage collections: adapters are let go with one, a hundred times a run."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The folder of a tiny Llama in bf16 with its tokenizer, which all tests share: read it, do not change it."""
    from support import tiny_base

    return tiny_base.folder(tmp_path_factory.mktemp("base") / "tiny")
