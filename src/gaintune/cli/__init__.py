"""The command line: arguments become a plan, the library does the work, tables and paths come back."""

from gaintune.cli.app import app, main

__all__ = ["app", "main"]
