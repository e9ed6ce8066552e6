"""Run a program that a model wrote: in a process of its own, in an empty folder, with limits on time and memory.

This keeps a mistake in the program from harming the measurement. It is no sandbox: the program can read files, reach
the network, and forge its pass if it means to. So nothing is run unless the user has allowed it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import logging
import os
import secrets
import selectors
import signal
import stat
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from gaintune.errors import ConfigError

logger = logging.getLogger(__name__)

CHILD = Path(__file__).with_name("program_child.py")
READY, LENGTH_BYTES = b"ready", 8  # as in the child, which cannot be imported where there is no `resource`
STARTING = 60.0  # seconds a loaded machine may need to start an interpreter, before the program's own time begins
ENDING = 5.0  # seconds beyond the program's own, after which a program that turned its alarm off is killed
POLLING = 0.05  # seconds between two polls of a process whose pipe another process holds open
ROUNDS = 20  # searches for processes that a program left running; a program that starts them faster gets away
OUT_OF_TIME = (-signal.SIGALRM, -signal.SIGXCPU) if hasattr(signal, "SIGALRM") else ()
MARK = "GAINTUNE_PROGRAM"
NOBODY = "nobody"
TASK = "humaneval"
TRIVIAL = "import math\nassert math.sqrt(4) == 2"


@dataclass(frozen=True)
class CodeLimits:
    """Limits of a program: seconds of wall-clock time, and MB of address space."""

    seconds: float = 3.0
    memory_mb: int = 1024


@dataclass(frozen=True)
class Outcome:
    """Whether a program ran to its end without an error, and if not, why."""

    passed: bool
    reason: Literal["passed", "failed", "out of time"]


@functools.cache
def nobody() -> tuple[int, int] | None:
    """Return the ids of the user and group to run a program of root's as; None for the caller's own.

    The limit on the number of processes does not hold for root. Where only root may read the interpreter's folder, a
    user without rights could import nothing, so the program stays root's, with one warning.
    """
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return None
    import pwd

    paths = map(Path, (sys.executable, sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")))
    reasons = [f"only root may read {path}" for path in paths if path.exists() and not open_to_all(path)]
    try:
        user = pwd.getpwnam(NOBODY)
    except KeyError:
        reasons = [f"/etc/passwd has no user {NOBODY}"]
    else:
        if not reasons:
            return user.pw_uid, user.pw_gid
    logger.warning("generated programs run as root, and may start processes of their own (%s)", reasons[0])
    return None


def open_to_all(path: Path) -> bool:
    """Return whether everybody may read a file or folder, and enter all folders above it."""
    real = path.resolve()
    entered = [*real.parents, *([real] if real.is_dir() else [])]
    return bool(real.stat().st_mode & stat.S_IROTH) and all(folder.stat().st_mode & stat.S_IXOTH for folder in entered)


@functools.cache
def require_limits(limits: CodeLimits) -> None:
    """Refuse where programs cannot be limited, or none runs within the limits; ConfigError says what went wrong."""
    outcome = run_program(TRIVIAL, limits)
    if not outcome.passed:
        raise ConfigError(
            f"not even a program of two lines runs within {limits.seconds:g} s and {limits.memory_mb} MB here "
            f"({outcome.reason}): allow more (Python: code_seconds, code_memory_mb)"
        )


def run_program(program: str, limits: CodeLimits) -> Outcome:
    """Run a program as `exec` would; it passes if its last line is reached without an exception.

    A program that ends the process early, with whatever exit code, has not passed. Output is discarded. Processes that
    it left running are killed where they can be found (on Linux also those that have left its process group).

    Raises:
        ConfigError: a system without limits on processes, or on which a process cannot take them.
    """
    if importlib.util.find_spec("resource") is None:
        raise ConfigError("this system cannot limit a process's memory, so generated code is not run on it")
    proof, mark = (secrets.token_hex(16).encode() for _ in range(2))
    user = nobody()
    task = {"program": program, "proof_bytes": len(proof), "user": user}
    message = json.dumps({**task, "seconds": limits.seconds, "memory": limits.memory_mb * 2**20}).encode()
    with tempfile.TemporaryDirectory(prefix="gaintune-code-", ignore_cleanup_errors=True) as folder:
        if user is not None:
            os.chown(folder, *user)
        with _started(folder, mark.decode()) as (child, errors):
            with contextlib.suppress(BrokenPipeError):  # it has died already, and its errors say why
                assert child.stdin is not None
                child.stdin.write(len(message).to_bytes(LENGTH_BYTES, "big") + message + proof)
                child.stdin.flush()
            if _read(child, len(READY), time.monotonic() + STARTING) != READY:
                errors.seek(0)
                why = errors.read().decode(errors="replace").strip().rpartition("\n")[2] or "it did not start"
                raise ConfigError(f"a process for generated code cannot be limited here ({why[:300]})")
            answer = _read(child, len(proof), time.monotonic() + limits.seconds + ENDING)
            try:
                status = child.wait(timeout=0 if answer == proof else POLLING * 10)
            except subprocess.TimeoutExpired:
                status = None
    if answer == proof:
        return Outcome(True, "passed")
    return Outcome(False, "out of time" if status is None or status in OUT_OF_TIME else "failed")


@contextlib.contextmanager
def _started(folder: str, mark: str) -> Iterator[tuple[subprocess.Popen[bytes], IO[bytes]]]:
    """Start the process, with a file of its errors before the program begins; kill it and its children at the end."""
    environment = {"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, "OMP_NUM_THREADS": "1", "LANG": "C.UTF-8"}
    with tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(
            [sys.executable, "-I", str(CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            cwd=folder,
            env={**environment, MARK: mark},
            start_new_session=True,
        )
        try:
            yield child, errors
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            _end_all(f"{MARK}={mark}".encode())
            for pipe in (child.stdin, child.stdout):
                with contextlib.suppress(BrokenPipeError):
                    assert pipe is not None
                    pipe.close()


def _read(child: subprocess.Popen[bytes], count: int, until: float) -> bytes:
    """Read bytes of a process's output; fewer if it ends or its time is up, even if its pipe is still held open."""
    assert child.stdout is not None
    file, output = child.stdout.fileno(), b""
    with selectors.DefaultSelector() as selector:
        selector.register(file, selectors.EVENT_READ)
        while len(output) < count:
            ended, left = child.poll() is not None, until - time.monotonic()
            if selector.select(0 if ended else max(0.0, min(left, POLLING))):
                more = os.read(file, count - len(output))
                if not more:
                    break
                output += more
            elif ended or left <= 0:
                break
    return output


def _end_all(mark: bytes) -> None:
    """Kill every process with a mark in its environment, also one with a session of its own."""
    for _ in range(ROUNDS):
        killed = 0
        for environment in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):  # it has ended meanwhile, or is another user's
                if mark in environment.read_bytes():
                    os.kill(int(environment.parent.name), signal.SIGKILL)
                    killed += 1
        if not killed:
            return
        time.sleep(POLLING)


def with_own_runner(settings: Mapping[str, Any], limits: CodeLimits) -> dict[str, Any]:
    """Return lm-eval's settings of the task with its metric computed by `run_program`.

    lm-eval's metric comes from the Hub and runs the programs in its own process. This one runs the same program: the
    prompt, the model's answer, the tests and the call of their `check`.
    """
    metric = {"metric": _pass_at_k(limits), "aggregation": "mean", "higher_is_better": True}
    joined = {"function": "custom", "filter_fn": _programs}
    return {**settings, "metric_list": [metric], "filter_list": [{"name": "none", "filter": [joined]}]}


def _programs(responses: Sequence[Sequence[str]], docs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Join each prompt and what the model wrote after it."""
    return [[doc["prompt"] + answer for answer in answers] for answers, doc in zip(responses, docs, strict=True)]


def _pass_at_k(limits: CodeLimits) -> Callable[..., dict[str, float]]:
    def pass_at_k(references: Sequence[str], predictions: Sequence[Sequence[str]], **_: Any) -> dict[str, float]:
        """Return the share of a row's programs that pass its tests; greedy decoding writes one."""
        (tests,), (programs,) = references, predictions
        passed = [run_program(f"{program}\n{tests}", limits).passed for program in programs]
        return {"pass@1": sum(passed) / len(passed)}

    return pass_at_k
