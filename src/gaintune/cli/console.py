"""Drawing on the command line: progress bars with speed and time left, tables, and lines of text."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from textwrap import fill

from rich.cells import cell_len
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from gaintune import progress
from gaintune.progress import Advance
from gaintune.results import Interval

out = Console()
err = Console(stderr=True)
LINES_EVERY = 15.0  # seconds between two lines of progress where there is no terminal to draw a bar on


@dataclass(frozen=True)
class Bars:
    """Progress on a terminal as a bar, and elsewhere (a log file) as a line now and then."""

    console: Console

    @contextlib.contextmanager
    def task(self, title: str, total: int, unit: str) -> Iterator[Advance]:
        """Show a bar until the work is done; a line with its pace stays if it took over two seconds."""
        start = said = time.perf_counter()
        done = 0
        figures: dict[str, float] = {}

        def pace() -> str:
            shown = "".join(f"  {name} {value:.3f}" for name, value in figures.items())
            rate = done / max(time.perf_counter() - start, 1e-9)
            return f"{rate:,.{0 if rate >= 10 else 2}f} {unit}/s{shown}"

        columns = [SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
        columns += [TextColumn("{task.fields[pace]}"), TimeRemainingColumn()]
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as bar:
            row = bar.add_task(title, total=total, pace="")

            def advance(amount: int, **latest: float) -> None:
                nonlocal done, said
                done = min(total, done + amount)
                figures.update(latest)
                bar.update(row, completed=round(done), pace=pace())
                waited = time.perf_counter() - said > LINES_EVERY
                if waited and round(done) < total and not self.console.is_terminal:
                    said = time.perf_counter()
                    left = (said - start) / done * (total - done)
                    line = f"{title}: {done:,.0f}/{total:,.0f} {unit}, {pace()}, {left:.0f} s left"
                    self.console.print(line, highlight=False)

            yield advance
        if time.perf_counter() - start > 2.0:
            self.note(f"{title}: {done:,.0f} {unit} in {time.perf_counter() - start:.1f} s ({pace()})")

    def note(self, text: str) -> None:
        """Print a plain line."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def say(text: str, console: Console | None = None) -> None:
    """Print one line or more as it is, to standard output unless given: no markup, no colors, no wrapping."""
    (console or out).print(text, highlight=False, markup=False, soft_wrap=True)


def say_wrapped(text: str, indent: int = 4) -> None:
    """Print lines wrapped at the terminal's width between words, their further lines indented below the first."""
    for line in text.split("\n"):
        below = " " * (len(line) - len(line.lstrip()) + indent)
        say(fill(line, out.width, subsequent_indent=below, break_long_words=False, break_on_hyphens=False))


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[int] = ()) -> Table:
    """Draw a table for the terminal; `numeric` columns are aligned to the right.

    Cells are wrapped between words, and lose the room around them, before a word is broken.
    """
    texts = ["\n".join([column, *(row[index] for row in rows)]) for index, column in enumerate(columns)]
    words = [max(map(cell_len, text.split()), default=0) for text in texts]  # the longest word of each column
    widths = [max(map(cell_len, text.splitlines()), default=0) for text in texts]
    free = out.width - len(columns) - 1  # beside the lines between columns
    padding = 0 if sum(words) <= free < sum(words) + 2 * len(columns) else 1
    free -= 2 * padding * len(columns)
    while sum(widths) > free and widths != words:
        _, widest = max((widths[index], index) for index in range(len(columns)) if widths[index] > words[index])
        widths[widest] -= 1
    drawn = Table(title=title or None, title_justify="left", padding=(0, padding))
    for index, column in enumerate(columns):
        justify, width = "right" if index in numeric else "left", widths[index] if sum(widths) <= free else None
        drawn.add_column(column, justify=justify, overflow="fold", width=width)
    for row in rows:
        drawn.add_row(*row)
    return drawn


def percent(value: Interval | None, form: str = "+.1f", unit: str = " %", factor: float = 1.0) -> str:
    """Format a number with its interval, all times `factor`; a dash for none."""
    if value is None:
        return "—"
    low, high = value.low, value.high
    ends = "" if low is None or high is None else f" [{factor * low:{form}}, {factor * high:{form}}]"
    return f"{factor * value.value:{form}}{unit}{ends}"


def show_warnings(console: Console) -> None:
    """Send the library's warnings to the terminal."""
    handler = RichHandler(console=console, show_time=False, show_path=False, markup=False, highlighter=None)
    logger = logging.getLogger("gaintune")
    logger.handlers = [handler]
    logger.propagate = False


def quiet_libraries() -> None:
    """Keep other libraries' progress bars and advice off the terminal; their errors still show."""
    import warnings

    from datasets.utils import logging as datasets_logging
    from transformers.utils import logging as transformers_logging

    for library in (transformers_logging, datasets_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of kernels that only quantized bases use
    for category in (FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category, module="peft|torch|transformers")


def progress_on(console: Console) -> progress.Progress:
    """Return bars; of several processes on one run, only the first draws."""
    from gaintune.storage import first_process

    return Bars(console) if first_process() else progress.Silent()
