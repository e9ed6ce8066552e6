"""The papers' sets of questions, from the Hub or local copies: rows to learn, and rows to ask that are none of them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from gaintune.data.choices import ChoiceRow, are_questions, questions_of
from gaintune.data.documents import Documents
from gaintune.data.hub import unreachable
from gaintune.data.readers import split_files
from gaintune.data.split import split_documents
from gaintune.data.tables import ROW_SUFFIXES, Row, first_row, read_table
from gaintune.errors import DataError
from gaintune.progress import plural

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class QuestionSet:
    """A set on the Hub (or in a local folder of the same layout); `asked` is None where it has one split alone."""

    path: str
    train: str = "train"
    asked: str | None = None
    configuration: str | None = None


QUESTION_SETS = {
    "pubmedqa": QuestionSet("qiaojin/PubMedQA", configuration="pqa_labeled"),
    "finphrase": QuestionSet("atrost/financial_phrasebank", asked="test"),
    "sst2": QuestionSet("stanfordnlp/sst2", asked="validation"),
    "medqa": QuestionSet("GBaker/MedQA-USMLE-4-options", asked="test"),
}


@dataclass(frozen=True)
class Questions:
    """One set on its sides; `learnt` is empty where its rows are all asked."""

    learnt: tuple[ChoiceRow, ...]
    asked: tuple[ChoiceRow, ...]
    source: str


def holds_questions(path: Path) -> bool:
    """Whether a file or folder of rows holds questions with choices, by the first row's columns."""
    try:
        train, validation = split_files(path, ROW_SUFFIXES)
    except DataError:  # a folder of other files
        return False
    return are_questions([first_row((validation or train)[0])])


def load_questions(name: str, path: Path | None, *, learn: bool, seed: int) -> Questions:
    """Load a set, from a file or folder of rows as `read_choices` reads them, or from the Hub.

    Rows of the side to ask are never on the side to learn: of a source's own splits the rows to learn whose prompt is
    asked are left out, with a warning that counts them. Where the source has no split of its own, all rows are asked;
    or, if some are to be learnt, each row's side is decided by a hash of the seed and its prompt, as texts' are.

    Args:
        name: what the set is called; on the Hub one of `QUESTION_SETS`.
        path: file or folder; the Hub unless given.
        learn: whether rows are to be learnt.
        seed: of the split.

    Raises:
        DataError: no such set, rows that are no questions with choices, by file and line, or none left to learn.
        AssetError: a download failed.
    """
    train, held_out, source = _local(path) if path is not None else _hub(name)
    rows = questions_of(name, train, held_out)
    if held_out:
        asked = questions_of(name, held_out, train)
        return Questions(_without(rows, asked, source) if learn else (), asked, source)
    if not learn:
        return Questions((), rows, source)
    split = split_documents(Documents(rows, source=source), seed, lambda row: row.prompt)
    return Questions(tuple(split.train), tuple(split.validation or ()), source)


def _without(rows: Sequence[ChoiceRow], asked: Sequence[ChoiceRow], source: str) -> tuple[ChoiceRow, ...]:
    """The rows to learn that are not asked."""
    prompts = {row.prompt for row in asked}
    kept = tuple(row for row in rows if row.prompt not in prompts)
    if not kept:
        raise DataError(f"{source}: every row to learn is also asked; give other rows to learn")
    if left_out := len(rows) - len(kept):
        logger.warning("%s: %s to learn left out, which are asked too", source, plural(left_out, "row"))
    return kept


def _local(path: Path) -> tuple[list[Row], list[Row], str]:
    if path.is_file() and path.suffix.lower() not in ROW_SUFFIXES:
        raise DataError(f"{path}: a file of questions ends in one of {', '.join(ROW_SUFFIXES)}")
    train, held_out = ([row for file in side for row in read_table(file)] for side in split_files(path, ROW_SUFFIXES))
    return train, held_out, str(path)


def _hub(name: str) -> tuple[list[Row], list[Row], str]:
    if name not in QUESTION_SETS:
        known = ", ".join(QUESTION_SETS)
        raise DataError(f"no set of questions is called {name!r}; known by name: {known}. Or give a file or folder")
    found = QUESTION_SETS[name]
    try:
        train = _rows(found, found.train)
        held_out = _rows(found, found.asked) if found.asked else []
    except Exception as error:  # the hub client raises errors of many unrelated kinds
        raise unreachable(error, name, found.path, "questions") from error
    return train, held_out, found.path


def _rows(source: QuestionSet, split: str) -> list[Row]:
    from datasets import load_dataset  # slow to import, and only these sets need it

    rows = cast(Iterable[Mapping[str, Any]], load_dataset(source.path, source.configuration, split=split))
    found = [Row(dict(values), f"{source.path} {split}: row {number}") for number, values in enumerate(rows, start=1)]
    if not found:
        raise ValueError(f"its split {split!r} holds no row")
    return found
