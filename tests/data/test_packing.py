"""Packing rows into blocks: order, what is never spread or scored, cut rows, and rows that leave nothing to learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gaintune.data.documents import Passage
from gaintune.data.examples import TokenRow, pack

FILLER = 99


def row(number: int, prompt: int, completion: int) -> TokenRow:
    """Tokens number*10, number*10 + 1, ...; every scored token stands for as many bytes as its place in the row."""
    count = prompt + completion
    return TokenRow(np.arange(count) + 10 * number, np.arange(count) >= prompt, np.arange(count), Passage("", number))


def numbers(result):
    return [passage.document for passage in result.passages]


def packed(rows, *, block_size=8, blocks=10, packing=True):
    return pack(iter(rows), block_size=block_size, blocks=blocks, filler=FILLER, packing=packing)


def test_rows_stay_whole_and_in_order_and_positions_start_anew():
    result = packed([row(1, 2, 1), row(2, 1, 2), row(3, 2, 2), row(4, 1, 1)])
    assert result.examples.input_ids.tolist() == [
        [10, 11, 12, 20, 21, 22, FILLER, FILLER],
        [30, 31, 32, 33, 40, 41, FILLER, FILLER],
    ]
    assert result.examples.labels.tolist() == [
        [-100, -100, 12, -100, 21, 22, -100, -100],
        [-100, -100, 32, 33, -100, 41, -100, -100],
    ]
    assert result.examples.position_ids is not None
    assert result.examples.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 0, 1], [0, 1, 2, 3, 0, 1, 0, 1]]
    assert result.bytes == (2 + 1 + 2, 2 + 3 + 1)
    assert (numbers(result), result.padding, result.cut) == ([1, 2, 3, 4], 4, 0)


def test_without_packing_a_row_has_a_block_of_its_own():
    result = packed([row(1, 2, 1), row(2, 1, 2)], packing=False, block_size=4)
    assert result.examples.input_ids.tolist() == [[10, 11, 12, FILLER], [20, 21, 22, FILLER]]
    assert result.examples.labels.tolist() == [[-100, -100, 12, -100], [-100, 21, 22, -100]]
    assert result.examples.position_ids is None


def test_it_stops_when_the_blocks_are_full_and_draws_no_further():
    drawn = []

    def rows():
        for number in range(1, 10):
            drawn.append(number)
            yield row(number, 2, 2)

    result = packed(rows(), blocks=2)
    assert numbers(result) == [1, 2, 3, 4]
    assert drawn == [1, 2, 3, 4, 5]
    assert result.padding == 0


def test_a_smaller_budget_is_the_beginning_of_a_larger_one():
    rows = [row(number, 1 + number % 3, 1 + number % 2) for number in range(1, 30)]
    small, large = packed(rows, blocks=3), packed(rows, blocks=6)
    for part in ("input_ids", "labels", "position_ids"):
        assert torch.equal(getattr(small.examples, part), getattr(large.examples, part)[:3])


def test_a_row_longer_than_a_block_is_cut_and_counted():
    result = packed([row(1, 3, 7), row(2, 1, 1)])
    assert result.examples.input_ids[0].tolist() == list(range(10, 18))
    assert result.examples.scored == (5, 1)
    assert (result.cut, result.longest) == (1, 10)


def test_nothing_is_kept_after_the_last_scored_token_of_a_cut_row():
    ids = np.arange(12)
    scored = np.isin(ids, [3, 10])
    result = packed([TokenRow(ids, scored, ids, Passage("", 0)), row(2, 1, 2)])
    assert result.examples.input_ids[0].tolist() == [0, 1, 2, 3, 20, 21, 22, FILLER]


@pytest.mark.parametrize("prompt", [8, 9, 20])
def test_a_prompt_that_fills_a_block_is_refused(prompt):
    result = packed([row(1, 1, 1), row(2, prompt, 3), row(3, 1, 1)])
    assert [each.passage.document for each in result.refused] == [2]
    assert numbers(result) == [1, 3]
    assert not packed([row(2, 7, 3)]).refused, "one token of the completion is enough"


@pytest.mark.parametrize("packing", [True, False])
def test_every_block_has_something_to_score(packing):
    generator = np.random.default_rng(0)
    rows = [row(n, int(generator.integers(1, 20)), int(generator.integers(1, 20))) for n in range(200)]
    result = packed(rows, block_size=16, blocks=50, packing=packing)
    assert min(result.examples.scored) >= 1
    assert len(result.examples) == 50
