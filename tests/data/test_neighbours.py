"""Near-duplicates: what counts as one, against sets of word runs computed the plain way."""

from __future__ import annotations

import random
import re

import pytest

from gaintune.data import neighbours
from gaintune.data.neighbours import CONTAINMENT, SHINGLE_WORDS, NeighbourIndex, normalise

WIDE = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")
SENTENCE = "Operating profit of the company rose clearly in the third quarter compared with the year before"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (SENTENCE, True),
        (SENTENCE.upper().replace(" ", "  ") + " !", True),
        (SENTENCE.replace("third", "second"), True),
        ("Yesterday it was reported: " + SENTENCE, True),
        ("Operating profit of the company fell, and nobody knew why that was or what could be done", False),
        ("Short text!", True),
        ("short text indeed", False),
        ("???", True),
        ("!!!", False),
        ("今日は天気がとても良いので散歩", True),
        ("今日は仕事が忙しくて何もできない", False),
    ],
)
def test_what_is_a_near_duplicate(text, expected):
    trained_on = [SENTENCE, "short text", "???", "今日は天気がとても良いので散歩に行きます"]
    index = NeighbourIndex(enumerate(trained_on))
    assert (text in index) is expected


def test_words_are_the_runs_of_letters_and_digits_and_every_character_of_chinese_and_japanese(monkeypatch):
    def plain(text):
        spaced = "".join(f" {c} " if WIDE.fullmatch(c) else c if c.isalnum() or c == "_" else " " for c in text)
        return " ".join(spaced.split())

    characters = [chr(code) for code in (*range(0x3200), *range(0x3400, 0xD800, 97), *range(0xF8F0, 0x11000, 7))]
    for character in characters:
        text = f"Some {character}Words{character}{character} of_1 Sentence " + "and its End " * 10
        assert normalise(text) == plain(text.casefold()), ascii(character)
    long = "".join(characters)
    assert normalise(long) == plain(long.casefold())
    monkeypatch.setattr(neighbours, "NORMALISED_AT_ONCE", 50)
    assert normalise(long) == plain(long.casefold())
    assert normalise(" ?! \n") == "?!"


def test_two_documents_that_hold_half_each_do_not_add_up():
    words = [f"word{number}" for number in range(60)]
    parts = [" ".join(words[start : start + 20]) for start in (0, 20, 40)]
    whole = " ".join(words)
    assert whole not in NeighbourIndex(enumerate(parts))
    assert whole in NeighbourIndex((0, part) for part in parts), "pieces of one document do"


def test_a_run_that_a_document_repeats_counts_once():
    repeated, other = (" ".join(f"{name}{number}" for number in range(12)) for name in ("word", "other"))
    query = f"{repeated} {other} " + " ".join(f"new{number}" for number in range(8))
    index = NeighbourIndex([(0, repeated), (0, repeated + " indeed"), (0, "so " + repeated), (1, other)])
    assert query not in index


def test_it_agrees_with_plain_sets_of_word_runs():
    rng = random.Random(0)
    documents = [" ".join(rng.choices("abcd", k=rng.randint(6, 30))) for _ in range(40)]
    queries = [" ".join(rng.choices("abcd", k=rng.randint(6, 30))) for _ in range(200)]

    def runs(text):
        words = normalise(text).split()
        return {tuple(words[start : start + SHINGLE_WORDS]) for start in range(len(words) - SHINGLE_WORDS + 1)}

    index = NeighbourIndex(enumerate(documents))
    expected = [
        max(len(runs(query) & runs(document)) for document in documents) >= CONTAINMENT * len(runs(query))
        for query in queries
    ]
    assert [query in index for query in queries] == expected
    assert 10 < sum(expected) < 190


def test_an_empty_index_holds_nothing():
    assert SENTENCE not in NeighbourIndex([])
