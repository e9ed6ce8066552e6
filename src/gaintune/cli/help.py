"""Plain-text help: options and commands in named groups, and examples under them.

Rich's boxes would cut the names of options on a terminal of 80 columns. A group's name is Typer's `rich_help_panel`,
and examples are a command's `epilog`, one command line to a line.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from typer.core import TyperCommand, TyperGroup


def _write_parameters(command: Any, ctx: Any, formatter: Any) -> None:
    """Write the arguments, then every group of options in the order in which its first option was declared."""
    shown = [(item, record) for item in command.get_params(ctx) if (record := item.get_help_record(ctx))]
    arguments = [record for item, record in shown if item.param_type_name == "argument"]
    groups = _grouped((item, record) for item, record in shown if item.param_type_name != "argument")
    rest = groups.pop("", [])
    named = {f"{group} options": rows for group, rows in groups.items()}
    for heading, rows in {"Arguments": arguments, **named, "Options": rest}.items():
        if rows:
            with formatter.section(heading):
                formatter.write_dl(rows)


def _grouped(entries: Iterable[tuple[Any, tuple[str, str]]]) -> dict[str, list[tuple[str, str]]]:
    groups: dict[str, list[tuple[str, str]]] = {}
    for item, row in entries:
        groups.setdefault(getattr(item, "rich_help_panel", None) or "", []).append(row)
    return groups


def _write_examples(command: Any, formatter: Any) -> None:
    """Write the examples as they are: a line that can be copied must not be broken."""
    if command.epilog:
        lines = "".join(f"  {line}\n" for line in command.epilog.splitlines())
        formatter.write(f"\nExamples:\n{lines}")


class HelpfulCommand(TyperCommand):
    """A command whose help has its options in named groups, and examples below."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        _write_parameters(self, ctx, formatter)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        _write_examples(self, formatter)


class HelpfulGroup(TyperGroup):
    """A group of commands whose help has them, and its options, in named groups."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write options, examples and commands: programs read the names of commands to the end of the help."""
        _write_parameters(self, ctx, formatter)
        _write_examples(self, formatter)
        self.format_commands(ctx, formatter)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write nothing: the examples stand above the commands."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write every group of commands, with a column of names that is the same width in all of them."""
        names = self.list_commands(ctx)
        width = max(map(len, names))
        texts = {name: self.commands[name].get_short_help_str(formatter.width - 6 - width) for name in names}
        for group, rows in _grouped((self.commands[n], (n.ljust(width), text)) for n, text in texts.items()).items():
            with formatter.section(f"{group} Commands" if group else "Commands"):
                formatter.write_dl(rows)
