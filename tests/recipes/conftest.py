"""What the tests of recipes share."""

import pytest

from support import drawing


@pytest.fixture
def unrendered():
    with drawing.unrendered():
        yield
