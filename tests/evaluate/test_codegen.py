"""Generated programs: what passes, what does not, and what they cannot do to the measurement."""

import sys
import time

import pytest

from gaintune.evaluate.codegen import CodeLimits, run_program

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


@pytest.mark.parametrize(
    "leave", ["raise SystemExit(0)", "import os; os._exit(0)", "print('passed')\nraise SystemExit"]
)
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
