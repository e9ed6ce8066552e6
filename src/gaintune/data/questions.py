"""Questions whose answer is one of a few texts: of exams, of sentiment, or prompts with choices of their own.

The papers' sets are known by name; one more is one entry of `QUESTION_SETS`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gaintune.data.documents import Documents, drawn_order, split_documents
from gaintune.data.hub import HubSource, exam_question, load_hub_rows, pubmedqa_contexts
from gaintune.data.labelled import LABEL, LabelledText, glue_labels, read_labelled
from gaintune.data.readers import ROW_SUFFIXES, Row, first_row, read_rows, read_table, row_text, split_files
from gaintune.errors import DataError
from gaintune.progress import plural
from gaintune.storage import write_text

logger = logging.getLogger(__name__)

SENTIMENTS = ("negative", "neutral", "positive")
DECISIONS = ("yes", "no", "maybe")
NAMED_LABELS = {"finphrase": SENTIMENTS}  # names of the labels 0, 1, ... of sets that are not GLUE's
COLUMNS = (
    {"prompt", "choices", "answer"}, {"question", "options", "answer_idx"}, {"question", "context", "final_decision"},
    {LABEL},
)  # fmt: skip
KINDS = "prompt + choices + answer, question + options + answer_idx, PubMedQA's columns, or a text and its label"

QUESTION_SETS = {
    "pubmedqa": HubSource("qiaojin/PubMedQA", configuration="pqa_labeled"),
    "finphrase": HubSource("atrost/financial_phrasebank", validation="test"),
    "sst2": HubSource("stanfordnlp/sst2", validation="validation"),
    "medqa": HubSource("GBaker/MedQA-USMLE-4-options", validation="test"),
}


@dataclass(frozen=True)
class ChoiceRow:
    """A prompt, the texts that may follow it (with the space before them), and the number of the right one."""

    prompt: str
    choices: tuple[str, ...]
    answer: int
    origin: str

    @property
    def completion(self) -> str:
        """The right choice, the completion of an instruction row."""
        return self.choices[self.answer]


def read_choices(name: str, path: Path, *, limit: int | None = None, seed: int = 0) -> tuple[ChoiceRow, ...]:
    """Read a file of rows, or the validation files of a folder, as questions with choices.

    Rows of `question`, `options` (letter -> text) and `answer_idx` list the options and are answered by a letter. Rows
    of `text` (or another column, or a pair, as for classification) and `label` are answered by a label's name, any that
    is in the file or folder; where the names are sentiments the prompt asks for one. Labels that are numbers have no
    name to answer with, except in a set called like one of GLUE's tasks. Rows of `prompt`, `choices` and `answer` (the
    right one's text, or its number from 0) are taken as they are, with a space between them where there is none. Rows
    of PubMedQA (`question`, `context`, `final_decision`) show the abstract, and are answered by yes, no or maybe.
    With a `limit`, so many rows are drawn in an order that the seed decides.

    Raises:
        DataError: a row without the columns above, or with an answer that is none of its choices, by file and line.
    """
    train, validation = split_files(path, ROW_SUFFIXES)
    if path.is_dir() and not validation:
        logger.warning("%s: no validation files; asking %s", path, ", ".join(file.name for file in train))
    rows = [row for file in validation or train for row in read_table(file)]
    others = [row for file in train for row in read_table(file)] if validation and LABEL in rows[0].values else []
    questions = _questions(name, rows, others)
    return questions if limit is None else tuple(questions[n] for n in drawn_order(len(rows), seed, "choices")[:limit])


def load_questions(name: str, path: Path | None, *, learn: bool, seed: int) -> Documents[ChoiceRow]:
    """Load a set of questions: rows to train on (none unless `learn`), and rows to ask as its validation side.

    It comes from a file or folder of rows, as `read_choices` reads them, or without a path from the Hub, where the name
    is one of `QUESTION_SETS`. Rows to ask are never trained on: of a source's own splits the training rows whose prompt
    is asked are left out, with a warning that counts them. Where the source has no split of its own, all rows are
    asked; or, if some are trained on, each row's side is decided by a hash of the seed and its prompt, as texts' are.

    Raises:
        DataError: no such set, rows that are no questions with choices, by file and line, or none left to train on.
        AssetError: a download failed.
    """
    rows = _source(name, path)
    train = _questions(name, rows.train, rows.validation)
    if rows.validation:
        asked = _questions(name, rows.validation, rows.train)
        prompts = {row.prompt for row in asked}
        kept = [row for row in train if row.prompt not in prompts] if learn else []
        if learn and not kept:
            raise DataError(f"{rows.source}: every row to train on is also asked; give other rows to train on")
        if learn and len(kept) < len(train):
            left_out = plural(len(train) - len(kept), "row")
            logger.warning("%s: %s to train on left out, which are asked too", rows.source, left_out)
        return Documents(tuple(kept), asked, rows.source)
    whole = Documents(train, source=rows.source)
    return split_documents(whole, seed, lambda row: row.prompt) if learn else Documents((), train, rows.source)


def holds_questions(path: Path) -> bool:
    """Tell whether a file or folder of rows holds questions with choices, by the first row's columns."""
    try:
        train, validation = split_files(path, ROW_SUFFIXES)
    except DataError:  # a folder of other files
        return False
    columns = set(first_row((validation or train)[0]).values)
    return any(known <= columns for known in COLUMNS)


def write_instruction_rows(rows: Sequence[ChoiceRow], file: Path) -> None:
    """Write the questions with their right answers as a .jsonl file of `prompt` and `completion`.

    Adapting to it with task instruct, template plain and `data.end_of_text` false trains on the answer's tokens alone:
    a classification loss over the vocabulary. Otherwise the end-of-text token after the answer is trained on as well.
    """
    _write_rows([{"prompt": row.prompt, "completion": row.completion} for row in rows], file)


def write_choice_rows(rows: Sequence[ChoiceRow], file: Path) -> None:
    """Write the questions as a .jsonl file of `prompt`, `choices` and `answer`, which `read_choices` reads back."""
    _write_rows([{"prompt": row.prompt, "choices": row.choices, "answer": row.answer} for row in rows], file)


def _write_rows(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    write_text(file, "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows))


def _source(name: str, path: Path | None) -> Documents[Row]:
    if path is not None:
        if path.is_file() and path.suffix.lower() not in ROW_SUFFIXES:
            raise DataError(f"{path}: a file of questions ends in one of {', '.join(ROW_SUFFIXES)}")
        return read_rows(path)
    if name not in QUESTION_SETS:
        known = ", ".join(QUESTION_SETS)
        raise DataError(f"no set of questions is called {name!r}; known by name: {known}. Or give a file or folder")
    return load_hub_rows(QUESTION_SETS[name], name, "questions")


def _questions(name: str, rows: Sequence[Row], others: Sequence[Row] = ()) -> tuple[ChoiceRow, ...]:
    """Read rows as questions, by the columns of the first one; `others` may have more labels."""
    columns = set(rows[0].values)
    for known, read in zip(COLUMNS, (_given, _exam, _research), strict=False):
        if known <= columns:
            return tuple(map(read, rows))
    if LABEL in columns:
        names = NAMED_LABELS.get(name) or glue_labels(name)
        return tuple(_labelled(read_labelled([*rows, *others], names))[: len(rows)])
    raise DataError(f"{rows[0].origin}: not a question with choices ({KINDS}); its columns are {', '.join(columns)}")


def _given(row: Row) -> ChoiceRow:
    choices, answer = row.values.get("choices"), row.values.get("answer")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(text, str) and text for text in choices):
        raise DataError(f"{row.origin}: column 'choices' must be a list of two texts at least")
    if isinstance(answer, str) and answer in choices:
        answer = choices.index(answer)
    prompt = row_text(row, "prompt")
    spaced = [choice if prompt[-1].isspace() or choice[0].isspace() else f" {choice}" for choice in choices]
    return _checked(row, prompt, spaced, answer)


def _exam(row: Row) -> ChoiceRow:
    options, letter = row.values.get("options"), row.values.get("answer_idx")
    if not isinstance(options, dict) or len(options) < 2:
        raise DataError(f"{row.origin}: column 'options' must map two letters at least to texts")
    letters = sorted(options)
    prompt = f"{exam_question(row_text(row, 'question'), options)}\nAnswer:"
    answer = letters.index(letter) if letter in letters else letter
    return _checked(row, prompt, [f" {letter}" for letter in letters], answer)


def _research(row: Row) -> ChoiceRow:
    context, decision = row.values.get("context"), row.values.get("final_decision")
    if not isinstance(context, dict) or not {"contexts", "labels"} <= set(context):
        raise DataError(f"{row.origin}: column 'context' must hold PubMedQA's contexts and labels")
    parts, labels = context["contexts"], context["labels"]
    if not all(isinstance(side, list) and all(isinstance(text, str) for text in side) for side in (parts, labels)):
        raise DataError(f"{row.origin}: contexts and labels in column 'context' must be lists of texts")
    if len(parts) != len(labels):
        raise DataError(f"{row.origin}: column 'context' has {len(parts)} contexts and {len(labels)} labels")
    (abstract,) = pubmedqa_contexts([row.values])
    prompt = f"{abstract}\nQuestion: {row_text(row, 'question')}\nAnswer:"
    answer = DECISIONS.index(decision) if decision in DECISIONS else decision
    return _checked(row, prompt, [f" {word}" for word in DECISIONS], answer)


def _labelled(texts: Sequence[LabelledText]) -> list[ChoiceRow]:
    for text in texts:
        if text.label.isdecimal():
            raise DataError(f"{text.origin}: the label is {text.label}, which is no word to answer with; give names")
    labels = sorted({text.label for text in texts})
    if len(labels) < 2:
        raise DataError(f"{texts[0].origin}: every row has the label {labels[0]!r}, so there is nothing to choose")
    question = "Sentiment" if set(labels) <= set(SENTIMENTS) else "Label"
    choices = tuple(f" {label}" for label in labels)
    questions = []
    for text in texts:
        lines = [part.rstrip() for part in (text.text_a, text.text_b) if part is not None]
        prompt = "\n".join([*lines, f"{question}:"])
        questions.append(ChoiceRow(prompt, choices, labels.index(text.label), text.origin))
    return questions


def _checked(row: Row, prompt: str, choices: Sequence[str], answer: object) -> ChoiceRow:
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise DataError(f"{row.origin}: the answer {answer!r} is none of the {len(choices)} choices; correct the row")
    return ChoiceRow(prompt, tuple(choices), answer, row.origin)
