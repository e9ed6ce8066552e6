"""`python -m gaintune` is `gaintune`."""

from gaintune.cli.main import main

main()
