"""Questions whose answer is one of a few texts: exam questions, sentiment, or prompts with choices of their own."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gaintune.data.hub import exam_question, pubmedqa_contexts
from gaintune.data.labelled import LABEL, LabelledText, glue_labels, read_labelled
from gaintune.data.readers import split_files
from gaintune.data.split import drawn_order
from gaintune.data.tables import ROW_SUFFIXES, Row, read_table, row_text
from gaintune.errors import DataError
from gaintune.storage import write_text

logger = logging.getLogger(__name__)

SENTIMENTS = ("negative", "neutral", "positive")
DECISIONS = ("yes", "no", "maybe")
NAMED_LABELS = {"finphrase": SENTIMENTS}
"""What the labels 0, 1, ... of a set of this name are called; GLUE's tasks are named in `data.labelled`."""
COLUMNS = (
    {"prompt", "choices", "answer"},
    {"question", "options", "answer_idx"},
    {"question", "context", "final_decision"},
    {LABEL},
)
KINDS = "prompt + choices + answer, question + options + answer_idx, PubMedQA's columns, or a text and its label"


@dataclass(frozen=True)
class ChoiceRow:
    """A prompt, the texts that may follow it (with the space before them), and the number of the right one."""

    prompt: str
    choices: tuple[str, ...]
    answer: int
    origin: str

    @property
    def completion(self) -> str:
        """The right choice: what is trained on, as the completion of an instruction row."""
        return self.choices[self.answer]


def read_choices(name: str, path: Path, *, limit: int | None = None, seed: int = 0) -> tuple[ChoiceRow, ...]:
    """Read a file of rows, or the validation files of a folder, as questions with choices.

    Rows of `question`, `options` (letter -> text) and `answer_idx` list the options and are answered by a letter. Rows
    of `text` (or another column, or a pair, as for classification) and `label` are answered by a label's name, any that
    is in the file or folder; where the names are sentiments the prompt asks for one. Labels that are numbers have no
    name to answer with, except in a set called like one of GLUE's tasks. Rows of `prompt`, `choices` and `answer` (the
    right one's text, or its number from 0) are taken as they are, with a space between them where there is none. Rows
    of PubMedQA (`question`, `context`, `final_decision`) show the abstract, and are answered by yes, no or maybe.

    Args:
        name: what the set is called.
        path: file or folder.
        limit: rows to use, drawn in an order that the seed decides; all unless given.
        seed: of that order.

    Raises:
        DataError: a row without the columns above, or with an answer that is none of its choices, by file and line.
    """
    train, validation = split_files(path, ROW_SUFFIXES)
    if path.is_dir() and not validation:
        logger.warning("%s: no validation files; asked is %s", path, ", ".join(each.name for each in train))
    rows = [row for file in validation or train for row in read_table(file)]
    others = [row for file in train for row in read_table(file)] if validation and LABEL in rows[0].values else []
    questions = questions_of(name, rows, others)
    order = drawn_order(len(rows), seed, "choices") if limit is not None else range(len(rows))
    return tuple(questions[index] for index in list(order)[:limit])


def write_instruction_rows(rows: Sequence[ChoiceRow], file: Path) -> None:
    """Write the questions with their right answers as a .jsonl file of `prompt` and `completion`.

    Adapting to it with task instruct, template plain and `data.end_of_text` false trains on the answer's tokens alone:
    a classification loss over the vocabulary. Otherwise the end-of-text token after the answer is learnt as well.
    """
    lines = [json.dumps({"prompt": row.prompt, "completion": row.completion}, ensure_ascii=False) for row in rows]
    write_text(file, "".join(f"{line}\n" for line in lines))


def write_choice_rows(rows: Sequence[ChoiceRow], file: Path) -> None:
    """Write the questions as a .jsonl file of `prompt`, `choices` and `answer`, which `read_choices` reads back."""
    values = [{"prompt": row.prompt, "choices": row.choices, "answer": row.answer} for row in rows]
    write_text(file, "".join(f"{json.dumps(each, ensure_ascii=False)}\n" for each in values))


def are_questions(rows: Sequence[Row]) -> bool:
    """Whether the first of some rows has the columns of a question with choices."""
    return any(columns <= set(rows[0].values) for columns in COLUMNS)


def questions_of(name: str, rows: Sequence[Row], others: Sequence[Row] = ()) -> tuple[ChoiceRow, ...]:
    """The rows of a set as questions, by the columns of the first one; `others` may have more labels.

    Raises:
        DataError: as `read_choices`.
    """
    given, exam, research, labelled = COLUMNS
    columns = set(rows[0].values)
    if given <= columns:
        return tuple(_given(row) for row in rows)
    if exam <= columns:
        return tuple(_exam(row) for row in rows)
    if research <= columns:
        return tuple(_research(row) for row in rows)
    if labelled <= columns:
        names = NAMED_LABELS.get(name) or glue_labels(name)
        return tuple(_labelled(read_labelled([*rows, *others], names))[: len(rows)])
    raise DataError(f"{rows[0].origin}: not a question with choices ({KINDS}); its columns are {', '.join(columns)}")


def _given(row: Row) -> ChoiceRow:
    choices, answer = row.values.get("choices"), row.values.get("answer")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(each, str) and each for each in choices):
        raise DataError(f"{row.origin}: column 'choices' must be a list of two texts at least")
    if isinstance(answer, str) and answer in choices:
        answer = choices.index(answer)
    prompt = row_text(row, "prompt")
    return _checked(row, prompt, [each if prompt[-1].isspace() else _spaced(each) for each in choices], answer)


def _exam(row: Row) -> ChoiceRow:
    options, letter = row.values.get("options"), row.values.get("answer_idx")
    if not isinstance(options, dict) or len(options) < 2:
        raise DataError(f"{row.origin}: column 'options' must map two letters at least to texts")
    letters = sorted(options)
    prompt = f"{exam_question(row_text(row, 'question'), options)}\nAnswer:"
    answer = letters.index(letter) if letter in letters else letter
    return _checked(row, prompt, [f" {each}" for each in letters], answer)


def _research(row: Row) -> ChoiceRow:
    context, decision = row.values.get("context"), row.values.get("final_decision")
    if not isinstance(context, dict) or not {"contexts", "labels"} <= set(context):
        raise DataError(f"{row.origin}: column 'context' must hold PubMedQA's contexts and labels")
    parts, labels = context["contexts"], context["labels"]
    if not all(isinstance(each, list) and all(isinstance(text, str) for text in each) for each in (parts, labels)):
        raise DataError(f"{row.origin}: contexts and labels in column 'context' must be lists of texts")
    if len(parts) != len(labels):
        raise DataError(f"{row.origin}: column 'context' has {len(parts)} contexts and {len(labels)} labels")
    (abstract,) = pubmedqa_contexts([row.values])
    prompt = f"{abstract}\nQuestion: {row_text(row, 'question')}\nAnswer:"
    answer = DECISIONS.index(decision) if decision in DECISIONS else decision
    return _checked(row, prompt, [f" {each}" for each in DECISIONS], answer)


def _labelled(texts: Sequence[LabelledText]) -> list[ChoiceRow]:
    for text in texts:
        if text.label.isdecimal():
            raise DataError(f"{text.origin}: the label is {text.label}, which is no word to answer with; give names")
    labels = sorted({text.label for text in texts})
    if len(labels) < 2:
        raise DataError(f"{texts[0].origin}: every row has the label {labels[0]!r}, so there is nothing to choose")
    asked = "Sentiment" if set(labels) <= set(SENTIMENTS) else "Label"
    choices = tuple(f" {label}" for label in labels)
    questions = []
    for text in texts:
        lines = [each.rstrip() for each in (text.text_a, text.text_b) if each is not None]
        prompt = "\n".join([*lines, f"{asked}:"])
        questions.append(ChoiceRow(prompt, choices, labels.index(text.label), text.origin))
    return questions


def _spaced(choice: str) -> str:
    return choice if choice[0].isspace() else f" {choice}"


def _checked(row: Row, prompt: str, choices: Sequence[str], answer: object) -> ChoiceRow:
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise DataError(f"{row.origin}: the answer {answer!r} is none of the {len(choices)} choices; correct the row")
    return ChoiceRow(prompt, tuple(choices), answer, row.origin)
