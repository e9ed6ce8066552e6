"""Where a run of a recipe finds rows with labels, and questions with choices, among its local copies."""

from __future__ import annotations

from pathlib import Path

from gaintune.data.question_sets import holds_questions
from gaintune.data.tables import ROW_SUFFIXES
from gaintune.recipes.world import World

LABELLED = ("glue", ".", "domains")
QUESTIONS = ("questions", "benchmarks", ".", "domains", "glue")


def labelled_rows(world: World, task: str) -> str | None:
    """The source of a classification task: its local copy, at scale paper else its name on the Hub; None for none."""
    local = next(iter(_places(world, task, LABELLED)), None)
    return str(local) if local is not None else task if world.scale == "paper" else None


def questions(world: World, name: str) -> Path | None:
    """The local copy of a set of questions: the first file or folder of its name that holds questions."""
    return next(filter(holds_questions, _places(world, name, QUESTIONS)), None)


def _places(world: World, name: str, folders: tuple[str, ...]) -> list[Path]:
    if world.data is None:
        return []
    names = (name, *(f"{name}{suffix}" for suffix in ROW_SUFFIXES))
    found = [world.data / folder / each for folder in folders for each in names]
    return [place for place in found if place.exists()]
