"""Started by `codegen` as a process of its own: takes its limits, runs one program, proves that it came to the end."""

import json
import os
import resource
import signal
import sys

FILE_BYTES = 16 * 2**20


def limit(seconds: float, memory: int) -> None:
    """Bound this process: address space, processor time, files, children, and wall-clock time from now on."""
    whole = int(seconds) + 1
    for what, most in (
        ("RLIMIT_AS", memory),
        ("RLIMIT_CPU", whole),
        ("RLIMIT_FSIZE", FILE_BYTES),
        ("RLIMIT_CORE", 0),
        ("RLIMIT_NPROC", 0),
    ):
        if hasattr(resource, what):
            number = getattr(resource, what)
            _, hard = resource.getrlimit(number)
            most = most if hard == resource.RLIM_INFINITY else min(most, hard)
            resource.setrlimit(number, (most, most))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)


def main() -> None:
    """Read the task from standard input and run it; the proof goes to what was standard output."""
    task = json.load(sys.stdin)
    answer = os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    limit(task["seconds"], task["memory"])
    try:
        exec(task["program"], {})  # the point of this process
    except BaseException:  # SystemExit too: a program that leaves early has not passed
        os._exit(1)
    os.write(answer, task["proof"].encode())
    os._exit(0)


if __name__ == "__main__":
    main()
