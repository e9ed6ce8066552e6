"""How rows are written down: the Hub's own columns, or a question with choices, turned into the Hub's without loss.

lm-eval's task files render prompts from the Hub's columns. Rows that hold the rendered question instead are taken apart
again, so that the same task file renders the same prompt from them; a row that cannot be is an error with its place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from gaintune.data import Row
from gaintune.errors import DataError

LETTERS = "ABCDEFGHIJ"
NORMALISED = ("query", "choices", "gold")
Convert = Callable[[Row], dict[str, Any]]


@dataclass(frozen=True)
class Form:
    """One way in which a task's rows may be written.

    Attributes:
        columns: what such a row has.
        convert: makes the Hub's columns of a row; the columns are the Hub's own where there is none.
        note: what such rows lack against lm-eval's, in words for a person; empty for nothing.
        changes: keys of lm-eval's task file that these rows call for.
    """

    columns: tuple[str, ...]
    convert: Convert | None = None
    note: str = ""
    changes: Mapping[str, Any] = field(default_factory=dict)

    def rows(self, rows: list[Row]) -> list[dict[str, Any]]:
        """The Hub's columns of every row; `DataError` names the first row that lacks one."""
        made = []
        for row in rows:
            if missing := [column for column in self.columns if column not in row.values]:
                raise DataError(f"{row.origin}: has no column {missing[0]!r}, which the rows before it have")
            kept = {column: row.values[column] for column in self.columns}
            made.append(self.convert(Row(kept, row.origin)) if self.convert else kept)
        return made


def normalised(convert: Convert, **settings: Any) -> Form:
    """Rows of `query`, `choices` and `gold` (the right choice's number, from 0)."""
    return Form(NORMALISED, convert, **settings)


def lettered(question: str, count: int | None = None) -> Convert:
    """Choices with letters, as in ARC, OpenBookQA and CommonsenseQA.

    Args:
        question: the column of the question.
        count: of the choices, where the task file knows only one.
    """

    def convert(row: Row) -> dict[str, Any]:
        choices, gold = _choices(row, count)
        letters = list(LETTERS[: len(choices)])
        return {question: _question(row), "choices": {"text": choices, "label": letters}, "answerKey": letters[gold]}

    return convert


def exam(row: Row) -> dict[str, Any]:
    """MMLU: choices as a list."""
    choices, gold = _choices(row, 4)
    return {"question": _question(row), "choices": choices, "answer": gold}


def goal(row: Row) -> dict[str, Any]:
    """PIQA."""
    choices, gold = _choices(row, 2)
    return {"goal": _question(row, "Goal: "), "sol1": choices[0], "sol2": choices[1], "label": gold}


def sentence(row: Row) -> dict[str, Any]:
    """WinoGrande: the query is the sentence with its blank."""
    choices, gold = _choices(row, 2)
    query = _text(row, "query")
    if "_" not in query:
        raise DataError(f"{row.origin}: the query has no blank '_' to put the choices in")
    return {"sentence": query, "option1": choices[0], "option2": choices[1], "answer": str(gold + 1)}


def ending(row: Row) -> dict[str, Any]:
    """HellaSwag, its markers gone already: the columns that lm-eval itself makes of the Hub's."""
    choices, gold = _choices(row, 4)
    return {"query": _text(row, "query"), "choices": choices, "label": str(gold)}


def passage(row: Row) -> dict[str, Any]:
    """BoolQ: a passage and a question of yes or no."""
    choices, gold = _choices(row, 2)
    if sorted(choices) != ["no", "yes"]:
        raise DataError(f"{row.origin}: the choices of BoolQ are yes and no, found {', '.join(choices)}")
    text, question = _after_passage(row, "?\nAnswer:")
    return {"passage": text, "question": question, "label": int(choices[gold] == "yes")}


def passage_and_answer(row: Row) -> dict[str, Any]:
    """BoolQ as its authors published it: the answer is true or false."""
    answer = row.values["answer"]
    if not isinstance(answer, bool):
        raise DataError(f"{row.origin}: column 'answer' must be true or false")
    return {"passage": _text(row, "passage"), "question": _text(row, "question"), "label": int(answer)}


def supported(row: Row) -> dict[str, Any]:
    """SciQ: support where there is any, then the question; the right answer is the last choice."""
    choices, gold = _choices(row, 4)
    if gold != 3:
        raise DataError(f"{row.origin}: SciQ's right answer is its last choice (gold 3), found {gold}")
    support, question = _after_passage(row, "\nAnswer:")
    names = ("distractor1", "distractor2", "distractor3", "correct_answer")
    return {"support": support, "question": question, **dict(zip(names, choices, strict=True))}


def options(row: Row) -> dict[str, Any]:
    """MedQA: options by letter, and the letter of the right one."""
    listed, letter = row.values["options"], row.values["answer_idx"]
    if not isinstance(listed, dict) or sorted(listed) != list("ABCD") or letter not in listed:
        raise DataError(f"{row.origin}: 'options' must map A, B, C and D to texts, and 'answer_idx' be one of them")
    endings = {f"ending{number}": listed[key] for number, key in enumerate("ABCD")}
    return {"sent1": _text(row, "question"), **endings, "label": "ABCD".index(letter)}


def aliases(row: Row) -> dict[str, Any]:
    """TriviaQA: every way to write the answer, under the Hub's name for them; other keys of the answer are not read."""
    answer = row.values["answer"]
    listed = answer.get("aliases") if isinstance(answer, dict) else None
    if not _are_texts(listed):
        raise DataError(f"{row.origin}: column 'answer' must map 'aliases' to a list of texts")
    return {"question": _text(row, "question"), "answer": {"aliases": listed}}


def answers(row: Row) -> dict[str, Any]:
    """NaturalQuestions-Open: every right answer."""
    listed = row.values["answer"]
    if not _are_texts(listed):
        raise DataError(f"{row.origin}: column 'answer' must be a list of texts")
    return {"question": _text(row, "question"), "answer": listed}


def exchange(row: Row) -> dict[str, Any]:
    """GSM8K as prompt and completion."""
    return {"question": _text(row, "prompt"), "answer": _text(row, "completion")}


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, str) and each for each in value)


def _text(row: Row, column: str) -> str:
    value = row.values[column]
    if not isinstance(value, str) or not value:
        raise DataError(f"{row.origin}: column {column!r} must be text")
    return value


def _choices(row: Row, count: int | None = None) -> tuple[list[str], int]:
    choices, gold = row.values["choices"], row.values["gold"]
    if not _are_texts(choices):
        raise DataError(f"{row.origin}: column 'choices' must be a list of texts")
    if not 2 <= len(choices) <= len(LETTERS) or (count is not None and len(choices) != count):
        raise DataError(f"{row.origin}: {len(choices)} choices, expected {count or f'2 to {len(LETTERS)}'}")
    if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < len(choices):
        raise DataError(f"{row.origin}: column 'gold' must be the number of a choice from 0, found {gold!r}")
    return choices, gold


def _question(row: Row, before: str = "Question: ", after: str = "\nAnswer:") -> str:
    """The question inside a rendered query."""
    query = _text(row, "query")
    if not query.startswith(before) or not query.endswith(after):
        raise DataError(f"{row.origin}: the query must read {before + '...' + after!r}")
    return query[len(before) : -len(after)]


def _after_passage(row: Row, after: str) -> tuple[str, str]:
    """Passage and question of a rendered query; an empty passage where the query is the question alone."""
    query = _text(row, "query")
    text, separator, question = ("\n" + query).rpartition("\nQuestion: ")
    if not separator or not question.endswith(after):
        raise DataError(f"{row.origin}: the query must read {'...' + chr(10) + 'Question: ...' + after!r}")
    return text.removeprefix("\n"), question[: -len(after)]
