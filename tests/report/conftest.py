"""What several tests of the report share."""

import pytest

from support.synthetic_run import forgets, keeps, make_matrix


@pytest.fixture(scope="session")
def two_methods():
    return make_matrix(("medical", "law", "code"), {"gain-ffn": keeps, "lora": forgets})
