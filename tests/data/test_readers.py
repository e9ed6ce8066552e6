"""Local files and folders: the formats, which files count, their sides and order, near-duplicates, and mistakes."""

import csv
import hashlib
import json
import logging
import random
import re
import tracemalloc
from pathlib import Path

import pandas
import pytest

from gaintune.config import DomainConfig
from gaintune.data import neighbours, readers
from gaintune.data.documents import (
    Document,
    Documents,
    Stored,
    cut_passages,
    drawn_order,
    in_drawn_order,
    split_documents,
)
from gaintune.data.domains import load_documents
from gaintune.data.neighbours import CONTAINMENT, SHINGLE_WORDS, NeighbourIndex, normalize
from gaintune.data.readers import SECTION_CHARACTERS, add_texts, read_documents
from gaintune.errors import DataError
from support import refused
from support.files import write_rows as write_file


def texts(documents):
    return [document.text for document in documents]


def test_a_folder_is_read_whole_in_sorted_order(tmp_path, write_rows):
    write_rows("d/b/2.jsonl", ["three"])
    write_rows("d/a/1.jsonl", ["one", "two"])
    write_rows("d/.hidden/0.jsonl", ["never"])
    documents = read_documents(tmp_path / "d")
    assert texts(documents.train) == ["one", "two", "three"] and not documents.validation


@pytest.mark.parametrize("name", ["validation.jsonl", "valid-0.jsonl", "dev.jsonl", "test.jsonl", "validation/0.jsonl"])
def test_a_split_in_the_file_names_is_used(tmp_path, write_rows, name):
    write_rows("d/train-00000-of-00002.jsonl", ["one"])
    write_rows("d/train-00001-of-00002.jsonl", ["two"])
    write_rows(f"d/{name}", ["held out"])
    documents = read_documents(tmp_path / "d")
    assert texts(documents.train) == ["one", "two"] and texts(documents.validation) == ["held out"]


def test_test_files_are_left_out_beside_validation_files_with_a_warning(tmp_path, write_rows, caplog):
    for name in ("train", "validation", "test"):
        write_rows(f"d/{name}.jsonl", [name])
    (tmp_path / "d" / "README.md").write_text("about")
    with caplog.at_level(logging.WARNING):
        documents = read_documents(tmp_path / "d")
    assert (texts(documents.train), texts(documents.validation)) == (["train"], ["validation"])
    assert "2 file(s) not part of the domain: README.md, test.jsonl" in caplog.text


def test_names_that_only_begin_like_a_split_make_none(tmp_path, write_rows):
    write_rows("d/trainers.jsonl", ["one"])
    write_rows("d/values.jsonl", ["two"])
    assert not read_documents(tmp_path / "d").validation


def test_each_text_file_of_a_folder_is_a_document(tmp_path):
    for name, text in (("a.txt", "one\n\ntwo"), ("b.md", "# three")):
        (tmp_path / name).write_text(text)
    assert texts(read_documents(tmp_path).train) == ["one\n\ntwo", "# three"]


@pytest.mark.parametrize("separator", ["\n\n", "\n", ". ", " "])
def test_a_lone_text_file_is_cut_into_sections_that_keep_every_word(tmp_path, separator):
    paragraphs = [f"paragraph {number} " + "word " * 40 + "end" for number in range(50)]
    file = tmp_path / "a.txt"
    file.write_text(separator.join(paragraphs))
    documents = read_documents(file).train
    assert len(documents) > 5 and all(len(document.text) <= SECTION_CHARACTERS for document in documents)
    assert " ".join(texts(documents)).split() == file.read_text().split()
    if separator == "\n\n":
        assert all(document.text.startswith("paragraph") for document in documents)
        lines = file.read_text().splitlines()
        for document in documents:
            line = int(document.origin.removeprefix(f"{file}:"))
            assert lines[line - 1] == document.text.splitlines()[0]


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_sections_are_those_of_the_whole_text_wherever_it_is_read_in_chunks(tmp_path, monkeypatch, mark):
    monkeypatch.setattr(readers, "CHUNK_BYTES", 701)
    text = "\n\n".join(f"Абзац {number} 漢字 😀\r\n" + "word\u3000 " * (number % 90) for number in range(300))
    file = tmp_path / "a.txt"
    file.write_bytes((mark + text + "\n\n \n").encode())
    pieces = list(cut_passages(text + "\n\n \n", SECTION_CHARACTERS))
    expected = [(piece, f"{file}:{text[:start].count(chr(10)) + 1}") for start, piece in pieces]
    documents = read_documents(file).train
    assert [(each.text, each.origin) for each in documents] == expected
    for number in (7, 3, -1):
        assert (documents[number].text, documents[number].origin) == expected[number]


def test_a_byte_that_is_no_text_is_named_by_its_line_in_any_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "CHUNK_BYTES", 5)
    for name in ("alone/a.txt", "beside/a.txt", "beside/b.txt"):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes("äöü\n\näöü\n".encode() + b"\n ok \xe9\n\n")
        refused(DataError, r"\.txt:5: byte 0xe9 is not UTF-8", read_documents, file.parent)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_a_file_is_not_held_in_memory(tmp_path, suffix):
    paragraphs = [f"paragraph {number} " + "of some words " * 60 for number in range(15_000)]
    file = tmp_path / f"a{suffix}"
    if suffix == ".txt":
        file.write_text("\n\n".join(paragraphs))
    else:
        write_file(file, ({"text": each} for each in paragraphs))
    tracemalloc.start()
    try:
        documents = split_documents(read_documents(file), 0)
        assert next(in_drawn_order(documents.train, 0, "train", block_size=256)).text.startswith("paragraph")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < file.stat().st_size / 2, "the chunk that is read, and a few numbers for each document"


def test_a_broken_row_is_named_though_it_would_not_be_drawn(tmp_path, write_rows):
    for broken in ("train", "validation"):
        files = {side: write_rows(f"{broken}/{side}.jsonl", ["one", "two"]) for side in ("train", "validation")}
        with files[broken].open("a") as file:
            file.write('{"text": 5}\n')
        with pytest.raises(DataError, match=rf"{broken}\.jsonl:3: column 'text' is of type int"):
            split_documents(read_documents(tmp_path / broken), 0)


@pytest.mark.parametrize(("name", "content", "says"), [
    ("a.txt", b" \n", r"a\.txt: the file is empty"),
    ("a.txt", b"ok\ncaf\xe9", r"a\.txt:2: byte 0xe9 is not UTF-8"),
    ("a.txt", b"\xef\xbb\xbfok\ncaf\xe9", r"a\.txt:2: byte 0xe9 is not UTF-8"),
    ("a.docx", b"x", r"a\.docx: a domain file ends in one of \.jsonl"),
    ("folder/a.docx", b"x", "folder: holds no file that ends in"),
])  # fmt: skip
def test_files_that_cannot_be_used_are_named(tmp_path, name, content, says):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    refused(DataError, says, read_documents, path.parent if name.startswith("folder") else path)


@pytest.mark.parametrize(("domain", "says"), [
    ({"source": "scriptur"}, "did you mean 'scripture'"),
    ({"source": "nowhere"}, "nowhere is no file, folder or catalogue name; the catalogue holds medical"),
    ({"source": "./none.jsonl"}, r"^no such file: /.*/none\.jsonl$"),
    ({"source": "none.txt"}, r"^no such file: /.*/none\.txt$"),
    ({"source": "./none"}, "^no such file or folder: /.*/none$"),
    ({"source": "law", "text_column": "title"}, "text_column is for local files"),
])  # fmt: skip
def test_sources_that_are_missing_and_columns_of_the_catalogue_are_refused(domain, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(DataError, says, load_documents, DomainConfig(name="d", **domain))


def documents(texts):
    return Documents(tuple(Document(text, f"f:{line}") for line, text in enumerate(texts, 1)), source="f")


def sides(texts, seed=0):
    split = split_documents(documents(texts), seed)
    return {d.text for d in split.train}, {d.text for d in split.validation}


def test_the_split_is_disjoint_complete_and_near_its_share():
    texts = [f"document {number}" for number in range(2000)]
    train, validation = sides(texts)
    assert not train & validation and train | validation == set(texts)
    assert 150 < len(validation) < 250 and sides(texts) == (train, validation)
    assert sides(texts, seed=1)[1] != validation


def test_a_document_keeps_its_side_when_others_come_and_wherever_it_stands():
    texts = [f"document {number}" for number in range(200)]
    more = [f"another {number}" for number in range(100)]
    _, validation = sides(texts)
    assert sides([*more, *reversed(texts)])[1] & set(texts) == validation


def test_texts_that_differ_by_case_spacing_or_punctuation_are_on_the_same_side():
    texts = [variant for n in range(100) for variant in (f"document {n}", f"Document  {n}!", f"document {n}")]
    train, validation = sides(texts)
    assert len(validation) % 2 == 0
    assert not {text.lower().replace("  ", " ").rstrip("!") for text in train} & validation


@pytest.mark.parametrize("seed", range(20))
def test_two_different_documents_are_enough(seed):
    train, validation = sides(["one", "two"], seed)
    assert len(train) == len(validation) == 1


def test_one_text_cannot_be_split_and_a_split_of_the_source_is_kept():
    own = Documents((Document("a", "x"),), (Document("a", "y"),), "f")
    assert split_documents(own, 0) == own
    same = r"f: 2 documents, all with the same text, and at least 2 different ones are"
    refused(DataError, same, split_documents, documents(["same", "Same."]), 0)
    alone = r"f: 1 document, and at least 2 different ones are needed"
    refused(DataError, alone, split_documents, documents(["alone"]), 0)


def test_the_order_is_that_of_the_hashes_of_the_numbers():
    """The order of earlier versions: sorted by SHA-256 of seed, side and number, joined by a unit separator."""

    def place(number):
        return hashlib.sha256(f"3\x1ftrain\x1f{number}".encode()).digest()[:8]

    assert list(drawn_order(700, 3, "train")) == sorted(range(700), key=place)
    source = [Document(f"text {number}", f"f:{number}") for number in range(700)]  # more than are read at once
    drawn = in_drawn_order(source, 3, "train", block_size=64)
    assert [passage.document for passage in drawn] == sorted(range(700), key=place)


def test_long_documents_are_drawn_in_passages_that_keep_every_word():
    long = "\n\n".join(f"{name} paragraph {number} " + "word " * 20 for name in "ab" for number in range(20))
    source = [Document(long, "f:1"), Document("  short, untouched \n", "f:2")]
    passages = list(in_drawn_order(source, 0, "train", block_size=64))
    assert [p.text for p in passages if p.document == 1] == ["  short, untouched \n"]
    pieces = [p.text for p in passages if p.document == 0]
    assert all(len(piece) <= 8 * 64 for piece in pieces)
    assert sorted(" ".join(pieces).split()) == sorted(long.split())
    assert pieces != sorted(pieces, key=long.index), "passages are shuffled"
    assert passages == list(in_drawn_order(source, 0, "train", block_size=64))
    assert passages != list(in_drawn_order(source, 1, "train", block_size=64))


WIDE = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")
SENTENCE = "Operating profit of the company rose clearly in the third quarter compared with the year before"


@pytest.mark.parametrize(("text", "expected"), [
    (SENTENCE, True),
    (SENTENCE.upper().replace(" ", "  ") + " !", True),
    (SENTENCE.replace("third", "second"), True),
    ("Yesterday it was reported: " + SENTENCE, True),
    ("Operating profit of the company fell, and nobody knew why that was or what could be done", False),
    ("Short text!", True),
    ("short text indeed", False),
    ("???", True),
    ("!!!", False),
    ("今日は天気がとても良いので散歩", True),
    ("今日は仕事が忙しくて何もできない", False),
])  # fmt: skip
def test_what_is_a_near_duplicate(text, expected):
    index = NeighbourIndex(enumerate([SENTENCE, "short text", "???", "今日は天気がとても良いので散歩に行きます"]))
    assert (text in index) is expected


def test_words_are_the_runs_of_letters_and_digits_and_every_character_of_chinese_and_japanese(monkeypatch):
    def plain(text):
        spaced = "".join(f" {c} " if WIDE.fullmatch(c) else c if c.isalnum() or c == "_" else " " for c in text)
        return " ".join(spaced.split())

    characters = [chr(code) for code in (*range(0x3200), *range(0x3400, 0xD800, 97), *range(0xF8F0, 0x11000, 7))]
    for character in characters:
        text = f"Some {character}Words{character}{character} of_1 Sentence " + "and its End " * 10
        assert normalize(text) == plain(text.casefold()), ascii(character)
    long = "".join(characters)
    assert normalize(long) == plain(long.casefold())
    monkeypatch.setattr(neighbours, "NORMALIZED_AT_ONCE", 50)
    assert (normalize(long), normalize(" ?! \n")) == (plain(long.casefold()), "?!")


def test_two_documents_that_hold_half_each_do_not_add_up():
    words = [f"word{number}" for number in range(60)]
    parts = [" ".join(words[start : start + 20]) for start in (0, 20, 40)]
    whole = " ".join(words)
    assert whole not in NeighbourIndex(enumerate(parts)) and whole not in NeighbourIndex([])
    assert whole in NeighbourIndex((0, part) for part in parts), "pieces of one document do"


def test_a_run_that_a_document_repeats_counts_once():
    repeated, other = (" ".join(f"{name}{number}" for number in range(12)) for name in ("word", "other"))
    query = f"{repeated} {other} " + " ".join(f"new{number}" for number in range(8))
    assert query not in NeighbourIndex([(0, repeated), (0, repeated + " indeed"), (0, "so " + repeated), (1, other)])


def test_near_duplicates_agree_with_plain_sets_of_word_runs():
    rng = random.Random(0)
    documents = [" ".join(rng.choices("abcd", k=rng.randint(6, 30))) for _ in range(40)]
    queries = [" ".join(rng.choices("abcd", k=rng.randint(6, 30))) for _ in range(200)]

    def runs(text):
        words = normalize(text).split()
        return {tuple(words[start : start + SHINGLE_WORDS]) for start in range(len(words) - SHINGLE_WORDS + 1)}

    index = NeighbourIndex(enumerate(documents))
    shared = [max(len(runs(query) & runs(document)) for document in documents) for query in queries]
    expected = [count >= CONTAINMENT * len(runs(query)) for query, count in zip(queries, shared, strict=True)]
    assert [query in index for query in queries] == expected and 10 < sum(expected) < 190


TEXTS = ("one, with a comma", "two\nlines and a \u2028 separator", 'three "quoted" äöü 😀')
ROWS = [{"text": text, "label": number} for number, text in enumerate(TEXTS)]


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
    pandas.DataFrame(ROWS).to_csv(path, index=False)
    return path


def parquet(path: Path) -> Path:
    pandas.DataFrame(ROWS).to_parquet(path)
    return path


@pytest.mark.parametrize(("writer", "suffix", "places"), [
    (jsonl, ".jsonl", [":1", ":2", ":3"]),
    (jsonl, ".json", [":1", ":2", ":3"]),
    (json_list, ".json", [":2", ":6", ":10"]),
    (json_data, ".json", [":6", ":10", ":14"]),
    (csv_file, ".csv", [":2", ":3", ":5"]),
    (parquet, ".parquet", [": row 1", ": row 2", ": row 3"]),
])  # fmt: skip
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


@pytest.mark.parametrize(("row", "named"), [
    ({"content": "words", "id": "a"}, None), ({"text": "words", "title": "a"}, None),
    ({"sentence": "words", "label": 3}, None), ({"text": "no", "body": "words"}, "body"),
])  # fmt: skip
def test_the_text_column_is_found_or_the_named_one(tmp_path, row, named):
    assert read_rows(write(tmp_path / "a.jsonl", json.dumps(row)), named)[0].text == "words"


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


@pytest.mark.parametrize(("name", "content", "place", "says"), [
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
])  # fmt: skip
def test_a_mistake_is_named_by_file_and_line(tmp_path, name, content, place, says):
    file = write(tmp_path / name, content)
    with pytest.raises(DataError, match=says) as caught:
        read_rows(file)
    assert str(caught.value).startswith(f"{file}{place}: ") and "\n" not in str(caught.value)


def test_a_parquet_mistake_is_named_by_row(tmp_path):
    file = tmp_path / "a.parquet"
    pandas.DataFrame({"text": ["ok", None], "n": [1, 2]}).to_parquet(file)
    refused(DataError, r"a\.parquet: row 2: column 'text' is null", read_rows, file)
    refused(DataError, "row 1: has no column 'body'; the columns are text, n", read_rows, file, "body")
