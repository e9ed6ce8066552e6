"""Local files and folders: which files make up a domain, which split each belongs to, and plain text."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from gaintune.data.documents import Document, Documents, cut_passages
from gaintune.data.tables import ROW_SUFFIXES, decode, read_rows
from gaintune.errors import DataError

logger = logging.getLogger(__name__)

TEXT_SUFFIXES = (".txt", ".md")
SUFFIXES = (*ROW_SUFFIXES, *TEXT_SUFFIXES)
SECTION_CHARACTERS = 2048
_TRAIN = re.compile(r"train(ing)?(?![a-z])", re.IGNORECASE)
_VALIDATION = re.compile(r"(validation|valid|val|dev)(?![a-z])", re.IGNORECASE)
_TEST = re.compile(r"test(?![a-z])", re.IGNORECASE)


def read_documents(path: Path, text_column: str | None = None) -> Documents[Document]:
    """Read a file, or every file of a folder in sorted order.

    A row of a .jsonl, .json, .csv or .parquet file is one document. A .txt or .md file is one document, except where a
    split consists of that single file: it is then cut into sections of at most `SECTION_CHARACTERS` at blank lines, so
    that there is something to split. A folder that holds both `train*` and `validation*` (or `valid*`, `val*`, `dev*`,
    else `test*`) files uses that split; otherwise its files are taken together. Beside others, files called
    `*mismatched*` are left out of validation (MNLI).

    Raises:
        DataError: naming the file, and the line where there is one.
    """
    train, validation = split_files(path)
    return Documents(
        train=_read_files(train, text_column),
        validation=_read_files(validation, text_column) if validation else None,
        source=str(path),
    )


def local_path(source: str) -> Path | None:
    """The file or folder of a domain's source, None where there is none and the source may be a name.

    Raises:
        DataError: there is none, and the source is written as a path.
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
    """Training and validation files of a domain; no validation files where a file stands alone or no split is named.

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
        logger.warning("%s: no validation files; measured is %s", folder, ", ".join(each.name for each in validation))
    if not train or not validation:
        train, validation = usable, []
    used = {*train, *validation}
    if unused := [file.relative_to(folder).as_posix() for file in visible if file not in used]:
        logger.warning("%s: %d file(s) not part of the domain: %s", folder, len(unused), ", ".join(unused[:5]))
    return train, validation


def _matched(files: list[Path], folder: Path) -> list[Path]:
    """Of MNLI's two validation sets the matched one, as for `mnli` by name; the other is told of as no part."""
    return [file for file in files if "mismatched" not in file.relative_to(folder).as_posix().lower()] or files


def _named(pattern: re.Pattern[str], file: Path, folder: Path) -> bool:
    """Whether the file, or a folder between, is named after a split."""
    return any(pattern.match(part) for part in file.relative_to(folder).parts)


def _read_files(files: list[Path], text_column: str | None) -> tuple[Document, ...]:
    documents: list[Document] = []
    for file in files:
        if file.suffix.lower() in ROW_SUFFIXES:
            documents += read_rows(file, text_column)
        else:
            documents += _read_text(file, in_sections=len(files) == 1)
    return tuple(documents)


def _read_text(file: Path, *, in_sections: bool) -> list[Document]:
    text = decode(file, file.read_bytes())
    if not text.strip():
        raise DataError(f"{file}: the file is empty; delete it or fill it in")
    if not in_sections:
        return [Document(text, str(file))]
    return [
        Document(section, f"{file}:{text.count(chr(10), 0, start) + 1}")
        for start, section in cut_passages(text, SECTION_CHARACTERS)
    ]
