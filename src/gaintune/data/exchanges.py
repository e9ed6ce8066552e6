"""Rows of instruction data: a prompt and its completion, or the messages of a chat; a mistake is named by its line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gaintune.data.documents import Documents, Stored
from gaintune.data.readers import ROW_SUFFIXES, Row, add_rows, checked_text, split_files
from gaintune.errors import DataError

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Turn:
    """One message of a chat; the model is trained on what is `scored`."""

    role: str
    content: str
    scored: bool = False


@dataclass(frozen=True)
class Exchange:
    """A prompt and its completion, or a conversation.

    Attributes:
        turns: in order; the last is scored, the first is not. A row of prompt and completion is a user's turn and an
            assistant's.
        chat: whether the row was written as messages.
        origin: "file:line", or "file: row n" where the format has no lines.
        row: number of the row in its file or split, from 1.
    """

    turns: tuple[Turn, ...]
    chat: bool
    origin: str = ""
    row: int = 0

    @property
    def question(self) -> str:
        """The user's messages, which a validation row must not share with a training row.

        Answers are left out, and so is the system's message, which many rows have in common.
        """
        return "\n".join(turn.content for turn in self.turns if turn.role == "user") or self.turns[0].content


def question_and_answer(prompt: str, completion: str) -> Exchange:
    """Make an exchange of a prompt and its completion, of a source that is known to hold text."""
    return Exchange((Turn("user", prompt), Turn("assistant", completion, scored=True)), chat=False)


def read_exchanges(path: Path, prompt: str | None = None, completion: str | None = None) -> Documents[Exchange]:
    """Read the rows of a file, or of every file of a folder; a folder's split is found as for documents.

    A row holds `prompt` and `completion` (or the columns named), both text or both lists of messages; or it holds
    `messages`. A message is a mapping of `role` (system, user or assistant) and `content`. Of `messages` every turn of
    the assistant is scored; of `prompt` and `completion` those in the completion. Other columns are ignored. A
    DataError names the file and line of a row that is wrong; of .jsonl when it is read.
    """
    train, validation = split_files(path, ROW_SUFFIXES)

    def read(files: Sequence[Path]) -> Stored[Exchange]:
        exchanges = Stored[Exchange]()
        for file in files:
            add_rows(exchanges, file, lambda row, number: _exchange(row, number, prompt, completion))
        return exchanges

    return Documents(read(train), read(validation), str(path))


def _exchange(row: Row, number: int, prompt: str | None, completion: str | None) -> Exchange:
    named = prompt is not None or completion is not None
    columns = (prompt or "prompt", completion or "completion")
    missing = [column for column in columns if column not in row.values]
    if "messages" in row.values and not named:
        if not missing:
            raise DataError(f"{row.origin}: has 'messages' and also 'prompt' and 'completion'; leave out one of them")
        return _conversation(_messages(row.values["messages"], row.origin, "messages", scored=True), row, number)
    if missing:
        advice = "" if named else "; name them with prompt_column and completion_column, or give 'messages'"
        raise DataError(f"{row.origin}: has no column {missing[0]!r}; the columns are {row.columns}{advice}")
    question, answer = (row.values[column] for column in columns)
    of_question, of_answer = (f"column {column!r}" for column in columns)
    if isinstance(question, list) != isinstance(answer, list):
        raise DataError(
            f"{row.origin}: columns {columns[0]!r} and {columns[1]!r} must both be text or both lists of messages"
        )
    if isinstance(question, list):
        before = _messages(question, row.origin, of_question, scored=False)
        return _conversation((*before, *_messages(answer, row.origin, of_answer, scored=True)), row, number)
    texts = checked_text(question, row.origin, of_question), checked_text(answer, row.origin, of_answer)
    return replace(question_and_answer(*texts), origin=row.origin, row=number)


def _messages(values: Any, origin: str, what: str, *, scored: bool) -> tuple[Turn, ...]:
    """Check a list of messages; the assistant's are scored if `scored`."""
    if not isinstance(values, list):
        raise DataError(
            f"{origin}: {what} is of type {type(values).__name__}, expected a list of messages, "
            f'such as [{{"role": "user", "content": "..."}}, {{"role": "assistant", "content": "..."}}]'
        )
    if not values:
        raise DataError(f"{origin}: {what} is empty; fill it in or delete the row")
    numbered = enumerate(values, start=1)
    return tuple(_message(value, origin, f"message {number} of {what}", scored=scored) for number, value in numbered)


def _message(value: Any, origin: str, what: str, *, scored: bool) -> Turn:
    if not isinstance(value, Mapping):
        raise DataError(f"{origin}: {what} is of type {type(value).__name__}, expected a mapping of role and content")
    for key in ("role", "content"):
        if key not in value:
            raise DataError(f"{origin}: {what} has no {key!r}; its keys are {', '.join(value) or 'none at all'}")
    # Parquet gives every message the keys of all messages, with null where one has no value
    if others := [key for key in value if key not in ("role", "content") and value[key] is not None]:
        raise DataError(f"{origin}: {what} has {others[0]!r}, which cannot be learned; leave it out")
    role = value["role"]
    if role not in ROLES:
        raise DataError(f"{origin}: {what} has the role {role!r}, expected one of {', '.join(ROLES)}")
    return Turn(role, checked_text(value["content"], origin, what), scored=scored and role == "assistant")


def _conversation(turns: tuple[Turn, ...], row: Row, number: int) -> Exchange:
    """Make an exchange of messages that start with a question and end with its answer; the template judges the rest."""
    if not any(turn.scored for turn in turns):
        raise DataError(f"{row.origin}: no message of the assistant is there to learn; add one or delete the row")
    if not turns[-1].scored:
        problem = f"the last message is the {turns[-1].role}'s, and nothing answers it"
        raise DataError(f"{row.origin}: {problem}; end the row with the assistant's")
    if turns[0].scored:
        raise DataError(f"{row.origin}: the first message is the assistant's, and nothing asks for it; add a prompt")
    return Exchange(turns, chat=True, origin=row.origin, row=number)
