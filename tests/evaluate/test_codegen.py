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


def test_a_right_program_passes_and_a_wrong_one_does_not():
    assert run_program(f"def add(a, b):\n    return a + b\n{CHECK}", LIMITS).passed
    assert run_program(f"def add(a, b):\n    return a - b\n{CHECK}", LIMITS).reason == "failed"
    assert run_program(f"def add(a, b)\n    return a + b\n{CHECK}", LIMITS).reason == "failed"


@pytest.mark.parametrize("leave", ["raise SystemExit(0)", "import os; os._exit(0)", "print(1)\nraise SystemExit"])
def test_leaving_early_is_no_pass_whatever_the_exit_code(leave):
    assert run_program(f"{leave}\n{CHECK}", LIMITS).reason == "failed"


def test_a_program_is_no_main_program_as_in_exec():
    assert run_program("if __name__ == '__main__':\n    raise ValueError", LIMITS).passed


def test_a_program_that_never_ends_is_stopped():
    started = time.monotonic()
    assert run_program("while True:\n    pass", CodeLimits(seconds=1.0)).reason == "out of time"
    assert run_program("import time\ntime.sleep(600)", CodeLimits(seconds=1.0)).reason == "out of time"
    assert time.monotonic() - started < 120


def test_memory_is_limited():
    assert not run_program("block = bytearray(2 * 1024**3)", LIMITS).passed
    assert run_program("block = bytearray(16 * 1024**2)", LIMITS).passed


def test_a_program_starts_in_an_empty_folder_without_the_callers_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("SECRET_OF_A_TEST", "told")
    looks = "import os\nassert 'SECRET_OF_A_TEST' not in os.environ\nassert os.listdir() == []\n"
    assert run_program(looks, LIMITS).passed
    monkeypatch.chdir(tmp_path)
    assert run_program("open('left', 'w').write('x')", LIMITS).passed
    assert not list(tmp_path.iterdir())


def test_a_process_that_cannot_be_limited_is_an_error_and_no_zero():
    limits = CodeLimits(seconds=20.0, memory_mb=2**60)
    refused(ConfigError, r"cannot be limited here .*OverflowError", run_program, "pass", limits)
    refused(ConfigError, "allow more", require_limits, CodeLimits(seconds=0.0001))
    require_limits(LIMITS)


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


def test_no_variable_of_the_process_holds_the_proof_while_a_program_runs():
    assert run_program(FORGED, LIMITS).reason == "failed"


def test_a_program_that_says_much_without_end_is_stopped():
    flood = "import os\nfor file in range(3, 12):\n    try:\n        os.write(file, b'x' * 2**16)\n"
    flood += "    except OSError:\n        pass\n"
    assert run_program(flood, LIMITS).reason in {"failed", "out of time"}


def test_too_much_processor_time_is_out_of_time_also_without_the_alarm():
    busy = "import signal\nsignal.signal(signal.SIGALRM, signal.SIG_IGN)\nwhile True:\n    pass"
    assert run_program(busy, CodeLimits(seconds=1.0)).reason == "out of time"
    idle = "import signal, time\nsignal.signal(signal.SIGALRM, signal.SIG_IGN)\ntime.sleep(600)"
    assert run_program(idle, CodeLimits(seconds=0.5)).reason == "out of time"


def test_the_size_of_files_is_limited():
    assert not run_program("open('big', 'wb').write(bytes(17 * 2**20))", LIMITS).passed
    assert run_program("open('small', 'wb').write(bytes(15 * 2**20))", LIMITS).passed


FORKING = """
import os, time
from support import refused
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
        number = int(file.read_text())
        assert not _runs(number)


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


def test_what_is_open_to_all(tmp_path):
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "inner").mkdir()
        for mode, open_ in ((0o700, False), (0o755, True)):
            place.chmod(mode)
            (place / "inner").chmod(0o755)
            assert open_to_all(place / "inner") is open_
        (place / "inner").chmod(0o711)
        assert not open_to_all(place / "inner")
