"""Local files and folders: which files count, and which side they are on."""

from __future__ import annotations

import json
import logging
import tracemalloc

import pytest

from gaintune.config import DomainConfig
from gaintune.data import readers
from gaintune.data.documents import cut_passages, in_drawn_order, split_documents
from gaintune.data.domains import load_documents
from gaintune.data.readers import SECTION_CHARACTERS, read_documents
from gaintune.errors import DataError


def texts(documents):
    return [document.text for document in documents]


def test_a_folder_is_read_whole_in_sorted_order(tmp_path, write_rows):
    write_rows("d/b/2.jsonl", ["three"])
    write_rows("d/a/1.jsonl", ["one", "two"])
    write_rows("d/.hidden/0.jsonl", ["never"])
    documents = read_documents(tmp_path / "d")
    assert texts(documents.train) == ["one", "two", "three"]
    assert not documents.validation


@pytest.mark.parametrize("name", ["validation.jsonl", "valid-0.jsonl", "dev.jsonl", "test.jsonl", "validation/0.jsonl"])
def test_a_split_in_the_file_names_is_used(tmp_path, write_rows, name):
    write_rows("d/train-00000-of-00002.jsonl", ["one"])
    write_rows("d/train-00001-of-00002.jsonl", ["two"])
    write_rows(f"d/{name}", ["held out"])
    documents = read_documents(tmp_path / "d")
    assert texts(documents.train) == ["one", "two"]
    assert texts(documents.validation) == ["held out"]


def test_test_files_are_left_alone_beside_validation_files_and_that_is_said(tmp_path, write_rows, caplog):
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
    assert len(documents) > 5
    assert all(len(document.text) <= SECTION_CHARACTERS for document in documents)
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
    assert [(each.text, each.origin) for each in map(documents.__getitem__, (7, 3, -1))] == [
        expected[number] for number in (7, 3, -1)
    ]


def test_a_byte_that_is_no_text_is_named_by_its_line_in_any_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "CHUNK_BYTES", 5)
    for name in ("alone/a.txt", "beside/a.txt", "beside/b.txt"):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes("äöü\n\näöü\n".encode() + b"\n ok \xe9\n\n")
        with pytest.raises(DataError, match=r"\.txt:5: byte 0xe9 is not UTF-8"):
            read_documents(file.parent)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_a_file_is_not_held_in_memory(tmp_path, suffix):
    paragraphs = [f"paragraph {number} " + "of some words " * 60 for number in range(15_000)]
    file = tmp_path / f"a{suffix}"
    file.write_text(
        "\n\n".join(paragraphs)
        if suffix == ".txt"
        else "".join(json.dumps({"text": each}) + "\n" for each in paragraphs)
    )
    tracemalloc.start()
    try:
        documents = split_documents(read_documents(file), 0)
        drawn = in_drawn_order(documents.train, 0, "train", block_size=256)
        assert next(drawn).text.startswith("paragraph")
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


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b" \n", r"a\.txt: the file is empty"),
        ("a.txt", b"ok\ncaf\xe9", r"a\.txt:2: byte 0xe9 is not UTF-8"),
        ("a.txt", b"\xef\xbb\xbfok\ncaf\xe9", r"a\.txt:2: byte 0xe9 is not UTF-8"),
        ("a.docx", b"x", r"a\.docx: a domain file ends in one of \.jsonl"),
        ("folder/a.docx", b"x", "folder: holds no file that ends in"),
    ],
)
def test_files_that_cannot_be_used_are_named(tmp_path, name, content, says):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    with pytest.raises(DataError, match=says):
        read_documents(path.parent if name.startswith("folder") else path)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("scriptur", "did you mean 'scripture'"),
        ("nowhere", "nowhere is no file, folder or catalogue name; the catalogue holds medical"),
        ("./none.jsonl", r"^no such file: /.*/none\.jsonl$"),
        ("none.txt", r"^no such file: /.*/none\.txt$"),
        ("./none", "^no such file or folder: /.*/none$"),
    ],
)
def test_a_source_that_is_not_there_is_named(source, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=says):
        load_documents(DomainConfig(name="d", source=source))


def test_a_catalogue_domain_takes_no_column():
    with pytest.raises(DataError, match="text_column is for local files"):
        load_documents(DomainConfig(name="law", source="law", text_column="title"))
