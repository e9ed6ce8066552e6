"""Where a run of a recipe finds rows with labels, and questions with choices, among its local copies."""

from __future__ import annotations

from pathlib import Path

from gaintune.data.question_sets import holds_questions
from gaintune.data.tables import ROW_SUFFIXES
from gaintune.recipes.world import World
from gaintune.storage.run import sha256_file

LABELLED = ("glue", ".", "domains")
QUESTIONS = ("questions", "benchmarks", ".", "domains", "glue")


def labelled_rows(world: World, task: str) -> str | None:
    """The source of a classification task: its local copy, at scale paper else its name on the Hub; None for none."""
    local = next(iter(world.local(task, LABELLED, ROW_SUFFIXES)), None)
    return str(local) if local is not None else task if world.scale == "paper" else None


def content_of(place: Path) -> dict[str, str]:
    """A hash of every file of a local copy, by its place inside."""
    files = [place] if place.is_file() else [file for file in sorted(place.rglob("*")) if file.is_file()]
    return {file.relative_to(place).as_posix(): sha256_file(file) for file in files}


def questions(world: World, name: str) -> Path | None:
    """The local copy of a set of questions: the first file or folder of its name that holds questions."""
    return next(filter(holds_questions, world.local(name, QUESTIONS, ROW_SUFFIXES)), None)
