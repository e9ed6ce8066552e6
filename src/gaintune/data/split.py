"""Which document is for training and which for validation, and in which order documents are drawn."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter

from gaintune.data.documents import Document, Documents, T, cut_passages
from gaintune.data.neighbours import normalise
from gaintune.errors import DataError
from gaintune.progress import plural

VALIDATION_SHARE = 0.1
# A passage fills about two blocks: prose and code take four characters a token.
PASSAGE_CHARACTERS_PER_BLOCK_TOKEN = 8


@dataclass(frozen=True)
class Passage:
    """A document, or a piece of a long one; `document` is the document's number in its split."""

    text: str
    document: int


def _draw(*parts: object) -> int:
    """A uniform number below 2**64 that depends on the parts alone: the same on every machine and version."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big")


def split_documents(documents: Documents[T], seed: int, key: Callable[[T], str] = attrgetter("text")) -> Documents[T]:
    """Give each document its side by a hash of the seed and its text; a source's own split is left as it is.

    `VALIDATION_SHARE` of the different texts go to validation, at least one. Texts that differ by case, spacing or
    punctuation alone are on the same side. A document keeps its side when others are added. `key` is the text of a
    document, or of a row the part that must not be on both sides.

    Raises:
        DataError: there is only one text, so that one side would be empty.
    """
    if documents.validation is not None:
        return documents
    draws = [_draw(seed, "split", normalise(key(document))) for document in documents.train]
    if len(set(draws)) < 2:
        same = ", all with the same text" if len(draws) > 1 else ""
        raise DataError(
            f"{documents.source}: {plural(len(draws), 'document')}{same}, and at least 2 different ones are needed, "
            f"to train on and to validate with; give more, or a folder with train and validation files"
        )
    threshold = max(int(VALIDATION_SHARE * 2**64), min(draws) + 1)
    if max(draws) < threshold:  # all of them fell below: leave something to train on
        threshold = max(draws)
    pairs = list(zip(draws, documents.train, strict=True))
    return Documents(
        train=tuple(document for draw, document in pairs if draw >= threshold),
        validation=tuple(document for draw, document in pairs if draw < threshold),
        source=documents.source,
    )


def in_drawn_order(documents: Sequence[Document], seed: int, side: str, block_size: int) -> Iterator[Passage]:
    """Passages of all documents in an order that the seed decides.

    A document longer than about two blocks is cut into passages that are ordered each by itself, so that a small budget
    samples many documents rather than the beginning of one.
    """
    size = PASSAGE_CHARACTERS_PER_BLOCK_TOKEN * block_size
    passages = [
        Passage(text, number)
        for number, document in enumerate(documents)
        for _, text in cut_passages(document.text, size)
    ]
    return (passages[index] for index in drawn_order(len(passages), seed, side))


def drawn_order(count: int, seed: int, side: str) -> list[int]:
    """The numbers below `count` in an order that the seed decides for each side (such as "train")."""
    return sorted(range(count), key=lambda index: (_draw(seed, side, index), index))
