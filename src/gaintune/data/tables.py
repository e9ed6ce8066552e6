"""Files of rows (.jsonl, .json, .csv, .parquet): a row is a document, and a mistake is named by its line."""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gaintune.data.documents import Document, Stored, T
from gaintune.errors import DataError

ROW_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
USUAL_COLUMNS = ("text", "content")


class Row(NamedTuple):
    """One row and its origin: "file:line", or "file: row n" where the format has no lines."""

    values: dict[str, Any]
    origin: str


def add_texts(documents: Stored[Document], file: Path, text_column: str | None = None) -> None:
    """Add the text column of every row.

    The column is `text_column`; or the one named `text` or `content`; or the only column of strings.

    Raises:
        DataError: a broken row, a missing, ambiguous or empty text, with the file and line.
    """
    rows = None if file.suffix.lower() == ".jsonl" else read_table(file)
    column = text_column or _find_column(file, rows or [first_row(file)])
    add_rows(documents, file, lambda row, _: Document(row_text(row, column), row.origin), rows)


def add_rows(items: Stored[T], file: Path, make: Callable[[Row, int], T], rows: Sequence[Row] | None = None) -> None:
    """Add what `make` makes of every row and its number, from 1.

    Rows of .jsonl stay in their file, and what is wrong with one is raised whenever it is read; those of other formats
    are read and checked now (unless given as `rows`, already read), and stay in memory.

    Raises:
        DataError: a broken row, or a file without any; and what `make` raises.
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
    rows = list(_rows(file))
    if not rows:
        raise DataError(f"{file}: holds no rows")
    return rows


def first_row(file: Path) -> Row:
    """Read the first row alone, the others unread where the format allows that; raises as `read_table`."""
    for row in _rows(file):
        return row
    raise DataError(f"{file}: holds no rows")


def _rows(file: Path) -> Iterator[Row]:
    return {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}[file.suffix.lower()](file)


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
    columns = list(rows[0].values)
    for usual in USUAL_COLUMNS:
        if usual in columns:
            return usual
    strings = [column for column in columns if isinstance(rows[0].values[column], str)]
    if file.suffix.lower() == ".csv":  # there every value is a string: leave out the columns of numbers
        strings = [column for column in strings if not all(_is_number(row.values[column]) for row in rows)]
    if len(strings) == 1:
        return strings[0]
    problem = f"which of {', '.join(strings)} holds the text?" if strings else "no column holds text;"
    raise DataError(
        f"{rows[0].origin}: {problem} name it with --text-column, or text_column in a plan "
        f"(the columns are {', '.join(columns) or 'none at all'})"
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
        columns = ", ".join(row.values) or "none at all"
        raise DataError(f"{row.origin}: has no column {column!r}; the columns are {columns}")
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
