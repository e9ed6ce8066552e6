"""Rows with a label: which columns hold a text, or a pair of texts, and its label, in local files and on the Hub."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from gaintune.config import DomainConfig
from gaintune.data.documents import Document, Documents
from gaintune.data.hub import unreachable
from gaintune.data.readers import local_path, split_files
from gaintune.data.split import split_documents
from gaintune.data.tables import ROW_SUFFIXES, Row, read_table, row_text
from gaintune.errors import DataError

logger = logging.getLogger(__name__)

PAIRS = (
    ("text_a", "text_b"),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("question1", "question2"),
)
SINGLES = ("text_a", "sentence", "text", "content")
LABEL = "label"
BETWEEN = "\x1f"  # joins a pair where the two are compared as one text


@dataclass(frozen=True)
class LabelledText:
    """A text, or a pair of texts, with its label as it is written; `origin` is its file and line."""

    text_a: str
    text_b: str | None
    label: str
    origin: str

    @property
    def whole(self) -> str:
        """Both texts as one, to compare rows with."""
        return self.text_a if self.text_b is None else f"{self.text_a}{BETWEEN}{self.text_b}"


@dataclass(frozen=True)
class LabelledTexts:
    """The rows of one domain, on their sides."""

    train: tuple[LabelledText, ...]
    validation: tuple[LabelledText, ...]
    source: str


@dataclass(frozen=True)
class GlueTask:
    """One task of GLUE on the Hub (or in a local folder of the same layout): its configuration and validation split.

    `labels` are the names of its labels 0, 1, ...
    """

    configuration: str | None
    labels: tuple[str, ...]
    validation: str = "validation"
    path: str = "nyu-mll/glue"


GLUE = {
    "cola": GlueTask("cola", ("unacceptable", "acceptable")),
    "mnli": GlueTask("mnli", ("entailment", "neutral", "contradiction"), "validation_matched"),
    "mrpc": GlueTask("mrpc", ("not_equivalent", "equivalent")),
    "qnli": GlueTask("qnli", ("entailment", "not_entailment")),
    "sst2": GlueTask("sst2", ("negative", "positive")),
}


def load_labelled(domain: DomainConfig, seed: int) -> LabelledTexts:
    """Read the rows of a domain: one of GLUE's tasks by name, else a local file or folder of rows.

    The texts are in the columns of `PAIRS` or `SINGLES` (the first that are there; a second text that is null in every
    row is none), or in the domain's own `text_column`; the label is in `label`. Files without a validation split are
    split by a hash of the text, as texts are. A domain that is called like one of GLUE's tasks has that task's labels
    in place of their numbers.

    Raises:
        DataError: no such domain or file, or a row without text or label, with its file and line.
        AssetError: a download failed.
    """
    if domain.source in GLUE:
        if domain.text_column is not None:
            raise DataError(f"domain {domain.name!r}: text_column is for local files; {domain.source!r} has its own")
        return load_glue(GLUE[domain.source], domain.source)
    path = local_path(domain.source)
    if path is None:
        raise DataError(
            f"domain {domain.name!r}: {domain.source} is no file or folder, and none of GLUE's tasks known by name: "
            f"{', '.join(GLUE)}"
        )
    files = split_files(path, ROW_SUFFIXES)
    train, validation = ([row for file in side for row in read_table(file)] for side in files)
    texts = read_labelled([*train, *validation], glue_labels(domain.name), domain.text_column)
    if validation:
        return LabelledTexts(texts[: len(train)], texts[len(train) :], str(path))
    return _split(texts, str(path), seed)


def glue_labels(name: str) -> tuple[str, ...]:
    """What the labels 0, 1, ... of a set of this name are called; nothing where it is none of GLUE's tasks."""
    return GLUE[name].labels if name in GLUE else ()


def read_labelled(
    rows: Sequence[Row], labels: Sequence[str] = (), text_column: str | None = None
) -> tuple[LabelledText, ...]:
    """The texts and labels of rows; where all labels are numbers below that of `labels`, they get those names.

    Raises:
        DataError: no column holds a text, or a row has no text or no label, with its file and line.
    """
    columns = _find_columns(rows, text_column)
    texts = tuple(_labelled(row, columns) for row in rows)
    names = {str(number): label for number, label in enumerate(labels)}
    if not all(text.label in names for text in texts):
        return texts
    return tuple(replace(text, label=names[text.label]) for text in texts)


def load_glue(task: GlueTask, name: str) -> LabelledTexts:
    """Read a task of GLUE; its labels are numbers there, and get their names.

    Raises:
        AssetError: the data set cannot be reached or has changed; names the id and how to give a local copy.
    """
    try:
        train, validation = (_hub_rows(task, split) for split in ("train", task.validation))
    except Exception as error:  # the hub client raises errors of many unrelated kinds
        raise unreachable(error, name, task.path) from error
    texts = read_labelled([*train, *validation], task.labels)
    return LabelledTexts(texts[: len(train)], texts[len(train) :], task.path)


def _hub_rows(task: GlueTask, split: str) -> list[Row]:
    from datasets import load_dataset  # slow to import, and only these domains need it

    rows = cast(Any, load_dataset(task.path, task.configuration, split=split))
    found = [Row(values, f"{task.path} {split}: row {number}") for number, values in enumerate(rows, start=1)]
    if not found:
        raise ValueError(f"its split {split!r} holds no row")
    return found


def _absent(value: Any) -> bool:
    return value is None or value == ""


def _find_columns(rows: Sequence[Row], text_column: str | None) -> tuple[str, ...]:
    """The one or two columns that hold the texts of all rows."""
    if text_column is not None:
        return (text_column,)
    first = rows[0]
    for pair in PAIRS:
        if set(pair) <= set(first.values):
            return pair if any(not _absent(row.values.get(pair[1])) for row in rows) else pair[:1]
    for single in SINGLES:
        if single in first.values:
            return (single,)
    known = ", ".join([*SINGLES, *(" + ".join(pair) for pair in PAIRS)])
    raise DataError(
        f"{first.origin}: no column holds the text to classify; name it one of {known}, or name the column with "
        f"--text-column, or text_column in a plan (the columns are {', '.join(first.values) or 'none at all'})"
    )


def _labelled(row: Row, columns: Sequence[str]) -> LabelledText:
    text_a, text_b = (*(row_text(row, column) for column in columns), None)[:2]
    return LabelledText(cast(str, text_a), text_b, _label(row), row.origin)


def _label(row: Row) -> str:
    """A label as text: a name, or a whole number from 0."""
    if LABEL not in row.values:
        columns = ", ".join(row.values) or "none at all"
        raise DataError(f"{row.origin}: has no column {LABEL!r}; the columns are {columns}")
    value = row.values[LABEL]
    label = str(value).strip() if isinstance(value, str | int) else ""
    if label.startswith("-") and label[1:].isdecimal():
        raise DataError(
            f"{row.origin}: the label is {label}, which data sets give to rows without one; delete the row, or name "
            "the labels in words"
        )
    if not label:
        raise DataError(
            f"{row.origin}: the label is {value!r}, expected a name or a whole number; correct or delete it"
        )
    return label


def _split(texts: Sequence[LabelledText], source: str, seed: int) -> LabelledTexts:
    """Give each row its side as documents get theirs: by a hash of the seed and its text."""
    documents = Documents(tuple(Document(row.whole, str(number)) for number, row in enumerate(texts)), source=source)
    split = split_documents(documents, seed)
    return LabelledTexts(tuple(_back(split.train, texts)), tuple(_back(split.validation or (), texts)), source)


def _back(documents: Sequence[Document], texts: Sequence[LabelledText]) -> Iterator[LabelledText]:
    """The rows that documents stand for; a document's origin is its row's number."""
    return (texts[int(document.origin)] for document in documents)
