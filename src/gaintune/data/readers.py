"""Local files and folders: which files make up a domain, which split each belongs to, and plain text."""

from __future__ import annotations

import codecs
import logging
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from gaintune.data.documents import Document, Documents, Stored, cut_chunks
from gaintune.data.tables import ROW_SUFFIXES, Row, add_texts, decode, not_utf8, read_table
from gaintune.errors import DataError

logger = logging.getLogger(__name__)

TEXT_SUFFIXES = (".txt", ".md")
SUFFIXES = (*ROW_SUFFIXES, *TEXT_SUFFIXES)
SECTION_CHARACTERS = 2048
CHUNK_BYTES = 2**20
_TRAIN = re.compile(r"train(ing)?(?![a-z])", re.IGNORECASE)
_VALIDATION = re.compile(r"(validation|valid|val|dev)(?![a-z])", re.IGNORECASE)
_TEST = re.compile(r"test(?![a-z])", re.IGNORECASE)


def read_documents(path: Path, text_column: str | None = None) -> Documents[Document]:
    """Read a file, or every file of a folder in sorted order.

    A row of a .jsonl, .json, .csv or .parquet file is one document. A .txt or .md file is one document, except where a
    split consists of that single file: it is then cut into sections of at most `SECTION_CHARACTERS` at blank lines, so
    that there is something to split. Text and the rows of .jsonl stay in their files until they are read. A folder
    that holds both `train*` and `validation*` (or `valid*`, `val*`, `dev*`, else `test*`) files uses that split;
    otherwise its files are taken together. Beside others, files called `*mismatched*` are left out of validation
    (MNLI).

    Raises:
        DataError: naming the file, and the line where there is one; for a row of .jsonl where it is read.
    """
    train, validation = split_files(path)
    return Documents(_read_files(train, text_column), _read_files(validation, text_column), str(path))


def read_rows(path: Path) -> Documents[Row]:
    """Read all rows of a file, or of every file of a folder, on their sides; raises as `read_documents` does."""
    sides = ([row for file in files for row in read_table(file)] for files in split_files(path, ROW_SUFFIXES))
    return Documents(*sides, source=str(path))


def local_path(source: str) -> Path | None:
    """Return the file or folder of a domain's source, None where nothing is there and the source may be a name.

    Raises:
        DataError: nothing is there, and the source is written as a path.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    if path.suffix.lower() in SUFFIXES:
        raise DataError(f"no such file: {path.absolute()}")
    if "/" in source:
        raise DataError(f"no such file or folder: {path.absolute()}")
    return None


def split_files(path: Path, suffixes: tuple[str, ...] = SUFFIXES) -> tuple[list[Path], list[Path]]:
    """Find the files to train on and to validate with; none of these for a lone file or where no split is named.

    Raises:
        DataError: no such file or folder, or none with one of the suffixes.
    """
    if path.is_dir():
        return _split_folder(path, suffixes)
    if not path.is_file():
        raise DataError(f"{path}: no such file or folder")
    if path.suffix.lower() not in suffixes:
        raise DataError(f"{path}: a domain file ends in one of {', '.join(suffixes)}")
    return [path], []


def _split_folder(folder: Path, suffixes: tuple[str, ...]) -> tuple[list[Path], list[Path]]:
    visible = [
        file
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]
    rows = [file for file in visible if file.suffix.lower() in ROW_SUFFIXES]
    usable = rows or [file for file in visible if file.suffix.lower() in suffixes]
    if not usable:
        raise DataError(f"{folder}: holds no file that ends in one of {', '.join(suffixes)}")
    train = [file for file in usable if _named(_TRAIN, file, folder)]
    validation = _matched([file for file in usable if _named(_VALIDATION, file, folder)], folder)
    tests = [file for file in usable if _named(_TEST, file, folder)]
    if train and tests and not validation:
        validation = _matched(tests, folder)
        logger.warning("%s: no validation files; measured is %s", folder, ", ".join(file.name for file in validation))
    if not train or not validation:
        train, validation = usable, []
    used = {*train, *validation}
    if unused := [file.relative_to(folder).as_posix() for file in visible if file not in used]:
        logger.warning("%s: %d file(s) not part of the domain: %s", folder, len(unused), ", ".join(unused[:5]))
    return train, validation


def _matched(files: list[Path], folder: Path) -> list[Path]:
    """Keep the matched one of MNLI's two validation sets, as for `mnli` by name."""
    return [file for file in files if "mismatched" not in file.relative_to(folder).as_posix().lower()] or files


def _named(pattern: re.Pattern[str], file: Path, folder: Path) -> bool:
    """Tell whether the file, or a folder between, is named after a split."""
    return any(pattern.match(part) for part in file.relative_to(folder).parts)


def _read_files(files: list[Path], text_column: str | None) -> Stored[Document]:
    documents = Stored[Document]()
    for file in files:
        if file.suffix.lower() in ROW_SUFFIXES:
            add_texts(documents, file, text_column)
        elif len(files) == 1:
            documents.add(file, partial(_section, file), _sections(file))
        else:
            documents.add(file, partial(_whole, file), _extent(file))
    return documents


def _section(file: Path, data: bytes, line: int) -> Document:
    return Document(data.decode(), f"{file}:{line}")


def _whole(file: Path, data: bytes, _: int) -> Document:
    return Document(decode(file, data), str(file))


def _sections(file: Path) -> Iterator[tuple[int, int, int]]:
    """Yield the first byte, the byte after the last and the line of every section of a text."""
    start, line, empty = _first_byte(file), 1, True
    for whole, lead, section in cut_chunks(_chunks(file), SECTION_CHARACTERS):
        if section.strip():
            first = start + lead  # a line end is one byte
            yield first, first + len(section.encode()), line + lead
            empty = False
        start += len(whole.encode())
        line += whole.count("\n")
    if empty:
        raise DataError(f"{file}: the file is empty; delete it or fill it in")


def _extent(file: Path) -> Iterator[tuple[int, int, int]]:
    """Yield the first byte, the byte after the last and the line of a whole text, once it was read without error."""
    if not sum(bool(chunk.strip()) for chunk in _chunks(file)):  # a sum, so that all of them are decoded
        raise DataError(f"{file}: the file is empty; delete it or fill it in")
    yield 0, file.stat().st_size, 1


def _first_byte(file: Path) -> int:
    """Return where the text begins: after a byte order mark, if there is one."""
    with file.open("rb") as handle:
        return len(codecs.BOM_UTF8) if handle.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8 else 0


def _chunks(file: Path) -> Iterator[str]:
    """Decode a text piece by piece; DataError names the line of a byte that is no UTF-8."""
    decoder, line = codecs.getincrementaldecoder("utf-8")(), 1
    with file.open("rb") as handle:
        handle.seek(_first_byte(file))
        data = b"begin"
        while data:
            data = handle.read(CHUNK_BYTES)
            try:
                chunk = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                raise not_utf8(file, error, line) from None
            line += chunk.count("\n")
            yield chunk
