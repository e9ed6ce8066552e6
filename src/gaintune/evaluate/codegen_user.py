"""Who runs a generated program: the caller, or in the place of root a user without rights."""

from __future__ import annotations

import functools
import logging
import os
import stat
import sys
import sysconfig
from pathlib import Path

logger = logging.getLogger(__name__)

NOBODY = "nobody"


@functools.cache
def nobody() -> tuple[int, int] | None:
    """Numbers of the user and group that a program of root's is run as; None for the caller's own.

    No limit on the number of processes holds for root. Where the interpreter lies in a folder that only root may read,
    a user without rights could import nothing, so the program stays root's, which is said once.
    """
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return None
    import pwd

    places = [sys.executable, sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")]
    closed = [
        f"only root may read {place}" for place in places if Path(place).exists() and not open_to_all(Path(place))
    ]
    try:
        found = pwd.getpwnam(NOBODY)
    except KeyError:
        closed = [f"/etc/passwd has no user {NOBODY}"]
    else:
        if not closed:
            return found.pw_uid, found.pw_gid
    logger.warning("generated programs run as root, and may start processes of their own (%s)", closed[0])
    return None


def open_to_all(path: Path) -> bool:
    """Whether everybody may read a file or folder, and enter all folders above it."""
    real = path.resolve()
    entered = [*real.parents, *([real] if real.is_dir() else [])]
    return bool(real.stat().st_mode & stat.S_IROTH) and all(each.stat().st_mode & stat.S_IXOTH for each in entered)
