"""Figures of token changes equal ones computed token by token; intervals cover; what cannot be is refused."""

import math

import numpy as np
import pytest

from gaintune.analysis.tokens.survey import BINS, range_of, summarise_changes
from gaintune.errors import ConfigError, DataError


def changes(rows: int = 12, tokens: int = 40, seed: int = 0, shift: float = 0.05):
    """Skewed changes, and a mask that leaves some tokens out."""
    generator = np.random.default_rng(seed)
    values = generator.gamma(2.0, 0.3, (rows, tokens)) - 0.6 + shift
    return values, generator.random((rows, tokens)) < 0.8


def test_every_figure_equals_one_computed_token_by_token():
    values, scored = changes()
    kept = [float(v) for row, mask in zip(values, scored, strict=True) for v, m in zip(row, mask, strict=True) if m]
    count = len(kept)
    mean = math.fsum(kept) / count
    moments = [math.fsum((each - mean) ** power for each in kept) / count for power in (2, 3)]
    size = math.fsum(map(abs, kept)) / count
    one = summarise_changes(values, scored, limit=1.0)
    assert (one.tokens, one.blocks) == (count, 12)
    assert one.mean.value == pytest.approx(mean) and one.mean_absolute == pytest.approx(size)
    assert one.deviation == pytest.approx(moments[0] ** 0.5)
    assert one.skew == pytest.approx(moments[1] / moments[0] ** 1.5) and one.skew > 0.5
    assert one.coherence.value == pytest.approx(abs(mean) / size)
    assert one.better == sum(each < 0 for each in kept) / count
    assert one.worse == sum(each > 0 for each in kept) / count
    assert one.quantiles[3] == pytest.approx(sorted(kept)[count // 2], abs=0.05)
    assert one.mean.low < mean < one.mean.high
    assert one.coherence.low <= one.coherence.value <= one.coherence.high


def test_histogram_bins_are_centred_on_zero_and_hold_everything():
    values = np.array([[0.0, 0.004, -0.006, 0.99, 5.0, -7.0, -1.0, 1.0]])
    one = summarise_changes(values, np.ones((1, 8), bool), limit=1.0)
    assert len(one.histogram) == BINS and sum(one.histogram) == 8
    assert one.histogram[BINS // 2] == 3  # |change| below 1 / 101
    assert one.histogram[0] == 2 and one.histogram[-1] == 3


def test_symmetric_changes_have_no_coherence_and_one_sided_ones_all():
    half = np.abs(np.random.default_rng(1).normal(size=(6, 50)))
    scored = np.ones((6, 100), bool)
    symmetric = summarise_changes(np.concatenate([half, -half], axis=1), scored, limit=1.0)
    assert symmetric.coherence.value == pytest.approx(0, abs=1e-12) and symmetric.skew == pytest.approx(0, abs=1e-9)
    noise = summarise_changes(np.random.default_rng(4).normal(size=(20, 30)), np.ones((20, 30), bool), limit=1.0)
    assert noise.mean.low < 0 < noise.mean.high and noise.coherence.low == 0 < noise.coherence.high < 0.3
    coherent = summarise_changes(np.concatenate([half, half], axis=1), scored, limit=1.0)
    assert coherent.coherence.value == coherent.coherence.low == coherent.coherence.high == 1.0
    assert coherent.worse == 1.0


def test_the_base_against_itself_is_exactly_nothing():
    one = summarise_changes(np.zeros((3, 5)), np.ones((3, 5), bool), limit=1.0)
    assert (one.mean.value, one.mean.low, one.mean.high, one.mean_absolute) == (0, 0, 0, 0)
    assert one.skew is None and one.coherence is None and one.better == one.worse == 0
    assert one.histogram[BINS // 2] == 15
    assert range_of([np.zeros(5)]) == 1.0


def test_one_block_leaves_nothing_to_resample():
    one = summarise_changes(np.array([[0.1, 0.2, -0.1]]), np.ones((1, 3), bool), limit=1.0)
    assert one.mean.low is None and one.mean.high is None and one.coherence.low is None


def test_the_interval_resamples_blocks_and_not_tokens():
    """Tokens of a block that move together leave as much doubt as there are blocks."""
    blocks = np.random.default_rng(2).normal(size=(10, 1))
    few = summarise_changes(blocks, np.ones((10, 1), bool), limit=1.0, domain="law")
    many = summarise_changes(np.repeat(blocks, 50, axis=1), np.ones((10, 50), bool), limit=1.0, domain="law")
    assert (many.mean.low, many.mean.high) == pytest.approx((few.mean.low, few.mean.high))
    other = summarise_changes(blocks, np.ones((10, 1), bool), limit=1.0, domain="law", seed=1)
    assert other.mean.low != few.mean.low and other.mean.value == few.mean.value


@pytest.mark.slow
def test_the_interval_covers_the_true_mean_at_about_its_confidence():
    generator = np.random.default_rng(3)
    hits = 0
    for _ in range(200):
        blocks = generator.normal(0.1, 0.3, (40, 1)) + generator.normal(0, 1, (40, 8))
        one = summarise_changes(blocks, np.ones((40, 8), bool), limit=1.0, samples=300)
        hits += one.mean.low <= 0.1 <= one.mean.high
    assert 182 <= hits <= 199  # 190 expected, 3.1 standard deviation


def test_wrong_arguments_are_refused():
    values, _ = changes(2, 3)
    for wrong in ({"bins": 100, "limit": 1.0}, {"bins": 1, "limit": 1.0}, {"limit": 0.0}, {"limit": -1.0}):
        with pytest.raises(ConfigError):
            summarise_changes(values, np.ones((2, 3), bool), **wrong)
    with pytest.raises(DataError, match="mask"):
        summarise_changes(values, np.ones((3, 2), bool), limit=1.0)
    with pytest.raises(DataError, match="a scored token in each row"):
        summarise_changes(values, np.array([[True] * 3, [False] * 3]), limit=1.0)
    with pytest.raises(DataError, match="not finite"):
        summarise_changes(np.full((2, 3), np.nan), np.ones((2, 3), bool), limit=1.0)
