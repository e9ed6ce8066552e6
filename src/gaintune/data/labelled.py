"""Rows with a label: which columns hold a text, or a pair of texts, and its label, in local files and on the Hub.

One more task of GLUE that is known by name is one entry of `GLUE`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import attrgetter

from gaintune.config import DomainConfig
from gaintune.data.documents import Documents, split_documents
from gaintune.data.hub import HubSource, load_hub_rows
from gaintune.data.readers import Row, local_path, read_rows, row_text, value_of
from gaintune.errors import DataError

PAIRS = (
    ("text_a", "text_b"), ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question", "sentence"),
    ("question1", "question2"),
)  # fmt: skip
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


def _glue(name: str, *labels: str, validation: str = "validation") -> HubSource:
    return HubSource("nyu-mll/glue", validation=validation, configuration=name, labels=labels)


GLUE = {
    "cola": _glue("cola", "unacceptable", "acceptable"),
    "mnli": _glue("mnli", "entailment", "neutral", "contradiction", validation="validation_matched"),
    "mrpc": _glue("mrpc", "not_equivalent", "equivalent"),
    "qnli": _glue("qnli", "entailment", "not_entailment"),
    "sst2": _glue("sst2", "negative", "positive"),
}


def load_labelled(domain: DomainConfig, seed: int) -> Documents[LabelledText]:
    """Read the rows of a domain, on their sides: one of GLUE's tasks by name, else a local file or folder of rows.

    The texts are in the columns of `PAIRS` or `SINGLES` (the first that are there; a second text that is null in every
    row is none), or in the domain's own `text_column`; the label is in `label`. Files without a validation split are
    split by a hash of the text, as texts are. A domain with the name of one of GLUE's tasks has that task's labels in
    place of their numbers. A DataError names an unknown domain, or the file and line of a row without text or label; an
    AssetError a failed download.
    """
    if domain.source in GLUE:
        if domain.text_column is not None:
            raise DataError(f"domain {domain.name!r}: text_column is for local files; {domain.source!r} has its own")
        rows, labels = load_hub_rows(GLUE[domain.source], domain.source, "domain"), GLUE[domain.source].labels
    else:
        path = local_path(domain.source)
        if path is None:
            raise DataError(
                f"domain {domain.name!r}: {domain.source} is no file or folder, and none of GLUE's tasks known by "
                f"name: {', '.join(GLUE)}"
            )
        rows, labels = read_rows(path), glue_labels(domain.name)
    texts = read_labelled([*rows.train, *rows.validation], labels, domain.text_column)
    if not rows.validation:
        return split_documents(Documents(texts, source=rows.source), seed, attrgetter("whole"))
    return Documents(texts[: len(rows.train)], texts[len(rows.train) :], rows.source)


def glue_labels(name: str) -> tuple[str, ...]:
    """Return the names of the labels 0, 1, ... of a set with this name; nothing where it is none of GLUE's tasks."""
    return GLUE[name].labels if name in GLUE else ()


def read_labelled(
    rows: Sequence[Row], labels: Sequence[str] = (), text_column: str | None = None
) -> tuple[LabelledText, ...]:
    """Return the texts and labels of rows, or a DataError with file and line of a row that lacks one.

    Labels that are all numbers of `labels` get their names.
    """
    columns = _find_columns(rows, text_column)
    texts = tuple(_labelled(row, columns) for row in rows)
    names = {str(number): label for number, label in enumerate(labels)}
    named = all(text.label in names for text in texts)
    return tuple(replace(text, label=names[text.label]) for text in texts) if named else texts


def _find_columns(rows: Sequence[Row], text_column: str | None) -> tuple[str, ...]:
    """Return the one or two columns that hold the texts of all rows."""
    if text_column is not None:
        return (text_column,)
    first = rows[0]
    for pair in PAIRS:
        if set(pair) <= set(first.values):
            return pair if any(row.values.get(pair[1]) not in (None, "") for row in rows) else pair[:1]
    if single := next((name for name in SINGLES if name in first.values), None):
        return (single,)
    known = ", ".join([*SINGLES, *(" + ".join(pair) for pair in PAIRS)])
    raise DataError(
        f"{first.origin}: no column holds the text to classify; name it one of {known}, or name the column with "
        f"--text-column, or text_column in a plan (the columns are {first.columns})"
    )


def _labelled(row: Row, columns: Sequence[str]) -> LabelledText:
    """Read the texts of a row and its label: a name, or a whole number from 0."""
    text_a, *second = (row_text(row, column) for column in columns)
    value = value_of(row, LABEL)
    label = str(value).strip() if isinstance(value, str | int) else ""
    if label.startswith("-") and label[1:].isdecimal():
        raise DataError(
            f"{row.origin}: the label is {label}, which data sets give to rows without one; delete the row, or name "
            "the labels in words"
        )
    if not label:
        raise DataError(f"{row.origin}: the label is {value!r}, expected a name or a whole number; correct or drop it")
    return LabelledText(text_a, second[0] if second else None, label, row.origin)
