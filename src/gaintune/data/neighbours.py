"""Near-duplicates: how much of a text is found, word for word, in a text that is trained on."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import cache

import numpy as np

SHINGLE_WORDS = 5
CONTAINMENT = 0.5
COMMON_DOCUMENTS = 3

# Chinese and Japanese do not put spaces between words: there a character counts as one.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+")
_BEYOND_ASCII = re.compile(r"[^\x00-\x7f]")
# Translates bytes of UTF-8 so that words alone are left: of ASCII, all that is in no word becomes a space.
_SPACED = bytes(code if code > 0x7F or _WORD.match(chr(code)) else ord(" ") for code in range(256))
_BLANK = re.compile(r"\s")
NORMALIZED_AT_ONCE = 2**20  # characters
SPARSE = 16  # with more than one extra byte in so many characters, words are found faster one by one


def normalize(text: str) -> str:
    """Reduce a text to its words in lower case, so that case, spacing and punctuation make no difference."""
    if len(text) <= NORMALIZED_AT_ONCE:
        return _words(text) or text.strip()
    return " ".join(filter(None, map(_words, _between_words(text)))) or text.strip()


def _between_words(text: str) -> Iterator[str]:
    """Cut a long text at blank space, because its words as separate strings take ten times its memory."""
    start = 0
    while blank := _BLANK.search(text, start + NORMALIZED_AT_ONCE):
        yield text[start : blank.start()]
        start = blank.end()
    yield text[start:]


def _words(text: str) -> str:
    folded = text.casefold()
    data = folded.encode()
    if len(data) - len(folded) > len(folded) // SPARSE:
        return " ".join(_WORD.findall(folded))
    if len(data) > len(folded):
        data = _BEYOND_ASCII.sub(lambda found: _spaced(found[0]), folded).encode()
    return b" ".join(data.translate(_SPACED).split()).decode()


@cache
def _spaced(character: str) -> str:
    """Spell one character between letters: as part of a word, as a word by itself, or as a space."""
    return " ".join(_WORD.findall(f"a{character}a"))[1:-1]


class NeighbourIndex:
    """Index of documents, which holds a text if it is a near-duplicate of one of them.

    A text is one if at least `CONTAINMENT` of its distinct shingles (runs of `SHINGLE_WORDS` words, normalized) occur
    in the same document; a text too short for a shingle, if a document or piece equals it after normalization.

    With `common`, shingles in more than that share of the documents (and in more than `COMMON_DOCUMENTS` of them) do
    not count: they are what the documents have in common, such as an instruction that begins every prompt. A text that
    holds nothing else is a near-duplicate of a document that it equals after normalization.
    """

    def __init__(self, pieces: Iterable[tuple[int, str]], common: float | None = None) -> None:
        """Index pieces of text, each with the number of the document it belongs to."""
        self._vocabulary: dict[str, int] = {}
        self._short: set[str] = set()
        self._common = np.empty(0, np.int64)
        hashes, owners = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
        for document, text in pieces:
            shingles = self._shingles(text)
            hashes.append(shingles)
            owners.append(np.full(len(shingles), document, np.int64))
            if common is not None or not len(shingles):
                self._short.add(normalize(text))
        pairs = np.stack([np.concatenate(hashes).view(np.int64), np.concatenate(owners)])
        pairs = np.unique(pairs, axis=1)  # sorted by hash, a shingle once for each document
        if common is not None:
            different, counts = np.unique(pairs[0], return_counts=True)
            limit = max(common * len(np.unique(pairs[1])), COMMON_DOCUMENTS)
            self._common = different[counts > limit]
            pairs = pairs[:, ~np.isin(pairs[0], self._common)]
        self._hashes, self._owners = pairs[0], pairs[1]

    def __contains__(self, text: str) -> bool:
        shingles = self._shingles(text).view(np.int64)
        shingles = shingles[~np.isin(shingles, self._common)]
        if not len(shingles):
            return normalize(text) in self._short
        first = np.searchsorted(self._hashes, shingles, side="left")
        last = np.searchsorted(self._hashes, shingles, side="right")
        needed = CONTAINMENT * len(shingles)
        held = last > first
        if held.sum() < needed:  # not even all documents together hold enough of it
            return False
        ranges = zip(first[held], last[held], strict=True)
        owners = np.concatenate([self._owners[start:end] for start, end in ranges])
        _, counts = np.unique(owners, return_counts=True)
        return bool(counts.max() >= needed)

    def _shingles(self, text: str) -> np.ndarray:
        """Return the distinct 64-bit hashes of a text's shingles; equal words have equal numbers."""
        vocabulary = self._vocabulary
        numbers = [vocabulary.setdefault(word, len(vocabulary) + 1) for word in normalize(text).split()]
        words = _mix(np.array(numbers, np.uint64))
        count = len(words) - SHINGLE_WORDS + 1
        if count <= 0:
            return np.empty(0, np.uint64)
        total = np.zeros(count, np.uint64)
        for offset in range(SHINGLE_WORDS):
            total = _mix(total + words[offset : offset + count])
        return np.unique(total)


def _mix(values: np.ndarray) -> np.ndarray:
    """Mix bits as SplitMix64's finalizer does (Steele, Lea and Flood 2014): a bijection on 64 bits."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
