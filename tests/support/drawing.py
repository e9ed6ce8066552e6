"""Figures that are put together but not rendered, where a test is about something else."""

import contextlib
from collections.abc import Iterator
from unittest import mock

from matplotlib.figure import Figure


@contextlib.contextmanager
def unrendered() -> Iterator[None]:
    """Save an empty picture in a figure's place: rendering is more than half of a smoke recipe's time."""

    def save(figure, buffer, **options):
        buffer.write(b'<svg width="1pt" height="1pt"></svg>')

    with mock.patch.object(Figure, "savefig", save):
        yield
