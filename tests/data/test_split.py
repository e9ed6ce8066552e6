"""The split by document, and the order in which documents are drawn."""

from __future__ import annotations

import hashlib

import pytest

from gaintune.data.documents import Document, Documents, drawn_order, in_drawn_order, split_documents
from gaintune.errors import DataError


def documents(texts):
    return Documents(tuple(Document(text, f"f:{line}") for line, text in enumerate(texts, 1)), source="f")


def sides(texts, seed=0):
    split = split_documents(documents(texts), seed)
    return {d.text for d in split.train}, {d.text for d in split.validation}


def test_the_split_is_disjoint_complete_and_near_its_share():
    texts = [f"document {number}" for number in range(2000)]
    train, validation = sides(texts)
    assert not train & validation
    assert train | validation == set(texts)
    assert 150 < len(validation) < 250
    assert sides(texts) == (train, validation)
    assert sides(texts, seed=1)[1] != validation


def test_a_document_keeps_its_side_when_others_come_and_wherever_it_stands():
    texts = [f"document {number}" for number in range(200)]
    more = [f"another {number}" for number in range(100)]
    _, validation = sides(texts)
    assert sides([*more, *reversed(texts)])[1] & set(texts) == validation


def test_texts_that_differ_by_case_spacing_or_punctuation_are_on_the_same_side():
    texts = [variant for n in range(100) for variant in (f"document {n}", f"Document  {n}!", f"document {n}")]
    train, validation = sides(texts)
    assert len(validation) % 2 == 0
    assert not {text.lower().replace("  ", " ").rstrip("!") for text in train} & validation


@pytest.mark.parametrize("seed", range(20))
def test_two_different_documents_are_enough(seed):
    train, validation = sides(["one", "two"], seed)
    assert len(train) == len(validation) == 1


def test_one_text_cannot_be_split():
    with pytest.raises(DataError, match=r"f: 2 documents, all with the same text, and at least 2 different ones are"):
        split_documents(documents(["same", "Same."]), 0)
    with pytest.raises(DataError, match=r"f: 1 document, and at least 2 different ones are needed"):
        split_documents(documents(["alone"]), 0)


def test_a_split_that_the_source_brings_is_kept():
    own = Documents((Document("a", "x"),), (Document("a", "y"),), "f")
    assert split_documents(own, 0) == own


def test_the_order_is_that_of_the_hashes_of_the_numbers():
    """The order of earlier versions: sorted by SHA-256 of seed, side and number, joined by a unit separator."""

    def place(number):
        return hashlib.sha256(f"3\x1ftrain\x1f{number}".encode()).digest()[:8]

    assert list(drawn_order(700, 3, "train")) == sorted(range(700), key=place)
    source = [Document(f"text {number}", f"f:{number}") for number in range(700)]  # more than are read at once
    drawn = in_drawn_order(source, 3, "train", block_size=64)
    assert [passage.document for passage in drawn] == sorted(range(700), key=place)


def test_long_documents_are_drawn_in_passages_that_keep_every_word():
    long = "\n\n".join(f"{name} paragraph {number} " + "word " * 20 for name in "ab" for number in range(20))
    source = [Document(long, "f:1"), Document("  short, untouched \n", "f:2")]
    passages = list(in_drawn_order(source, 0, "train", block_size=64))
    assert [p.text for p in passages if p.document == 1] == ["  short, untouched \n"]
    pieces = [p.text for p in passages if p.document == 0]
    assert all(len(piece) <= 8 * 64 for piece in pieces)
    assert sorted(" ".join(pieces).split()) == sorted(long.split())
    assert pieces != sorted(pieces, key=long.index), "passages are shuffled"
    assert passages == list(in_drawn_order(source, 0, "train", block_size=64))
    assert passages != list(in_drawn_order(source, 1, "train", block_size=64))
