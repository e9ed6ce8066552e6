"""Questions whose answer is one of a few texts: exam questions, sentiment, or prompts with choices of their own."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gaintune.data.readers import split_files
from gaintune.data.split import drawn_order
from gaintune.data.tables import ROW_SUFFIXES, Row, read_table, row_text
from gaintune.errors import DataError
from gaintune.runs import write_text

SENTIMENTS = ("negative", "neutral", "positive")
NUMBERED = {"sst2": {"0": "negative", "1": "positive"}}  # data sets known to number what others name
KINDS = "prompt + choices + answer, question + options + answer_idx, or text + label"


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
    of `text` and `label` are answered by a label's name, any that is in the file; where the names are sentiments the
    prompt asks for one. Labels that are numbers have no name to answer with, except in `sst2`. Rows of `prompt`,
    `choices` and `answer` (the right one's text, or its number from 0) are taken as they are.

    Args:
        name: what the set is called.
        path: file or folder.
        limit: rows to use, drawn in an order that the seed decides; all unless given.
        seed: of that order.

    Raises:
        DataError: a row without the columns above, or with an answer that is none of its choices, by file and line.
    """
    train, validation = split_files(path, ROW_SUFFIXES)
    rows = [row for file in validation or train for row in read_table(file)]
    made = _renderer(name, rows)
    order = drawn_order(len(rows), seed, "choices") if limit is not None else range(len(rows))
    return tuple(made(rows[index]) for index in list(order)[:limit])


def write_instruction_rows(rows: Sequence[ChoiceRow], file: Path) -> None:
    """Write the questions with their right answers as a .jsonl file of `prompt` and `completion`.

    Adapting to it with task instruct and template plain trains on the answer's tokens alone: a classification loss over
    the vocabulary.
    """
    lines = [json.dumps({"prompt": row.prompt, "completion": row.completion}, ensure_ascii=False) for row in rows]
    write_text(file, "".join(f"{line}\n" for line in lines))


def _renderer(name: str, rows: Sequence[Row]) -> Callable[[Row], ChoiceRow]:
    """How the rows of a set become questions, by the columns of the first one."""
    columns = set(rows[0].values)
    if {"prompt", "choices", "answer"} <= columns:
        return _given
    if {"question", "options", "answer_idx"} <= columns:
        return _exam
    if {"text", "label"} <= columns:
        return _labelled(name, rows)
    raise DataError(f"{rows[0].origin}: not a question with choices ({KINDS}); its columns are {', '.join(columns)}")


def _given(row: Row) -> ChoiceRow:
    choices, answer = row.values.get("choices"), row.values.get("answer")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(each, str) and each for each in choices):
        raise DataError(f"{row.origin}: column 'choices' must be a list of two texts at least")
    if isinstance(answer, str) and answer in choices:
        answer = choices.index(answer)
    return _checked(row, row_text(row, "prompt"), [_spaced(each) for each in choices], answer)


def _exam(row: Row) -> ChoiceRow:
    options, letter = row.values.get("options"), row.values.get("answer_idx")
    if not isinstance(options, dict) or len(options) < 2:
        raise DataError(f"{row.origin}: column 'options' must map two letters at least to texts")
    letters = sorted(options)
    listed = [f"{each}. {options[each]}" for each in letters]
    prompt = "\n".join([row_text(row, "question"), *listed, "Answer:"])
    answer = letters.index(letter) if letter in letters else letter
    return _checked(row, prompt, [f" {each}" for each in letters], answer)


def _labelled(name: str, rows: Sequence[Row]) -> Callable[[Row], ChoiceRow]:
    numbered = NUMBERED.get(name, {})

    def named(row: Row) -> str:
        label = str(row.values.get("label", "")).strip()
        label = numbered.get(label, label)
        if not label or label.lstrip("-").isdecimal() or row.values.get("label") is None:
            raise DataError(
                f"{row.origin}: the label is {row.values.get('label')!r}, which is no word to answer with; give names"
            )
        return label

    labels = sorted({named(row) for row in rows})
    if len(labels) < 2:
        raise DataError(f"{rows[0].origin}: every row has the label {labels[0]!r}, so there is nothing to choose")
    asked = "Sentiment" if set(labels) <= set(SENTIMENTS) else "Label"

    def render(row: Row) -> ChoiceRow:
        prompt = f"{row_text(row, 'text').rstrip()}\n{asked}:"
        return _checked(row, prompt, [f" {each}" for each in labels], labels.index(named(row)))

    return render


def _spaced(choice: str) -> str:
    return choice if choice[0].isspace() else f" {choice}"


def _checked(row: Row, prompt: str, choices: Sequence[str], answer: object) -> ChoiceRow:
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise DataError(f"{row.origin}: the answer {answer!r} is none of the {len(choices)} choices; correct the row")
    return ChoiceRow(prompt, tuple(choices), answer, row.origin)
