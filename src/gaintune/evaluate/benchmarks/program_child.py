"""The process that `programs` starts: it takes its limits, runs a program, and proves that this came to its end.

Standard input holds the length of the task, the task, and the proof, which stays unread until the program has ended:
while it runs, no variable of this process has the proof.
"""

import json
import os
import resource
import signal

FILE_BYTES = 16 * 2**20
LENGTH_BYTES = 8
READY = b"ready"


def limit(seconds: float, memory: int, user: tuple[int, int] | None) -> None:
    """Limit this process: user, address space, processor time, files, children, and wall-clock time from now on."""
    if user is not None:
        os.setgroups([])
        os.setresgid(user[1], user[1], user[1])
        os.setresuid(user[0], user[0], user[0])
    whole = int(seconds) + 1
    for what, most, beyond in (
        ("RLIMIT_AS", memory, 0),
        ("RLIMIT_CPU", whole, 1),  # SIGXCPU at the first of the two, SIGKILL at the second
        ("RLIMIT_FSIZE", FILE_BYTES, 0),
        ("RLIMIT_CORE", 0, 0),
        ("RLIMIT_NPROC", 0, 0),
    ):
        if hasattr(resource, what):
            number = getattr(resource, what)
            _, hard = resource.getrlimit(number)
            ends = [end if hard == resource.RLIM_INFINITY else min(end, hard) for end in (most, most + beyond)]
            resource.setrlimit(number, (ends[0], ends[1]))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)


def read(file: int, size: int) -> bytes:
    """Read exactly so many bytes, so that those after them stay unread."""
    content = b""
    while len(content) < size:
        more = os.read(file, size - len(content))
        if not more:
            raise EOFError(f"{len(content)} of {size} bytes")
        content += more
    return content


def main() -> None:
    """Read the task from standard input and run it; the proof goes to what was standard output."""
    task = json.loads(read(0, int.from_bytes(read(0, LENGTH_BYTES), "big")))
    program, size = task["program"], task["proof_bytes"]
    rest, answer = os.dup(0), os.dup(1)  # closed in whatever the program executes
    limit(task["seconds"], task["memory"], task["user"])
    os.write(answer, READY)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    try:
        exec(program, {})  # the point of this process
    except BaseException:  # SystemExit too: a program that leaves early has not passed
        os._exit(1)
    os.write(answer, read(rest, size))
    os._exit(0)


if __name__ == "__main__":
    main()
