"""Local files and folders: the files of a domain, its split, rows and plain text; errors name the line."""

from __future__ import annotations

import codecs
import csv
import io
import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from gaintune.data.documents import Document, Documents, Stored, T, cut_chunks
from gaintune.errors import DataError

logger = logging.getLogger(__name__)

ROW_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
USUAL_COLUMNS = ("text", "content")
TEXT_SUFFIXES = (".txt", ".md")
SUFFIXES = (*ROW_SUFFIXES, *TEXT_SUFFIXES)
SECTION_CHARACTERS = 2048
CHUNK_BYTES = 2**20
_TRAIN = re.compile(r"train(ing)?(?![a-z])", re.IGNORECASE)
_VALIDATION = re.compile(r"(validation|valid|val|dev)(?![a-z])", re.IGNORECASE)
_TEST = re.compile(r"test(?![a-z])", re.IGNORECASE)


class Row(NamedTuple):
    """One row and its origin: "file:line", or "file: row n" where the format has no lines."""

    values: dict[str, Any]
    origin: str

    @property
    def columns(self) -> str:
        """Names of the columns, for messages."""
        return ", ".join(self.values) or "none at all"


def read_documents(path: Path, text_column: str | None = None) -> Documents[Document]:
    """Read a file, or every file of a folder in sorted order.

    A row of a .jsonl, .json, .csv or .parquet file is one document. A .txt or .md file is one document, except where a
    split consists of that single file: it is then cut into sections of at most `SECTION_CHARACTERS` at blank lines, so
    that there is something to split. Text and the rows of .jsonl stay in their files until they are read. A folder
    that holds both `train*` and `validation*` (or `valid*`, `val*`, `dev*`, else `test*`) files uses that split;
    otherwise its files are taken together. Beside others, files called `*mismatched*` are left out of validation
    (MNLI). A DataError names the file and, where there is one, the line; of a row of .jsonl when it is read.
    """
    train, validation = split_files(path)
    return Documents(_read_files(train, text_column), _read_files(validation, text_column), str(path))


def read_rows(path: Path) -> Documents[Row]:
    """Read all rows of a file, or of every file of a folder, on their sides; raises as `read_documents` does."""
    sides = [[row for file in files for row in read_table(file)] for files in split_files(path, ROW_SUFFIXES)]
    return Documents(sides[0], sides[1], str(path))


def local_path(source: str) -> Path | None:
    """Return the file or folder of a domain's source, or None for a name; DataError for a path where nothing is."""
    path = Path(source).expanduser()
    if path.exists():
        return path
    if path.suffix.lower() in SUFFIXES or "/" in source:
        kind = "file" if path.suffix.lower() in SUFFIXES else "file or folder"
        raise DataError(f"no such {kind}: {path.absolute()}")
    return None


def split_files(path: Path, suffixes: tuple[str, ...] = SUFFIXES) -> tuple[list[Path], list[Path]]:
    """Find the files to train on, and those to validate with: none for a lone file or where no split is named.

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
    train, validation, tests = (  # a file, or a folder between, is named after its split
        [file for file in usable if any(map(name.match, file.relative_to(folder).parts))]
        for name in (_TRAIN, _VALIDATION, _TEST)
    )
    validation = _matched(validation, folder)
    if train and tests and not validation:
        validation = _matched(tests, folder)
        logger.warning("%s: no validation files; measuring on %s", folder, ", ".join(file.name for file in validation))
    if not train or not validation:
        train, validation = usable, []
    used = {*train, *validation}
    if unused := [file.relative_to(folder).as_posix() for file in visible if file not in used]:
        logger.warning("%s: %d file(s) not part of the domain: %s", folder, len(unused), ", ".join(unused[:5]))
    return train, validation


def _matched(files: list[Path], folder: Path) -> list[Path]:
    """Keep the matched one of MNLI's two validation sets, as for `mnli` by name."""
    return [file for file in files if "mismatched" not in file.relative_to(folder).as_posix().lower()] or files


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


def add_texts(documents: Stored[Document], file: Path, text_column: str | None = None) -> None:
    """Add the text column of every row.

    The column is `text_column`; or the one named `text` or `content`; or the only column of strings. A DataError names
    the file and line of a broken row, or of a missing, ambiguous or empty text.
    """
    rows = None if file.suffix.lower() == ".jsonl" else read_table(file)
    column = text_column or _find_column(file, rows or [first_row(file)])
    add_rows(documents, file, lambda row, _: Document(row_text(row, column), row.origin), rows)


def add_rows(items: Stored[T], file: Path, make: Callable[[Row, int], T], rows: Sequence[Row] | None = None) -> None:
    """Add an item for every row: `make` gets the row and its number, from 1.

    Rows of .jsonl stay in their file, and what is wrong with one is raised whenever it is read; those of other formats
    are read and checked now (unless given as `rows`, already read), and stay in memory. A DataError names a broken row,
    or a file without any.
    """
    if file.suffix.lower() != ".jsonl":
        items.hold([make(row, number) for number, row in enumerate(rows or read_table(file), start=1)])
        return
    before, name = len(items), str(file)  # once, not for every row
    places = ((start, start + len(data), line) for start, data, line in _lines(file))
    items.add(file, lambda data, line: make(_json_row(name, data, line), line), places)
    if len(items) == before:
        raise DataError(f"{file}: holds no rows")


def read_table(file: Path) -> list[Row]:
    """Read every row of a file whole; raises `DataError` for a broken row, and for a file without any."""
    return list(_rows(file))


def first_row(file: Path) -> Row:
    """Read the first row alone, the others unread where the format allows that; raises as `read_table`."""
    return next(_rows(file))


def _rows(file: Path) -> Iterator[Row]:
    read = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}[file.suffix.lower()]
    rows = read(file)
    first = next(rows, None)
    if first is None:
        raise DataError(f"{file}: holds no rows")
    yield first
    yield from rows


def decode(file: Path | str, data: bytes, first_line: int = 1) -> str:
    """Decode UTF-8, without a byte order mark; an error names the line."""
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        raise not_utf8(file, error, first_line) from None


def not_utf8(file: Path | str, error: UnicodeDecodeError, first_line: int) -> DataError:
    """Return the error of bytes that are no UTF-8; the first of those that were decoded stands on `first_line`."""
    line = first_line + error.object.count(b"\n", 0, error.start)
    return DataError(
        f"{file}:{line}: byte 0x{error.object[error.start]:02x} is not UTF-8; convert the file, "
        f"for instance with `iconv -f LATIN1 -t UTF-8`"
    )


def _find_column(file: Path, rows: Sequence[Row]) -> str:
    first = rows[0].values
    if usual := next((name for name in USUAL_COLUMNS if name in first), None):
        return usual
    strings = [column for column, value in first.items() if isinstance(value, str)]
    if file.suffix.lower() == ".csv":  # there every value is a string: leave out the columns of numbers
        strings = [column for column in strings if not all(_is_number(row.values[column]) for row in rows)]
    if len(strings) == 1:
        return strings[0]
    problem = f"which of {', '.join(strings)} holds the text?" if strings else "no column holds text;"
    raise DataError(
        f"{rows[0].origin}: {problem} name it with --text-column, or text_column in a plan "
        f"(the columns are {rows[0].columns})"
    )


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


def value_of(row: Row, column: str) -> Any:
    """Return the value in one column of a row; raises `DataError` where there is no such column."""
    if column not in row.values:
        raise DataError(f"{row.origin}: has no column {column!r}; the columns are {row.columns}")
    return row.values[column]


def row_text(row: Row, column: str) -> str:
    """Return the text in one column of a row; raises `DataError` where there is none, or none that can be encoded."""
    return checked_text(value_of(row, column), row.origin, f"column {column!r}")


def checked_text(value: Any, origin: str, what: str) -> str:
    """Return a value that must be text with something in it; else raise `DataError` that says where and what it is."""
    if not isinstance(value, str):
        kind = "null" if value is None else f"of type {type(value).__name__}"
        raise DataError(f"{origin}: {what} is {kind}, expected text; correct or delete the row")
    if not value.strip():
        raise DataError(f"{origin}: {what} is empty; fill it in or delete the row")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{origin}: {what} holds half of a surrogate pair (character {error.start + 1}), "
            f"which is no character; correct or delete the row"
        ) from None
    return value


def _as_row(values: Any, origin: str) -> Row:
    if not isinstance(values, dict):
        raise DataError(f'{origin}: expected a row such as {{"text": "..."}}, got a {type(values).__name__}')
    return Row(values, origin)


def _jsonl(file: Path) -> Iterator[Row]:
    for _, data, number in _lines(file):
        yield _json_row(file, data, number)


def _lines(file: Path) -> Iterator[tuple[int, bytes, int]]:
    """Yield the first byte, bytes and number of each line; refuse a blank line, except at the end."""
    start = blank = 0
    with file.open("rb") as handle:  # its lines end with \n alone: JSON text may hold U+2028
        for number, line in enumerate(handle, start=1):
            data = line.rstrip()
            if data and blank:
                raise DataError(f"{file}:{blank}: the line is empty; delete it")
            if data:
                yield start, data, number
            else:
                blank = blank or number
            start += len(line)


def _json_row(file: Path | str, data: bytes, number: int) -> Row:
    origin = f"{file}:{number}"
    try:
        return _as_row(json.loads(decode(file, data, number)), origin)
    except json.JSONDecodeError as error:
        problem = f"{error.msg} at column {error.colno}"
        raise DataError(f"{origin}: not valid JSON ({problem}); correct or delete the line") from None


def _json(file: Path) -> Iterator[Row]:
    """Read a list of rows, or a mapping with such a list under "data"; one row a line is read as .jsonl."""
    text = decode(file, file.read_bytes())
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            yield from _jsonl(file)
            return
        raise DataError(f"{file}:{error.lineno}: not valid JSON ({error.msg} at column {error.colno})") from None
    start = 0
    if isinstance(values, dict):
        start, values = _value_position(text, "data"), values.get("data")
    if not isinstance(values, list):
        raise DataError(f'{file}:1: expected a list of rows, or {{"data": [...]}}')
    yield from (_as_row(row, f"{file}:{line}") for line, row in zip(_element_lines(text, start), values, strict=True))


def _skip(text: str, position: int, characters: str) -> int:
    while position < len(text) and text[position] in characters:
        position += 1
    return position


def _value_position(text: str, wanted: str) -> int:
    """Return where the value of a key of the outermost mapping starts, in valid JSON; 0 if it is absent."""
    decoder = json.JSONDecoder()
    position = _skip(text, text.index("{") + 1, " \t\r\n,")
    found = 0
    while text[position] != "}":
        key, position = decoder.raw_decode(text, position)
        position = _skip(text, position, " \t\r\n:")
        found = position if key == wanted else found  # of a repeated key the last one counts, as in json.loads
        _, position = decoder.raw_decode(text, position)
        position = _skip(text, position, " \t\r\n,")
    return found


def _element_lines(text: str, start: int) -> Iterator[int]:
    """Yield the line on which each element of a list starts, in valid JSON."""
    decoder = json.JSONDecoder()
    position = _skip(text, text.index("[", start) + 1, " \t\r\n,")
    line, counted = 1, 0
    while text[position] != "]":
        line, counted = line + text.count("\n", counted, position), position
        yield line
        _, position = decoder.raw_decode(text, position)
        position = _skip(text, position, " \t\r\n,")


def _csv(file: Path) -> Iterator[Row]:
    """Read comma-separated values with a header; a field may span lines inside quotation marks."""
    text = decode(file, file.read_bytes()).rstrip("\r\n")
    previous_limit = csv.field_size_limit(2**31 - 1)  # the default refuses documents beyond 131,072 characters
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    line = 1
    try:
        for fields in reader:
            if header is None:
                header = fields
                if repeated := sorted({name for name in header if header.count(name) > 1}):
                    raise DataError(f"{file}:{line}: column {repeated[0]!r} appears more than once")
            elif not fields:
                raise DataError(f"{file}:{line}: the line is empty; delete it")
            elif len(fields) != len(header):
                raise DataError(
                    f"{file}:{line}: {len(fields)} fields where the header has {len(header)} ({', '.join(header)}); "
                    f"put text that holds a comma or a line end in quotation marks"
                )
            else:
                yield Row(dict(zip(header, fields, strict=True)), f"{file}:{line}")
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{file}:{line}: not valid CSV ({error})") from None
    finally:
        csv.field_size_limit(previous_limit)


def _parquet(file: Path) -> Iterator[Row]:
    import pyarrow  # slow to import, and only this format needs it
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            rows = (values for batch in table.iter_batches(batch_size=1024) for values in batch.to_pylist())
            for number, values in enumerate(rows, start=1):
                yield Row(values, f"{file}: row {number}")
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{file}: not a readable Parquet file ({error})") from None
