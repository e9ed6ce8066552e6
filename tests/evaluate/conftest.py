"""What the files on benchmarks share: a tiny base, and rows of two benchmarks, once a file."""

import pytest


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    from support.benchmark_world import write_base

    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    from support.benchmark_world import write_rows

    return write_rows(tmp_path_factory.mktemp("data"))
