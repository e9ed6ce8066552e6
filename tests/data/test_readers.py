"""Local files and folders: which files count, and which side they are on."""

from __future__ import annotations

import logging

import pytest

from gaintune.config import DomainConfig
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
    assert documents.validation is None


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
    assert read_documents(tmp_path / "d").validation is None


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


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b" \n", r"a\.txt: the file is empty"),
        ("a.txt", b"ok\ncaf\xe9", r"a\.txt:2: byte 0xe9 is not UTF-8"),
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
