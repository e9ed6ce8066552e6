"""Progress of long work: a title, how far it is, and the figures of the moment."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Protocol

Advance = Callable[..., None]
"""`advance(amount, **figures)`: `amount` more units are done; figures such as `loss=2.31` are shown beside the bar."""


def plural(count: int, word: str) -> str:
    """Write a count with its noun."""
    return f"{count:,} {word}" if count == 1 else f"{count:,} {word}s"


class Progress(Protocol):
    """Display of tasks, one after another; the command line draws bars, a library call shows nothing."""

    def task(self, title: str, total: int, unit: str) -> contextlib.AbstractContextManager[Advance]:
        """Open a task of `total` units; entering it gives the function to call as work is done."""
        ...

    def note(self, text: str) -> None:
        """Report one event, such as a stage found finished on disk."""
        ...


class Silent:
    """Display that shows nothing."""

    @contextlib.contextmanager
    def task(self, title: str, total: int, unit: str) -> Iterator[Advance]:
        """Open a task that nobody watches."""
        yield lambda amount, **figures: None

    def note(self, text: str) -> None:
        """Report nothing."""
