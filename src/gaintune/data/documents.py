"""What every source hands on: documents that know where they came from, in one split or two."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Document:
    """One text that belongs together; `origin` is "file:line", "file: row n" or "file", for errors and records."""

    text: str
    origin: str


@dataclass(frozen=True)
class Documents(Generic[T]):
    """The documents (or rows) of one domain; `validation` is None where the source does not bring its own split."""

    train: tuple[T, ...]
    validation: tuple[T, ...] | None = None
    source: str = ""


_BREAKS = ("\n\n", "\n", ". ", " ")


def cut_passages(text: str, size: int) -> list[tuple[int, str]]:
    """Cut text into pieces of at most `size` characters, each with the position it starts at.

    A text of at most `size` characters is one piece, untouched. Pieces of a longer one lose the blank space at the cut
    and nothing else; a cut falls in the second half of the piece if there is any break to cut at.
    """
    if len(text) <= size:
        return [(0, text)]
    pieces = []
    start = 0
    while start < len(text):
        end = len(text) if len(text) - start <= size else _cut(text, start, start + size)
        piece = text[start:end]
        if piece.strip():
            lead = len(piece) - len(piece.lstrip("\n"))  # indentation of a first line is part of the text
            pieces.append((start + lead, piece[lead:].rstrip()))
        start = end
    return pieces


def _cut(text: str, start: int, limit: int) -> int:
    """The best place to cut before `limit`: after the last strongest break in the second half of the piece."""
    middle = (start + limit) // 2
    for mark in _BREAKS:
        found = text.rfind(mark, middle, limit)
        if found >= 0:
            return found + len(mark)
    return limit
