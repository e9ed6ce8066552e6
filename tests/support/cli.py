"""The command line in a test: in this process, or in one of its own where a process or its imports are the point."""

import contextlib
import io
import logging
import os
import subprocess
import sys
from unittest import mock

import typer
from typer.testing import CliRunner

from gaintune.cli import app, main

SMALL = ("--set", "model.device=cpu", "--train-tokens", 512, "--validation-tokens", 128, "--block-size", 32)
"""Options of a run of seconds."""
QUICK = ("--set", "model.dtype=fp32", "--set", "model.device=cpu", "--set", "evaluate.bootstrap_samples=50")


def commands(group=None, path=()):
    """Every command that runs something, by its words."""
    group = group or typer.main.get_command(app)
    for name, each in group.commands.items():
        yield from commands(each, (*path, name)) if hasattr(each, "commands") else [((*path, name), each)]


COMMANDS = {" ".join(path): each for path, each in commands()}


def run(*arguments, application=app, columns=200) -> str:
    """Return what a command prints, and raise what it raises."""
    environment = {"COLUMNS": str(columns), "NO_COLOR": "1"}
    done = CliRunner(env=environment).invoke(application, [str(each) for each in arguments])
    if done.exception is not None:
        raise done.exception
    return done.stdout


def gaintune(*arguments) -> subprocess.CompletedProcess[str]:
    """Run the program's entry point, with its messages and exit codes, in this process."""
    words, out, error = ["gaintune", *map(str, arguments)], io.StringIO(), io.StringIO()
    logger, code = logging.getLogger("gaintune"), 0
    kept = logger.handlers, logger.propagate
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(sys, "argv", words))
        stack.enter_context(mock.patch.dict(os.environ, {"COLUMNS": "200", "NO_COLOR": "1"}))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(error))
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        finally:
            logger.handlers, logger.propagate = kept
    return subprocess.CompletedProcess(words, code, out.getvalue(), error.getvalue())


def process(*arguments, **environment) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own."""
    command = [sys.executable, "-m", "gaintune", *map(str, arguments)]
    settings = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb", **environment}
    return subprocess.run(command, capture_output=True, text=True, env=settings, timeout=200)


def printed(done: subprocess.CompletedProcess[str]) -> str:
    """Return what a command printed that ended well, in one line."""
    assert done.returncode == 0, done.stderr
    return " ".join(done.stdout.split())


def refusal(done: subprocess.CompletedProcess[str], code: int = 2) -> str:
    """Return the message of a refusal: a single one, on the error stream, without a traceback."""
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("error:") == 1
    return " ".join(done.stderr.split())


def words_of(*command) -> str:
    """Return a command's help in one line, without the frames of its tables."""
    return " ".join(run(*command, "--help").replace("│", " ").split())
