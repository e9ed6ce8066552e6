"""Run a program that a model wrote: in a process of its own, in an empty folder, with limits on time and memory.

This keeps a mistake in the program from harming the measurement. It is no sandbox: the program can read files and
reach the network, and one that sets out to can forge its pass, so nothing is run unless the user has said so.
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


CHILD = Path(__file__).with_name("program_child.py")
READY = b"ready"
LENGTH_BYTES = 8
STARTING = 60.0  # seconds a loaded machine may need to start an interpreter, before the program's own time begins
ENDING = 5.0  # seconds beyond the program's own, after which one that turned its alarm off is stopped from outside
LOOKING = 0.05  # seconds between two looks at a process whose answer something else holds open
ROUNDS = 20  # looks for what a program left running; one that starts others faster than that gets away
OUT_OF_TIME = (-signal.SIGALRM, -signal.SIGXCPU) if hasattr(signal, "SIGALRM") else ()
MARK = "GAINTUNE_PROGRAM"
TRIVIAL = "import math\nassert math.sqrt(4) == 2"


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

    A program that ends the process early, with whatever exit code, has not passed. Output goes nowhere. What it left
    running is ended with it, where it can be found (on Linux also what has left its group of processes).

    Raises:
        ConfigError: a system without limits on processes, or on which a process cannot take them.
    """
    if importlib.util.find_spec("resource") is None:
        raise ConfigError("this system cannot limit a process's memory, so generated code is not run on it")
    proof, mark = (secrets.token_hex(16).encode() for _ in range(2))
    user = nobody()
    task = {"program": program, "proof_bytes": len(proof), "seconds": limits.seconds, "user": user}
    task["memory"] = limits.memory_mb * 2**20
    written = json.dumps(task).encode()
    with tempfile.TemporaryDirectory(prefix="gaintune-code-", ignore_cleanup_errors=True) as folder:
        if user is not None:
            os.chown(folder, *user)
        with _started(folder, mark.decode()) as (child, complaints):
            with contextlib.suppress(BrokenPipeError):  # it has died already, and its complaints say why
                assert child.stdin is not None
                child.stdin.write(len(written).to_bytes(LENGTH_BYTES, "big") + written + proof)
                child.stdin.flush()
            if _hear(child, len(READY), time.monotonic() + STARTING) != READY:
                complaints.seek(0)
                why = complaints.read().decode(errors="replace").strip().rpartition("\n")[2] or "it did not start"
                raise ConfigError(f"a process for generated code cannot be limited here ({why[:300]})")
            said = _hear(child, len(proof), time.monotonic() + limits.seconds + ENDING)
            status = child.poll() if said == proof else _status(child)
    if said == proof:
        return Outcome(True, "passed")
    return Outcome(False, "out of time" if status is None or status in OUT_OF_TIME else "failed")


@contextlib.contextmanager
def _started(folder: str, mark: str) -> Iterator[tuple[subprocess.Popen[bytes], IO[bytes]]]:
    """The process, and what it complains of before the program begins; ended with all that came of it."""
    with tempfile.TemporaryFile() as complaints:
        child = subprocess.Popen(
            [sys.executable, "-I", str(CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            cwd=folder,
            env={
                "PATH": os.defpath,
                "HOME": folder,
                "TMPDIR": folder,
                "OMP_NUM_THREADS": "1",
                "LANG": "C.UTF-8",
                MARK: mark,
            },
            start_new_session=True,
        )
        try:
            yield child, complaints
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            _end_all(f"{MARK}={mark}".encode())
            for pipe in (child.stdin, child.stdout):
                with contextlib.suppress(BrokenPipeError):
                    assert pipe is not None
                    pipe.close()


def _hear(child: subprocess.Popen[bytes], enough: int, until: float) -> bytes:
    """Read so many bytes of what a process says; fewer where it ends or its time is up before that.

    Its end counts and not that of the pipe, which another process may hold open.
    """
    assert child.stdout is not None
    file, said = child.stdout.fileno(), b""
    with selectors.DefaultSelector() as selector:
        selector.register(file, selectors.EVENT_READ)
        while len(said) < enough:
            ended, left = child.poll() is not None, until - time.monotonic()
            if selector.select(0 if ended else max(0.0, min(left, LOOKING))):
                more = os.read(file, enough - len(said))
                if not more:
                    break
                said += more
            elif ended or left <= 0:
                break
    return said


def _status(child: subprocess.Popen[bytes]) -> int | None:
    """How a process ended, None where it has not."""
    try:
        return child.wait(timeout=LOOKING * 10)
    except subprocess.TimeoutExpired:
        return None


def _end_all(mark: bytes) -> None:
    """End every process that carries a mark in its environment, also one with a session of its own."""
    for _ in range(ROUNDS):
        found = 0
        for environment in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):  # it has ended meanwhile, or is another user's
                if mark in environment.read_bytes():
                    os.kill(int(environment.parent.name), signal.SIGKILL)
                    found += 1
        if not found:
            return
        time.sleep(LOOKING)


TASK = "humaneval"


def with_own_runner(settings: Mapping[str, Any], limits: CodeLimits) -> dict[str, Any]:
    """lm-eval's settings of the task with its metric computed by `run_program`.

    lm-eval's metric comes from the Hub and runs the programs in its own process; this one runs the same program (the
    prompt, what the model wrote after it, the tests and the call of their `check`) and calls it passed likewise.
    """
    metric = {"metric": _pass_at_k(limits), "aggregation": "mean", "higher_is_better": True}
    joined = {"function": "custom", "filter_fn": _programs}
    return {**settings, "metric_list": [metric], "filter_list": [{"name": "none", "filter": [joined]}]}


def _programs(responses: Sequence[Sequence[str]], docs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """What a model wrote after each prompt, joined to it."""
    return [[doc["prompt"] + each for each in written] for written, doc in zip(responses, docs, strict=True)]


def _pass_at_k(limits: CodeLimits) -> Callable[..., dict[str, float]]:
    def pass_at_k(references: Sequence[str], predictions: Sequence[Sequence[str]], **_: Any) -> dict[str, float]:
        """Share of one row's programs that pass its tests; greedy decoding writes one."""
        (tests,), (programs,) = references, predictions
        passed = [run_program(f"{program}\n{tests}", limits).passed for program in programs]
        return {"pass@1": sum(passed) / len(passed)}

    return pass_at_k
