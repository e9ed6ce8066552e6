"""Documents with their origin: kept in their files, split, cut into passages, and drawn by a seed."""

from __future__ import annotations

import hashlib
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from gaintune.data.neighbours import normalize
from gaintune.errors import DataError
from gaintune.progress import plural

T = TypeVar("T")

PLACE = 4  # numbers that locate an item: its file's number, its first byte, the byte after it, its line
HELD = -1  # file number of items in memory, whose own number stands in place of the first byte
READ_AT_ONCE = 2**16  # bytes: items that follow one another share a read, and a lone one costs little more
VALIDATION_SHARE = 0.1
# A passage fills about two blocks: prose and code take four characters a token.
PASSAGE_CHARACTERS_PER_BLOCK_TOKEN = 8
PASSAGES_AT_ONCE = 256  # read ahead of what is drawn: little beside the pass over all documents


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
        """Read one item by its number."""
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


@dataclass(frozen=True)
class Passage:
    """A document, a piece of a long one, or a row's question; `document` is the number of its document in its split."""

    text: str
    document: int


def _draws(seed: int, purpose: str, keys: Iterable[object]) -> np.ndarray:
    """Draw for every key a number below 2**64 that depends on it, the seed and the purpose alone, on every machine."""
    begin = hashlib.sha256(f"{seed}\x1f{purpose}\x1f".encode())

    def draw(key: object) -> int:
        digest = begin.copy()
        digest.update(str(key).encode())
        return int.from_bytes(digest.digest()[:8], "big")

    return np.fromiter(map(draw, keys), np.uint64)


def split_documents(documents: Documents[T], seed: int, key: Callable[[T], str] = attrgetter("text")) -> Documents[T]:
    """Split documents by a hash of the seed and their text; a source's own split is left as it is.

    `VALIDATION_SHARE` of the different texts go to validation, at least one. Texts that differ by case, spacing or
    punctuation alone are on the same side. A document keeps its side when others are added. `key` is the text of a
    document, or of a row the part that must not be on both sides. Every document is read once, whichever will be drawn.
    A DataError says that there is only one text, so that one side would be empty, or which document is broken.
    """
    if documents.validation:
        for side in (documents.train, documents.validation):
            deque(side, maxlen=0)
        return documents
    texts = map(key, documents.train)  # maps let a long text go before the next one is read
    draws = _draws(seed, "split", map(normalize, texts))
    if len(draws) < 2 or draws.min() == draws.max():
        same = ", all with the same text" if len(draws) > 1 else ""
        raise DataError(
            f"{documents.source}: {plural(len(draws), 'document')}{same}, and at least 2 different ones are needed, "
            f"to train on and to validate with; give more, or a folder with train and validation files"
        )
    threshold = max(int(VALIDATION_SHARE * 2**64), int(draws.min()) + 1)
    threshold = min(threshold, int(draws.max()))  # where all are below it, leave something to train on
    held_out = draws < np.uint64(threshold)
    return Documents(_chosen(documents.train, ~held_out), _chosen(documents.train, held_out), documents.source)


def _chosen(documents: Sequence[T], mask: np.ndarray) -> Sequence[T]:
    numbers = np.flatnonzero(mask)
    return documents.chosen(numbers) if isinstance(documents, Stored) else tuple(read_some(documents, numbers))


def in_drawn_order(documents: Sequence[Document], seed: int, side: str, block_size: int) -> Iterator[Passage]:
    """Yield passages of all documents in an order that the seed decides.

    A document longer than about two blocks is cut into passages that are drawn one by one, so that a small budget
    samples many documents rather than the beginning of one.
    """
    size = PASSAGE_CHARACTERS_PER_BLOCK_TOKEN * block_size
    counts = np.ones(len(documents), np.int64)
    long = documents.beyond(size) if isinstance(documents, Stored) else np.arange(len(documents))
    for number, document in zip(long, read_some(documents, long), strict=True):
        counts[number] = sum(1 for _ in cut_passages(document.text, size))
    firsts = np.cumsum(counts) - counts  # number of each document's first passage
    order = drawn_order(int(counts.sum()), seed, side)
    for start in range(0, len(order), PASSAGES_AT_ONCE):
        batch = order[start : start + PASSAGES_AT_ONCE]
        owners = np.searchsorted(firsts, batch, side="right") - 1
        read = np.unique(owners)  # a long document is read and cut once for all of its passages in the batch
        wanted = set(batch.tolist())
        texts: dict[int, str] = {}
        for number, document in zip(read, read_some(documents, read), strict=True):
            passages = enumerate(cut_passages(document.text, size), int(firsts[number]))
            texts |= {index: text for index, (_, text) in passages if index in wanted}
        yield from (Passage(texts[index], int(owner)) for index, owner in zip(batch.tolist(), owners, strict=True))


def drawn_order(count: int, seed: int, side: str) -> np.ndarray:
    """Return the numbers below `count` in an order that the seed decides for each side (such as "train")."""
    return np.argsort(_draws(seed, side, range(count)), kind="stable")
