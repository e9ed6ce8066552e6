"""What all tests share."""

import gc
import os

import pytest

os.environ.pop("COLUMNS", None)  # a parallel run gives its workers one, and consoles made with it would keep it


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files, so that no worker of a parallel run is left alone with one of them at the end."""
    items.sort(key=lambda item: item.get_closest_marker("cluster") is None)


def pytest_collection_finish() -> None:
    """Leave what was imported out of later garbage collections: adapters are let go with one, a hundred times a run."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The folder of a tiny Llama in bf16 with its tokenizer, which all tests share: read it, do not change it."""
    from support import tiny_base

    return tiny_base.folder(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def demo():
    """The embedded model in fp32; a test that wants it is skipped where it cannot be had."""
    from gaintune.config import ModelConfig
    from gaintune.errors import AssetError
    from gaintune.models import load_base

    try:
        return load_base(ModelConfig(device="cpu", dtype="fp32"))
    except AssetError as error:
        pytest.skip(f"the embedded model cannot be had here: {error}")
