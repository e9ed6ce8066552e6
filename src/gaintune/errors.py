"""The errors that a person sees: what was wrong, where, and what to do next.

Every class also inherits the standard error a library user would expect to catch, and carries the exit
code the command line ends with: 2 for an input to correct, 1 for a run that failed.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping


class GaintuneError(Exception):
    """Base of every error gaintune raises on purpose."""

    exit_code: int = 1


class InputError(GaintuneError, ValueError):
    """A user's input is wrong, and theirs to correct."""

    exit_code = 2


class ConfigError(InputError):
    """A plan, key or option is wrong: correct the key that is named."""


class DataError(InputError):
    """A domain's files cannot be used as they are: correct the file and line that are named."""


class AssetError(GaintuneError, OSError):
    """An embedded asset or a hub id cannot be fetched or fails its hash: check the network or give a local copy."""


class TermsError(AssetError):
    """Terms of an embedded asset are not accepted yet: read them, and accept them once.

    Attributes:
        asset: its name, for `gaintune.storage.accept_terms`.
    """

    def __init__(self, message: str, asset: str = "") -> None:
        super().__init__(message)
        self.asset = asset


class BaseModelError(InputError):
    """The base model cannot be loaded or used in this way: correct the id, the folder or the dtype that is named."""


class AdapterError(InputError):
    """An adapter folder is incomplete, damaged or not an adapter."""


class BaseMismatchError(AdapterError):
    """An adapter was trained on another base than the one it is loaded on."""


class UnsupportedModuleError(InputError):
    """A tuner was pointed at a module it cannot adapt correctly."""


class RunDirectoryError(InputError):
    """A run directory belongs to another plan, is in use, or is damaged."""


class TrainingError(GaintuneError, RuntimeError):
    """Training stopped before it could do harm: it diverged, ran out of memory, or had nothing sound to go on from."""


class DivergedError(TrainingError):
    """A loss or a gradient is not finite.

    Attributes:
        methods: of a sequence that went on, the methods that diverged or could not begin, each with the reason.
        finished: how many others of that sequence are finished.
    """

    def __init__(self, message: str, methods: Mapping[str, str] | None = None, finished: int = 0) -> None:
        super().__init__(message)
        self.methods = dict(methods or {})
        self.finished = finished


class SweepError(GaintuneError, RuntimeError):
    """Some runs of a sweep failed, or its workers cannot work: run it again, what is finished is kept."""


class RecipeError(GaintuneError, RuntimeError):
    """Some steps of a recipe failed: correct what is named and run it again, what is finished is kept."""


class MergeError(GaintuneError, RuntimeError):
    """An adapter cannot be merged, or the merged model is further from it than the stated tolerance."""


def disk_full(error: BaseException) -> bool:
    """Tell whether an error of any library says that the disk is full."""
    # safetensors says so through a class of its own
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)


def one_line(error: BaseException) -> str:
    """Return another library's error message on one line, to quote in ours."""
    return " ".join(str(error).split())
