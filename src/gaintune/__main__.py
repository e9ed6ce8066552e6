"""`python -m gaintune` is `gaintune`."""

from gaintune.cli.app import main

main()
