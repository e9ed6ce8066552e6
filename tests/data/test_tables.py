"""Files of rows: the four formats read alike, and every mistake is named by file and line."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pandas
import pytest

from gaintune.data.documents import Document, Stored
from gaintune.data.readers import add_texts
from gaintune.errors import DataError

ROWS = [
    {"text": "one, with a comma", "label": 1},
    {"text": "two\nlines and a \u2028 separator", "label": 0},
    {"text": 'three "quoted" äöü 😀', "label": 2},
]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read_rows(file: Path, text_column: str | None = None) -> list[Document]:
    documents = Stored[Document]()
    add_texts(documents, file, text_column)
    return list(documents)


def jsonl(path: Path) -> Path:
    return write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS))


def json_list(path: Path) -> Path:
    return write(path, json.dumps(ROWS, indent=2))


def json_data(path: Path) -> Path:
    return write(path, json.dumps({"version": {"data": []}, "data": ROWS, "more": [1]}, indent=2))


def csv_file(path: Path) -> Path:
    with path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, ["text", "label"])
        writer.writeheader()
        writer.writerows(ROWS)
    return path


def parquet(path: Path) -> Path:
    pandas.DataFrame(ROWS).to_parquet(path)
    return path


@pytest.mark.parametrize(
    ("writer", "suffix", "places"),
    [
        (jsonl, ".jsonl", [":1", ":2", ":3"]),
        (jsonl, ".json", [":1", ":2", ":3"]),
        (json_list, ".json", [":2", ":6", ":10"]),
        (json_data, ".json", [":6", ":10", ":14"]),
        (csv_file, ".csv", [":2", ":3", ":5"]),
        (parquet, ".parquet", [": row 1", ": row 2", ": row 3"]),
    ],
)
def test_every_format_gives_the_same_texts_and_their_places(tmp_path, writer, suffix, places):
    file = writer(tmp_path / f"rows{suffix}")
    documents = read_rows(file)
    assert [document.text for document in documents] == [row["text"] for row in ROWS]
    assert [document.origin for document in documents] == [f"{file}{place}" for place in places]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_a_byte_order_mark_and_windows_line_ends_are_no_text(tmp_path, suffix):
    body = {".jsonl": '{"text": "one"}\r\n{"text": "two"}\r\n', ".json": '[{"text": "one"},\r\n{"text": "two"}]'}
    file = write(tmp_path / f"rows{suffix}", "\ufeff" + body.get(suffix, "text\r\none\r\ntwo\r\n"))
    assert [document.text for document in read_rows(file)] == ["one", "two"]


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"content": "words", "id": "a"}, "content"),
        ({"text": "words", "title": "a"}, "text"),
        ({"sentence": "words", "label": 3}, "sentence"),
    ],
)
def test_the_text_column_is_found(tmp_path, row, column):
    assert read_rows(write(tmp_path / "a.jsonl", json.dumps(row)))[0].text == row[column]


def test_a_csv_column_of_numbers_is_no_text(tmp_path):
    file = write(tmp_path / "a.csv", "id,sentence,score\n1,words,0.5\n2,17,0.25\n")
    assert [document.text for document in read_rows(file)] == ["words", "17"]


def test_a_long_csv_field_is_read(tmp_path):
    file = write(tmp_path / "a.csv", "text\n" + "word " * 50_000 + "\n")
    before = csv.field_size_limit(1000)
    try:
        assert len(read_rows(file)[0].text) == 250_000
        assert csv.field_size_limit() == 1000, "a caller's own limit is left as it was"
    finally:
        csv.field_size_limit(before)


def test_the_named_column_is_used(tmp_path):
    file = write(tmp_path / "a.jsonl", '{"text": "no", "body": "yes"}')
    assert read_rows(file, "body")[0].text == "yes"


@pytest.mark.parametrize(
    ("name", "content", "place", "says"),
    [
        ("a.jsonl", '{"text": "ok"}\n{"text": "broken\n', ":2", "not valid JSON.*at column 10"),
        ("a.jsonl", '{"text": "ok"}\n\n{"text": "ok"}\n', ":2", "line is empty"),
        ("a.jsonl", '{"text": "ok"}\n["text"]\n', ":2", "got a list"),
        ("a.jsonl", '{"text": "ok"}\n{"txt": "ok"}\n', ":2", "no column 'text'; the columns are txt"),
        ("a.jsonl", '{"text": "ok"}\n{"text": " \\n"}\n', ":2", "'text' is empty; fill it in or delete the row"),
        ("a.jsonl", '{"text": "ok"}\n{"text": null}\n', ":2", "is null"),
        ("a.jsonl", '{"text": "ok"}\n{"text": 5}\n', ":2", "is of type int"),
        ("a.jsonl", '{"text": "ok"}\n{"text": "\\ud800"}\n', ":2", "surrogate"),
        ("a.jsonl", b'{"text": "ok"}\n{"text": "caf\xe9"}\n', ":2", "byte 0xe9 is not UTF-8"),
        ("a.jsonl", '{"title": "a", "body": "b"}\n', ":1", "which of title, body .*text_column"),
        ("a.jsonl", '{"label": 1}\n', ":1", "no column holds text.*the columns are label"),
        ("a.jsonl", "", "", "holds no rows"),
        ("a.json", '[{"text": "ok"},\n {"text": }]', ":2", "not valid JSON"),
        ("a.json", '[{"text": "ok"},\n {"text": ""}]', ":2", "is empty"),
        ("a.json", '{"rows": []}', ":1", "expected a list of rows"),
        ("a.json", "[]", "", "holds no rows"),
        ("a.json", '{"text": "ok"}\n{"text": \n', ":2", "not valid JSON"),
        ("a.json", b'[{"text": "ok"},\n {"text": "caf\xe9"}]', ":2", "not UTF-8"),
        ("a.csv", 'text,label\n"two\nlines",1\nword,\n,1\n', ":5", "is empty"),
        ("a.csv", "text,label\nwords,1\nwith, comma,1\n", ":3", "3 fields where the header has 2"),
        ("a.csv", "text\nwords\n\nwords\n", ":3", "line is empty"),
        ("a.csv", 'text\nwords\n"never\nclosed\n', ":3", "not valid CSV"),
        ("a.csv", "text,text\na,b\n", ":1", "'text' appears more than once"),
        ("a.csv", "title,body\na,b\n", ":2", "which of title, body"),
        ("a.csv", "text\n", "", "holds no rows"),
        ("a.csv", b"text\nwords\ncaf\xe9\n", ":3", "not UTF-8"),
        ("a.parquet", "not parquet", "", "not a readable Parquet file"),
    ],
)
def test_a_mistake_is_named_by_file_and_line(tmp_path, name, content, place, says):
    file = write(tmp_path / name, content)
    with pytest.raises(DataError, match=says) as caught:
        read_rows(file)
    assert str(caught.value).startswith(f"{file}{place}: ")
    assert "\n" not in str(caught.value)


def test_a_parquet_mistake_is_named_by_row(tmp_path):
    file = tmp_path / "a.parquet"
    pandas.DataFrame({"text": ["ok", None], "n": [1, 2]}).to_parquet(file)
    with pytest.raises(DataError, match=r"a\.parquet: row 2: column 'text' is null"):
        read_rows(file)
    with pytest.raises(DataError, match="row 1: has no column 'body'; the columns are text, n"):
        read_rows(file, "body")
