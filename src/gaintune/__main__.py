"""`python -m gaintune` is `gaintune`."""

from gaintune.cli import main

main()
