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
