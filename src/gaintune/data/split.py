"""The split into training and validation, and the order in which documents are drawn."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter

import numpy as np

from gaintune.data.documents import Document, Documents, Stored, T, cut_passages, read_some
from gaintune.data.neighbours import normalise
from gaintune.errors import DataError
from gaintune.progress import plural

VALIDATION_SHARE = 0.1
# A passage fills about two blocks: prose and code take four characters a token.
PASSAGE_CHARACTERS_PER_BLOCK_TOKEN = 8
PASSAGES_AT_ONCE = 256  # read ahead of what is drawn: little beside the pass over all documents


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

    Raises:
        DataError: there is only one text, so that one side would be empty; or a document in a file is broken.
    """
    if documents.validation:
        for side in (documents.train, documents.validation):
            deque(side, maxlen=0)
        return documents
    texts = map(key, documents.train)  # maps let a long text go before the next one is read
    draws = _draws(seed, "split", map(normalise, texts))
    if len(draws) < 2 or draws.min() == draws.max():
        same = ", all with the same text" if len(draws) > 1 else ""
        raise DataError(
            f"{documents.source}: {plural(len(draws), 'document')}{same}, and at least 2 different ones are needed, "
            f"to train on and to validate with; give more, or a folder with train and validation files"
        )
    threshold = max(int(VALIDATION_SHARE * 2**64), int(draws.min()) + 1)
    threshold = min(threshold, int(draws.max()))  # where all are below it, leave something to train on
    held_out = draws < np.uint64(threshold)
    sides = (_chosen(documents.train, ~held_out), _chosen(documents.train, held_out))
    return Documents(*sides, source=documents.source)


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
