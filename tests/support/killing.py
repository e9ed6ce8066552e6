"""Work that is killed in the middle, as the kernel would: SIGKILL, at a chosen sign of progress."""

import contextlib
import multiprocessing
import os
import signal

import pytest

from gaintune.progress import Silent


class Stopped(BaseException):
    """What `StopAt` raises; nothing in the product catches it."""


class StopAt(Silent):
    """Raises at the n-th sign of progress of one task: a stop within the process, many times cheaper than a kill."""

    def end(self) -> None:
        raise Stopped

    def __init__(self, title: str, count: int) -> None:
        self._title = title
        self._left = count

    def task(self, title, total, unit):
        def advance(amount, **figures):
            if title == self._title:
                self._left -= 1
                if self._left == 0:
                    self.end()

        return contextlib.nullcontext(advance)


class KillAt(StopAt):
    """Kills its own process there."""

    def end(self) -> None:
        die()


def stopped(work, arguments, title, count):
    """Run `work(*arguments, progress=...)` in this process until it is stopped there."""
    with pytest.raises(Stopped):
        work(*arguments, progress=StopAt(title, count))


class Nothing(Silent):
    """Fails where anything is trained or measured at all."""

    def task(self, title, total, unit):
        raise AssertionError(f"{title}: nothing should have begun")


_PROCESSES = multiprocessing.get_context("forkserver")  # processes that have imported what takes seconds, once for all
_PROCESSES.set_forkserver_preload(["transformers.modeling_utils", "peft", "gaintune.training.loop"])


def killed(work, arguments, title, count):
    """Run `work(*arguments, progress=...)` in a process of its own until it is killed there."""
    process = _PROCESSES.Process(target=_until, args=(work, arguments, title, count))
    process.start()
    process.join(timeout=120)
    assert process.exitcode == -signal.SIGKILL


def _until(work, arguments, title, count):
    work(*arguments, progress=KillAt(title, count))


def die() -> None:
    """What no worker survives."""
    os.kill(os.getpid(), signal.SIGKILL)
