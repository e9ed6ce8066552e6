"""One CUDA device for each worker process of a machine, chosen before torch is there to take the first."""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import itertools
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

VISIBLE = "CUDA_VISIBLE_DEVICES"
_held: list[BaseFileLock] = []  # for as long as this process lives


def visible_devices(count: int, environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Name the devices that torch counts in this process as CUDA_VISIBLE_DEVICES does."""
    named = [name.strip() for name in environment.get(VISIBLE, "").split(",") if name.strip()]
    return tuple(named[:count]) if named else tuple(map(str, range(count)))


def take_device(devices: Sequence[str], folder: Path | None = None) -> str | None:
    """Let this process see one of the devices alone: the one that the fewest workers of this machine have.

    A device is taken by a lock file, which goes with the process, so that whoever takes a dead worker's place takes its
    device. A process that has one keeps it, and one in which torch has initialized CUDA keeps what it saw.

    Args:
        devices: as CUDA_VISIBLE_DEVICES names them.
        folder: of the lock files; one that all sweeps of this user on this machine share unless given.

    Returns:
        The device; None where none was taken now.
    """
    torch = sys.modules.get("torch")
    if not devices or _held or (torch is not None and torch.cuda.is_initialized()):
        return None
    place = folder or Path(tempfile.gettempdir()) / f"gaintune-devices-{_user()}"
    place.mkdir(parents=True, exist_ok=True)
    for share in itertools.count():  # with more workers than devices they share, two to each before three to any
        for device in devices:
            lock = FileLock(place / f"{hashlib.sha256(device.encode()).hexdigest()[:16]}-{share}.lock")
            with contextlib.suppress(Timeout):
                lock.acquire(blocking=False)
                _held.append(lock)
                os.environ[VISIBLE] = device
                return device
    raise AssertionError("there is always a further share")


def _user() -> str:
    """Return who shares lock files: those of another user cannot be opened."""
    return str(os.getuid()) if hasattr(os, "getuid") else getpass.getuser()
