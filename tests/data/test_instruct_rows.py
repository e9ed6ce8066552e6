"""Rows of instruction data: every shape that is read, and every mistake with its file and line."""

from __future__ import annotations

import json

import pandas
import pytest

from gaintune.config import DomainConfig
from gaintune.data.domains import load_exchanges
from gaintune.data.exchanges import Exchange, Turn, read_exchanges
from gaintune.errors import DataError

USER = {"role": "user", "content": "Two and two?"}
ANSWER = {"role": "assistant", "content": "Four."}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def only(path, **columns) -> Exchange:
    (exchange,) = read_exchanges(path, **columns).train
    return exchange


def test_prompt_and_completion(tmp_path):
    file = write(tmp_path / "a.jsonl", {"prompt": "Two and two?", "completion": "Four.", "id": 7})
    assert only(file) == Exchange(
        (Turn("user", "Two and two?"), Turn("assistant", "Four.", scored=True)), False, f"{file}:1", 1
    )


def test_named_columns(tmp_path):
    file = write(tmp_path / "a.jsonl", {"question": "Two and two?", "answer": "Four.", "messages": "unread"})
    assert [turn.content for turn in only(file, prompt="question", completion="answer").turns] == [
        "Two and two?",
        "Four.",
    ]


def test_of_messages_every_turn_of_the_assistant_is_scored(tmp_path):
    system = {"role": "system", "content": "Be brief."}
    file = write(tmp_path / "a.jsonl", {"messages": [system, USER, ANSWER, USER, ANSWER]})
    exchange = only(file)
    assert exchange.chat
    assert [turn.scored for turn in exchange.turns] == [False, False, True, False, True]
    assert exchange.question == "Two and two?\nTwo and two?", "what rows have in common is no question"


def test_of_conversational_prompts_the_completion_is_scored(tmp_path):
    file = write(tmp_path / "a.jsonl", {"prompt": [USER, ANSWER, USER], "completion": [ANSWER]})
    exchange = only(file)
    assert exchange.chat
    assert [turn.scored for turn in exchange.turns] == [False, False, False, True]


def test_csv_and_parquet(tmp_path):
    rows = pandas.DataFrame({"prompt": ["a?", "b?"], "completion": ["a", "b"]})
    rows.to_csv(tmp_path / "a.csv", index=False)
    rows.to_parquet(tmp_path / "b.parquet")
    first, second = read_exchanges(tmp_path / "a.csv").train, read_exchanges(tmp_path / "b.parquet").train
    assert [each.turns for each in first] == [each.turns for each in second]
    assert second[1].origin == f"{tmp_path / 'b.parquet'}: row 2" and second[1].row == 2


def test_messages_from_parquet_may_hold_nulls(tmp_path):
    rows = pandas.DataFrame({"messages": [[{**USER, "name": None}, {**ANSWER, "name": None}]]})
    rows.to_parquet(tmp_path / "a.parquet")
    assert [turn.role for turn in only(tmp_path / "a.parquet").turns] == ["user", "assistant"]


def test_a_folder_brings_its_own_split(tmp_path):
    write(tmp_path / "train.jsonl", {"prompt": "a?", "completion": "a"})
    write(tmp_path / "validation.jsonl", {"prompt": "b?", "completion": "b"})
    write(tmp_path / "test.jsonl", {"prompt": "c?", "completion": "c"})
    rows = read_exchanges(tmp_path)
    assert [row.question for row in rows.train] == ["a?"]
    assert [row.question for row in rows.validation] == ["b?"]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "a"}, "has no column 'completion'; the columns are prompt; name them with prompt_column"),
        ({"question": "a", "answer": "b"}, "has no column 'prompt'; the columns are question, answer"),
        ({"prompt": " ", "completion": "b"}, "column 'prompt' is empty"),
        ({"prompt": "a", "completion": ""}, "column 'completion' is empty"),
        ({"prompt": "a", "completion": None}, "column 'completion' is null, expected text"),
        ({"prompt": 1, "completion": "b"}, "column 'prompt' is of type int, expected text"),
        ({"prompt": "a", "completion": "\ud800"}, "column 'completion' holds half of a surrogate pair"),
        ({"prompt": "a", "completion": [ANSWER]}, "must both be text or both lists of messages"),
        ({"prompt": "a", "completion": "b", "messages": [USER, ANSWER]}, "'messages' and also 'prompt'"),
        ({"messages": "a"}, "messages is of type str, expected a list of messages"),
        ({"messages": []}, "messages is empty"),
        ({"messages": ["a"]}, "message 1 of messages is of type str, expected a mapping of role and content"),
        ({"messages": [{"content": "a"}, ANSWER]}, "message 1 of messages has no 'role'; its keys are content"),
        ({"messages": [USER, {"role": "assistant"}]}, "message 2 of messages has no 'content'"),
        ({"messages": [{"role": "human", "content": "a"}]}, "has the role 'human', expected one of system, user, ass"),
        ({"messages": [{"role": "user", "content": [1]}]}, "message 1 of messages is of type list, expected text"),
        ({"messages": [USER, {**ANSWER, "content": " "}]}, "message 2 of messages is empty"),
        ({"messages": [USER, {**ANSWER, "tool_calls": [1]}]}, "message 2 of messages has 'tool_calls'"),
        ({"messages": [USER, USER]}, "no message of the assistant"),
        ({"messages": [USER, ANSWER, USER]}, "the last message is the user's, and nothing answers it"),
        ({"messages": [ANSWER]}, "the first message is the assistant's, and nothing asks for it"),
        ({"prompt": [], "completion": [ANSWER]}, "column 'prompt' is empty"),
        ({"prompt": [USER], "completion": [USER]}, "no message of the assistant"),
    ],
)
def test_a_wrong_row_is_named_by_file_and_line(tmp_path, row, says):
    good = {"prompt": "a", "completion": "b"}
    file = write(tmp_path / "a.jsonl", good, good, row)
    with pytest.raises(DataError, match=says) as caught:
        list(read_exchanges(file).train)
    message = str(caught.value)
    assert message.startswith(f"{file}:3: ")
    assert "\n" not in message


def test_text_files_are_no_rows(tmp_path):
    (tmp_path / "a.txt").write_text("prose")
    with pytest.raises(DataError, match=r"ends in one of \.jsonl, \.json, \.csv, \.parquet$"):
        read_exchanges(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("domain", "says"),
    [
        ({"source": "law"}, r"'law' is for task text, and the plan says instruct; set task: text on the domain"),
        ({"source": "gsm8q"}, "gsm8q is no file, folder or catalogue name; did you mean 'gsm8k'"),
        ({"source": "gsm8k", "prompt_column": "q"}, "'gsm8k' brings its own"),
        ({"source": "x.jsonl", "text_column": "q"}, "text_column is for task text"),
    ],
)
def test_a_domain_of_another_kind_is_refused(domain, says):
    with pytest.raises(DataError, match=says):
        load_exchanges(DomainConfig(name="d", **domain))
