"""Replay: the ratio is exact, the draw even and repeatable, and rows of other shapes fit beside each other."""

import pytest
import torch

from gaintune.data import IGNORED, Examples, replayed_rows, with_replay


def domain(number: int, rows: int, length: int = 4) -> Examples:
    """Rows whose every token is 1000 * number + row."""
    return Examples.of_blocks((1000 * number + torch.arange(rows)).unsqueeze(1).repeat(1, length))


def firsts(examples: Examples) -> list[int]:
    return examples.input_ids[:, 0].tolist()


@pytest.mark.parametrize(
    ("new", "ratio", "rows"),
    [(10, 0.5, 5), (5, 0.5, 3), (5, 0.1, 1), (4, 0.1, 0), (15, 0.1, 2), (3, 2.0, 6), (7, 0.0, 0)],
)
def test_halves_are_rounded_up(new, ratio, rows):
    assert replayed_rows(new, ratio) == rows


def test_nothing_is_changed_at_ratio_0_or_in_the_first_domain():
    new = domain(9, 5)
    assert with_replay(new, [domain(1, 5)], 0.0, seed=0) is new
    assert with_replay(new, [], 0.5, seed=0) is new


def test_new_rows_are_all_kept_and_earlier_domains_share_evenly():
    new, earlier = domain(9, 10), [domain(1, 50), domain(2, 50), domain(3, 50)]
    mixed = firsts(with_replay(new, earlier, 1.1, seed=0))
    assert mixed[:10] == firsts(new)
    replayed = mixed[10:]
    assert len(replayed) == 11
    assert [sum(token // 1000 == number for token in replayed) for number in (1, 2, 3)] == [4, 4, 3]
    assert len(set(replayed)) == 11


def test_a_small_domain_is_gone_through_again_and_again():
    mixed = firsts(with_replay(domain(9, 8), [domain(1, 3)], 1.0, seed=0))[8:]
    assert {token: mixed.count(token) for token in mixed}.keys() == {1000, 1001, 1002}
    assert max(map(mixed.count, mixed)) - min(map(mixed.count, mixed)) == 1


def test_the_seed_and_the_stage_decide_the_draw():
    def draw(seed, stages=1):
        return firsts(with_replay(domain(9, 10), [domain(1, 100)] * stages, 0.5 * stages, seed))[10:]

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)
    assert draw(0) != draw(0, stages=2)[:5]


def test_text_beside_packed_rows_gets_positions_and_shorter_rows_a_filling_that_is_not_scored():
    packed = Examples(torch.full((2, 6), 7), torch.full((2, 6), IGNORED), torch.tensor([[0, 1, 2, 0, 1, 2]] * 2))
    mixed = with_replay(domain(9, 2), [packed], 0.5, seed=0)
    assert mixed.input_ids.shape == mixed.labels.shape == (3, 6)
    assert mixed.position_ids.tolist() == [[0, 1, 2, 3, 0, 1]] * 2 + [[0, 1, 2, 0, 1, 2]]
    assert mixed.labels[:2, :4].tolist() == domain(9, 2).labels.tolist()
    assert (mixed.labels[:2, 4:] == IGNORED).all()
    assert mixed.scored == (3, 3, 0)
