"""Run a program that a model wrote: in a process of its own, in an empty folder, with limits on time and memory.

This keeps a mistake in the program from harming the measurement. It is no sandbox: the program can read the user's
files and reach the network, so nothing is run unless the user has said so.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gaintune.errors import ConfigError

CHILD = Path(__file__).with_name("codegen_child.py")
STARTING = 30.0  # seconds a loaded machine may need to start an interpreter, beside the program's own time
OUT_OF_TIME = (-signal.SIGALRM, -signal.SIGXCPU) if hasattr(signal, "SIGALRM") else ()


@dataclass(frozen=True)
class CodeLimits:
    """What one program may use: seconds of wall-clock time, and MB of address space."""

    seconds: float = 3.0
    memory_mb: int = 1024


@dataclass(frozen=True)
class Outcome:
    """Whether a program ran to its end without an error, and if not, why."""

    passed: bool
    reason: Literal["passed", "failed", "out of time"]


def require_limits() -> None:
    """Refuse where processes cannot be limited; ConfigError."""
    if importlib.util.find_spec("resource") is None:
        raise ConfigError("this system cannot limit a process's memory, so generated code is not run on it")


def run_program(program: str, limits: CodeLimits) -> Outcome:
    """Run a program as `exec` would; it passes if its last line is reached without an exception.

    A program that ends the process early, with whatever exit code, has not passed. Output goes nowhere.

    Raises:
        ConfigError: a system without limits on processes.
    """
    require_limits()
    proof = secrets.token_hex(16)
    task = {"program": program, "proof": proof, "seconds": limits.seconds, "memory": limits.memory_mb * 2**20}
    with tempfile.TemporaryDirectory(prefix="gaintune-code-", ignore_cleanup_errors=True) as folder:
        child = subprocess.Popen(
            [sys.executable, "-I", str(CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, "OMP_NUM_THREADS": "1", "LANG": "C.UTF-8"},
            start_new_session=True,
        )
        try:
            said, _ = child.communicate(json.dumps(task).encode(), timeout=limits.seconds + STARTING)
        except subprocess.TimeoutExpired:
            said = b""
            timed_out = True
        else:
            timed_out = child.returncode in OUT_OF_TIME
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # with all that the program may have started
            child.wait()
    if said.decode(errors="replace").strip() == proof:
        return Outcome(True, "passed")
    return Outcome(False, "out of time" if timed_out else "failed")
