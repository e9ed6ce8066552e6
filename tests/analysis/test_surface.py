"""Ranges and barriers of losses on lines and planes, against ones whose truth is known."""

import numpy as np
import pytest

from gaintune.analysis.landscape.directions import Geometry
from gaintune.analysis.landscape.survey import Surface, range_apart
from gaintune.config import EvaluateConfig
from gaintune.results import DomainLoss


def surface(places, nats):
    """What was seen at some places, nats a token on blocks of 100 tokens, `(places, blocks)`."""
    tokens = (100,) * nats.shape[1]
    points = {
        position: {"d": DomainLoss(tuple(100 * row), tokens, tokens)}
        for position, row in zip(places, nats, strict=True)
    }
    labels = ("one", "other")[: len(places[0])]
    return Surface(labels, "gains", "float32", Geometry((1.0,), 1.0), points, EvaluateConfig(bootstrap_samples=400))


def noisy_line(heights, generator):
    """A line that rises so in the mean over all text, seen on 8 blocks of it."""
    noise = np.array([[0.0], [1.0], [1.0]]) * generator.normal(0, 0.1, (3, 8))
    return surface([(0.0,), (0.5,), (1.0,)], 3.0 + np.array(heights)[:, None] + noise)


def flat_plane(noise, blocks, generator):
    """A plane that rises nowhere in the mean over all text, seen on some blocks that rise along both directions."""
    slopes = generator.normal(0, noise, (2, blocks))
    places = [(t, u) for t in (0.0, 0.5, 1.0) for u in (0.0, 0.5, 1.0)]
    return surface(places, np.array([3.0 + t * slopes[0] + u * slopes[1] for t, u in places]))


def steep_and_flat(generator):
    return noisy_line((0.0, 0.2, 0.5), generator), noisy_line((0.0, -0.1, -0.3), generator)


def test_the_difference_of_two_ranges_is_paired():
    steep, flat = steep_and_flat(np.random.default_rng(12))
    apart, other = range_apart(steep, flat, "d"), range_apart(flat, steep, "d")
    assert apart.value == pytest.approx(steep.figures("d").range.value - flat.figures("d").range.value)
    assert (other.value, other.low, other.high) == pytest.approx((-apart.value, -apart.high, -apart.low))
    same = range_apart(steep, steep, "d")
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)


@pytest.mark.slow
def test_the_difference_of_two_ranges_is_covered():
    generator, held = np.random.default_rng(12), 0
    for _ in range(300):
        apart = range_apart(*steep_and_flat(generator), "d")
        held += apart.low <= 0.2 <= apart.high
    assert 0.93 < held / 300 < 0.99


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [4, 8])
def test_of_two_flat_planes_the_noisier_one_is_seldom_said_to_be_wider(blocks):
    generator, wider = np.random.default_rng(13), 0
    for _ in range(600):
        apart = range_apart(flat_plane(0.2, blocks, generator), flat_plane(0.02, blocks, generator), "d")
        wider += apart.low > 0
    assert wider / 600 < 0.06


@pytest.mark.slow
@pytest.mark.parametrize(("bump", "seen"), [(0.0, 0.02), (0.3, 0.98)])
def test_a_barrier_is_as_uncertain_as_its_blocks(bump, seen):
    """Lines that rise by `bump` half-way in the mean over all text: a flat one seldom shows a barrier, a hill does."""
    generator, held, above = np.random.default_rng(11), 0, 0
    for _ in range(400):
        found = noisy_line((0.0, bump, 0.0), generator).figures("d")
        held += found.barrier.low <= bump <= found.barrier.high
        above += found.barrier.low > 0
    assert held / 400 > 0.92
    assert abs(above / 400 - seen) < 0.03
