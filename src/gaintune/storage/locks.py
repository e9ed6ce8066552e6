"""Waiting for another process that works on the same file, and saying so where it takes long."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

logger = logging.getLogger(__name__)

PATIENCE = 5.0
"""Seconds of waiting in silence."""


@contextlib.contextmanager
def locked(path: Path, doing: str, *, patience: float = PATIENCE) -> Iterator[None]:
    """Hold a lock file, after whoever holds it; `doing` says what that is, such as 'measuring law'."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=patience)
    except Timeout:
        logger.warning("waiting: another process is %s, and what it finds is used here (it holds %s)", doing, path)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
