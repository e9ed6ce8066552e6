"""The application: every command of the package's files, and what ends a run that failed."""

from __future__ import annotations

import errno
import sys
from typing import Annotated, NoReturn

import typer

from gaintune import __version__
from gaintune.cli import analyze, deliver, evaluate, lists, recipe, train
from gaintune.cli.console import err, show_warnings
from gaintune.cli.help import HelpfulGroup
from gaintune.errors import GaintuneError, TermsError, disk_full

app = typer.Typer(
    cls=HelpfulGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its boxes cut the names of options on a terminal of 80 columns
    context_settings={"max_content_width": 120},
    epilog="""\
gaintune demo
gaintune adapt --domain notes.jsonl --out adapters/notes
gaintune evaluate demo --adapter adapters/notes --domain notes.jsonl""",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"gaintune {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Adapt language models to domain after domain without making them forget, and measure what was kept."""


INTERRUPTED = 130
CANNOT_WRITE = (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.ENAMETOOLONG)

for group in (train, evaluate, deliver, analyze, recipe, lists):
    app.add_typer(group.commands)


def main() -> None:
    """Run the application: a person's mistake ends in one message and exit code 2, a failed run in exit code 1."""
    show_warnings(err)
    try:
        _run()
    except GaintuneError as error:
        _fail(str(error), error.exit_code)
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            again = "training, sweeps, recipes and retention continue, all else begins anew"
            err.print(f"stopped; run the same command again ({again})", highlight=False)
        raise
    except Exception as error:
        if disk_full(error):
            _fail("the disk is full; make room and run the same command again, what was finished is kept", 1)
        if isinstance(error, OSError) and error.errno in CANNOT_WRITE:
            _fail(f"{error.filename or 'a file'}: {error.strerror}", 1)
        raise


def _run() -> None:
    """Run the application, and again where it lacked an asset whose terms the person at the terminal accepts."""
    try:
        app()
    except TermsError as error:
        from gaintune.storage import process_count

        asked = sys.stdin.isatty() and err.is_terminal and process_count() == 1
        if not asked or not lists.ask_for_terms(error.asset):
            raise
        app()


def _fail(message: str, code: int) -> NoReturn:
    err.print(f"error: {message}", style="red", highlight=False, markup=False, soft_wrap=True)
    sys.exit(code)
