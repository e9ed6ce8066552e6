"""The command line: arguments become a plan, the library does the work, tables and paths come back.

Nothing else imports it. A file holds a group of commands; the head of `options.py` says how to add a command or option.
"""

from gaintune.cli.app import app, main

__all__ = ["app", "main"]
