"""Generated programs: what passes, what does not, and what they cannot do to the measurement."""

import os
import sys
import tempfile
import time
from pathlib import Path

import pytest

from gaintune.errors import ConfigError
from gaintune.evaluate.benchmarks.programs import CodeLimits, open_to_all, require_limits, run_program
from support import refused

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="processes cannot be limited there")

CHECK = """
def check(candidate):
    assert candidate(2, 3) == 5
    assert candidate(-1, 1) == 0
check(add)
"""
LIMITS = CodeLimits(seconds=20.0, memory_mb=512)
FORGED = """
import os, sys
frame, found = sys._getframe(), []
while frame:
    for values in (frame.f_locals, frame.f_globals):
        for value in list(values.values()):
            for each in (value.values() if isinstance(value, dict) else [value]):
                text = each.decode(errors="replace") if isinstance(each, bytes) else str(each)
                if len(text) == 32:
                    found.append(text)
    frame = frame.f_back
for text in found:
    for file in range(3, 12):
        try:
            os.write(file, text.encode())
        except OSError:
            pass
os._exit(0)
"""


@pytest.mark.parametrize(("program", "reason"), [
    (f"def add(a, b):\n    return a + b\n{CHECK}", "passed"),
    (f"def add(a, b):\n    return a - b\n{CHECK}", "failed"),
    (f"def add(a, b)\n    return a + b\n{CHECK}", "failed"),
    ("if __name__ == '__main__':\n    raise ValueError", "passed"),  # as in exec
    (f"raise SystemExit(0)\n{CHECK}", "failed"),  # leaving early, whatever the exit code
    (f"import os; os._exit(0)\n{CHECK}", "failed"),
    (f"print('passed')\nraise SystemExit\n{CHECK}", "failed"),
    (FORGED, "failed"),  # no variable of the process holds the proof while a program runs
    ("block = bytearray(16 * 1024**2)", "passed"),
    ("block = bytearray(2 * 1024**3)", "failed"),
    ("open('small', 'wb').write(bytes(15 * 2**20))", "passed"),
    ("open('big', 'wb').write(bytes(17 * 2**20))", "failed"),
])  # fmt: skip
def test_a_program_passes_or_fails(program, reason):
    assert run_program(program, LIMITS).reason == reason


UNALARMED = "import signal, time\nsignal.signal(signal.SIGALRM, signal.SIG_IGN)\n"


@pytest.mark.parametrize("prelude", ["import time\n", UNALARMED])
@pytest.mark.parametrize(("program", "seconds"), [("while True:\n    pass", 1.0), ("time.sleep(600)", 0.5)])
def test_a_program_that_never_ends_is_stopped_also_without_the_alarm(prelude, program, seconds):
    started = time.monotonic()
    assert run_program(prelude + program, CodeLimits(seconds=seconds)).reason == "out of time"
    assert time.monotonic() - started < 60


def test_a_program_starts_in_an_empty_folder_without_the_callers_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("SECRET_OF_A_TEST", "told")
    looks = "import os\nassert 'SECRET_OF_A_TEST' not in os.environ\nassert os.listdir() == []\n"
    assert run_program(looks, LIMITS).passed
    monkeypatch.chdir(tmp_path)
    assert run_program("open('left', 'w').write('x')", LIMITS).passed and not list(tmp_path.iterdir())


def test_a_process_that_cannot_be_limited_is_an_error_and_no_zero():
    limits = CodeLimits(seconds=20.0, memory_mb=2**60)
    refused(ConfigError, r"cannot be limited here .*OverflowError", run_program, "pass", limits)
    refused(ConfigError, "allow more", require_limits, CodeLimits(seconds=0.0001))
    require_limits(LIMITS)


def test_a_program_that_writes_without_end_is_stopped():
    flood = "import os\nfor file in range(3, 12):\n    try:\n        os.write(file, b'x' * 2**16)\n"
    flood += "    except OSError:\n        pass\n"
    assert run_program(flood, LIMITS).reason in {"failed", "out of time"}


FORKING = """
import os, time
def fork():
    try:
        return os.fork()
    except OSError:  # the limit on processes holds for this user
        return 1
if fork() == 0:
    os.setsid()
    if fork() == 0:
        with open({file!r}, "w") as left:
            left.write(str(os.getpid()))
        time.sleep(600)
    os._exit(0)
time.sleep(0.3)
"""


def test_what_a_program_leaves_running_neither_holds_the_measurement_up_nor_stays():
    """A grandchild with a session of its own, which also holds the way back to the measurement open."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        file = Path(folder) / "pid"
        assert run_program(FORKING.format(file=str(file)), LIMITS).reason == "passed"
        if not file.is_file():
            return  # no process could be started
        assert not _runs(int(file.read_text()))


def _runs(number: int) -> bool:
    for _ in range(100):
        try:
            os.kill(number, 0)
            state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return False
        if state == "Z":  # it has ended, and nobody has asked how
            return False
        time.sleep(0.05)
    return True


def test_a_folder_is_open_to_all_only_with_all_folders_above_it(tmp_path):
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "inner").mkdir()
        for mode, open_ in ((0o700, False), (0o755, True)):
            place.chmod(mode)
            (place / "inner").chmod(0o755)
            assert open_to_all(place / "inner") is open_
        (place / "inner").chmod(0o711)
        assert not open_to_all(place / "inner")
