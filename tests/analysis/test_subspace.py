"""Shares outside a column space, ranks and intruder dimensions equal a float64 NumPy reference."""

import numpy as np
import pytest
import torch

from gaintune.analysis import SubspaceOptions
from gaintune.analysis.subspace.survey import compare_weights, share_outside
from gaintune.errors import ConfigError


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reference(before: np.ndarray, after: np.ndarray, top: int, epsilon: float) -> tuple[float, int, list[float]]:
    """Share outside by least squares onto the columns, and similarities by eigenvectors of the Gram matrices."""
    update = after - before
    fitted = before @ np.linalg.lstsq(before, update, rcond=None)[0]
    outside = ((update - fitted) ** 2).sum() / (update**2).sum()
    old = np.linalg.eigh(before @ before.T)[1][:, ::-1][:, : min(before.shape)]
    new = np.linalg.eigh(after @ after.T)[1][:, ::-1][:, :top]
    similarities = [max(abs(float(x @ y)) for x in old.T) for y in new.T]
    return outside, sum(each < epsilon for each in similarities), similarities


@pytest.mark.parametrize("shape", [(24, 10), (16, 16), (10, 24)], ids=["tall", "square", "wide"])
def test_low_rank_updates_equal_the_numpy_reference(shape):
    before = random(*shape)
    after = before + 2.0 * random(shape[0], 2, seed=1) @ random(2, shape[1], seed=2)
    settings = SubspaceOptions(top=6, epsilon=0.6)
    figures = compare_weights(before, after, settings)
    outside, intruders, similarities = reference(before.numpy(), after.numpy(), 6, 0.6)
    assert figures.rank == min(shape)
    assert figures.has_outside is (shape[0] > shape[1])
    assert figures.has_outside_rows is (shape[1] > shape[0])
    assert figures.outside == pytest.approx(outside, rel=1e-9, abs=1e-24)
    assert (figures.outside > 0.1) is figures.has_outside
    assert figures.similarities == pytest.approx(similarities, rel=1e-7)
    assert figures.intruders == intruders and 0 < intruders < 6
    assert figures.update_energy == pytest.approx(float(((after - before) ** 2).sum()), rel=1e-12)
    turned = compare_weights(before.T, after.T, settings)
    assert turned.outside == pytest.approx(figures.outside_rows, rel=1e-9, abs=1e-24)
    assert turned.outside_rows == pytest.approx(figures.outside, rel=1e-9, abs=1e-24)


def test_gains_leave_nothing_outside_the_column_space_but_may_leave_the_row_space():
    before = random(24, 10)
    gained = before * (1 + 0.3 * random(10, seed=1))
    figures = compare_weights(before, gained)
    assert figures.has_outside and figures.outside < 1e-28
    wide = compare_weights(before.T, before.T * (1 + 0.3 * random(24, seed=1)))
    assert wide.has_outside_rows and wide.outside_rows > 0.1


def test_an_update_of_nothing_has_no_shares_and_no_intruders():
    before = random(8, 5)
    figures = compare_weights(before, before.clone())
    assert figures.outside is None and figures.outside_rows is None and figures.outside_leading is None
    assert figures.intruders == 0 and min(figures.similarities) == pytest.approx(1.0)


def test_a_direction_from_nowhere_is_one_intruder_and_lies_outside():
    before = torch.diag(torch.tensor([5.0, 4.0, 3.0, 0.0], dtype=torch.float64))[:, :3]
    after = before.clone()
    after[3, 2] = 9.0  # the third direction is turned almost wholly into the fourth, which the weight never reached
    figures = compare_weights(before, after, SubspaceOptions(top=3, epsilon=0.5))
    assert figures.rank == 3 and figures.outside == pytest.approx(1.0)
    assert figures.intruders == 1 and figures.similarities[0] == pytest.approx(3 / 90**0.5)
    assert compare_weights(before, after, SubspaceOptions(top=3, epsilon=0.3)).intruders == 0


def test_the_rank_follows_the_tolerance_and_leading_directions_the_energy():
    basis, _ = np.linalg.qr(random(6, 6).numpy())
    before = torch.from_numpy(basis[:, :4] @ np.diag([10.0, 1.0, 1e-3, 1e-9]) @ np.linalg.qr(random(4, 4).numpy())[0])
    update = torch.from_numpy(np.outer(basis[:, 2], [1.0, 0, 0, 0]) + np.outer(basis[:, 5], [0, 2.0, 0, 0]))
    figures = compare_weights(before, before + update)
    assert figures.rank == 3  # 1e-9 of 10 is below 6 fp32 epsilons
    assert figures.outside == pytest.approx(0.8)
    assert figures.leading_rank == 1 and figures.outside_leading == pytest.approx(1.0)
    assert compare_weights(before, before + update, SubspaceOptions(tolerance=1e-2)).rank == 2
    assert compare_weights(before, before + update, SubspaceOptions(tolerance=0)).rank == 4
    assert compare_weights(before, before + update, SubspaceOptions(leading=1.0)).leading_rank == 3


def test_wrong_settings_and_weights_are_refused():
    for wrong in ({"top": 0}, {"epsilon": 0}, {"epsilon": 1.5}, {"leading": 0}, {"tolerance": 1.0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            SubspaceOptions.read(wrong, "here")
    with pytest.raises(ConfigError, match="one shape"):
        compare_weights(random(3, 2), random(2, 3))
    with pytest.raises(ConfigError, match="zero everywhere"):
        compare_weights(torch.zeros(3, 2), random(3, 2))
    assert share_outside(torch.zeros(3, 2), torch.eye(3)[:, :1]) is None
