"""What every source of text hands on: documents that know where they came from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Document:
    """One text that belongs together; `origin` is "file:line", "file: row n" or "file", for errors and records."""

    text: str
    origin: str


@dataclass(frozen=True)
class Documents:
    """The documents of one domain; `validation` is None where the source does not bring its own split."""

    train: tuple[Document, ...]
    validation: tuple[Document, ...] | None = None
    source: str = ""
