"""What the command line draws: lines of progress in a log."""

import io

import pytest
from rich.console import Console
from typer.testing import CliRunner

import gaintune
from gaintune.cli import app, console
from gaintune.cli.console import Bars
from gaintune.progress import plural


@pytest.fixture
def log(monkeypatch):
    monkeypatch.setattr(console, "LINES_EVERY", -1.0)
    return io.StringIO()


def test_lines_in_a_log_count_whole_units_and_stop_before_the_end(log):
    with Bars(Console(file=log, width=200)).task("learning", 2048, "tokens") as advance:
        for _ in range(3):
            advance(2048 / 3, loss=1.0)
    lines = log.getvalue().splitlines()
    assert [line.split(" tokens, ")[0] for line in lines] == ["learning: 683/2,048", "learning: 1,365/2,048"]
    assert all("loss 1.000" in line for line in lines)


def test_one_of_a_thing_is_no_plural():
    assert (plural(1, "step"), plural(1024, "step")) == ("1 step", "1,024 steps")


def test_the_version_is_told():
    done = CliRunner().invoke(app, ["--version"])
    assert (done.exit_code, done.output) == (0, f"gaintune {gaintune.__version__}\n")


def test_the_package_lists_its_public_names_and_nothing_else():
    from gaintune import errors  # noqa: F401  # a module of ours becomes an attribute, and is none of them

    assert [name for name in dir(gaintune) if not name.startswith("__")] == sorted(gaintune.__all__)
    assert all(getattr(gaintune, name) is not None for name in gaintune.__all__)
