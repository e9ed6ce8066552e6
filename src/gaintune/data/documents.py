"""Documents that know where they came from, in one split or two; texts cut into passages."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

T = TypeVar("T")

PLACE = 4
"""Count of the numbers that locate an item: the file's number, its first byte, the byte after it, its line."""
HELD = -1
"""File number of items in memory; the second number of their place is their own."""
READ_AT_ONCE = 2**16  # bytes: items that follow one another share a read, and a lone one costs little more


@dataclass(frozen=True)
class Document:
    """One text that belongs together; `origin` is "file:line", "file: row n" or "file", for errors and records."""

    text: str
    origin: str


class Stored(Sequence[T]):
    """Documents (or rows) that stay in their files: an item is read when it is needed.

    Items of formats whose rows have no place of their own (.json, .csv, .parquet) are kept in memory.
    """

    def __init__(self) -> None:
        self._files: list[tuple[Path, Callable[[bytes, int], T]]] = []
        self._places = array("q")
        self._held: list[T] = []

    def add(self, file: Path, parse: Callable[[bytes, int], T], places: Iterable[tuple[int, int, int]]) -> None:
        """Add items of a file: first byte, byte after the last and line of each; `parse` takes its bytes and line."""
        number = len(self._files)
        self._files.append((file, parse))
        for place in places:
            self._places.extend((number, *place))

    def hold(self, items: Iterable[T]) -> None:
        """Add items that stay in memory."""
        for item in items:
            self._places.extend((HELD, len(self._held), 0, 0))
            self._held.append(item)

    def chosen(self, numbers: np.ndarray) -> Stored[T]:
        """Return some of the items, in the order of their numbers."""
        some = Stored[T]()
        some._files, some._held = self._files, self._held
        some._places.frombytes(self._table[numbers].tobytes())
        return some

    def beyond(self, size: int) -> np.ndarray:
        """Return the numbers of the items that may be longer than so many characters, without reading them."""
        files, starts, ends, _ = self._table.T
        return np.flatnonzero((files == HELD) | (ends - starts > size))

    def read(self, numbers: Iterable[int]) -> Iterator[T]:
        """Read items by their numbers, one after the other."""
        opened, handle = HELD, None
        try:
            for item in numbers:
                number, start, end, line = self._places[PLACE * item : PLACE * (item + 1)]
                if number == HELD:
                    yield self._held[start]
                    continue
                file, parse = self._files[number]
                if handle is None or number != opened:
                    if handle is not None:
                        handle.close()
                    opened, handle = number, file.open("rb", buffering=READ_AT_ONCE)
                handle.seek(start)
                yield parse(handle.read(end - start), line)
        finally:
            if handle is not None:
                handle.close()

    @property
    def _table(self) -> np.ndarray:
        return np.frombuffer(self._places, np.int64).reshape(-1, PLACE)

    def __len__(self) -> int:
        return len(self._places) // PLACE

    def __getitem__(self, number: Any) -> Any:
        """Read one item by its number, or a slice of them."""
        if isinstance(number, slice):
            return tuple(self.read(range(*number.indices(len(self)))))
        if not -len(self) <= number < len(self):
            raise IndexError(number)
        return next(self.read([number % len(self)]))

    def __iter__(self) -> Iterator[T]:
        return self.read(range(len(self)))


@dataclass(frozen=True)
class Documents(Generic[T]):
    """The documents (or rows) of one domain; `validation` is empty where the source does not bring its own split."""

    train: Sequence[T]
    validation: Sequence[T] = ()
    source: str = ""


def read_some(items: Sequence[T], numbers: Iterable[int]) -> Iterator[T]:
    """Read items by their numbers, one after the other, from a file or from memory."""
    return items.read(numbers) if isinstance(items, Stored) else map(items.__getitem__, numbers)


_BREAKS = ("\n\n", "\n", ". ", " ")


def cut_passages(text: str, size: int) -> Iterator[tuple[int, str]]:
    """Cut text into pieces of at most `size` characters, each with the position it starts at.

    A text of at most `size` characters is one piece, untouched. Pieces of a longer one lose the blank space at the cut
    and nothing else; a cut falls in the second half of the piece if there is any break to cut at.
    """
    start = 0
    for whole, lead, piece in cut_chunks([text], size):
        if piece or len(whole) == len(text):
            yield start + lead, piece
        start += len(whole)


def cut_chunks(chunks: Iterable[str], size: int) -> Iterator[tuple[str, int, str]]:
    """Cut text that comes in chunks, as `cut_passages` does, and give every piece beside all that was cut off with it.

    Returns:
        For each piece all of its text (these add up to the whole text), how many characters of it stand before the
        piece, and the piece; an empty piece where there is nothing but blank space.
    """
    following = iter(chunks)
    held, start, first = "", 0, True
    while True:
        while len(held) - start <= size and (chunk := next(following, None)) is not None:
            held, start = held[start:] + chunk, 0
        last = len(held) - start <= size
        if last and first:
            yield held, 0, held
            return
        if start == len(held):
            return
        end = len(held) if last else _cut(held, start, start + size)
        whole = held[start:end]
        lead = len(whole) - len(whole.lstrip("\n"))  # indentation of a first line is part of the text
        yield whole, lead, whole[lead:].rstrip()
        start, first = end, False


def _cut(text: str, start: int, limit: int) -> int:
    """Return where to cut before `limit`: after the last strongest break in its second half."""
    middle = (start + limit) // 2
    for mark in _BREAKS:
        position = text.rfind(mark, middle, limit)
        if position >= 0:
            return position + len(mark)
    return limit
