"""What a step of a recipe that sweeps gives to claims: no verdict on a match that is none."""

import pytest

from gaintune.recipes.steps.sweep import numbers_of
from gaintune.workflows.sweep import compare_sweep
from support import tiny_sweep


def effect(in_domain, earlier):
    def of(lr, order, seed):
        wobble = 0.3 * (seed - 1)
        return in_domain[lr] + wobble, earlier + 0.7 * wobble

    return of


GAIN = effect({0.001: -8.0, 0.01: -16.0}, -6.0)


def test_a_difference_of_methods_that_are_not_matched_decides_nothing_about_a_match(tmp_path):
    methods = {"gain": GAIN, "far": effect({0.001: -22.0, 0.01: -30.0}, 4.0)}
    numbers, without = numbers_of(compare_sweep(tiny_sweep.synthetic(tmp_path, methods)))
    assert "matched.gain-minus-far" not in numbers and "gain-minus-far" not in numbers
    assert "not matched, 6.0 points apart in-domain" in without["matched.gain-minus-far"]

    def near(lr, order, seed):
        return GAIN(lr, order, seed)[0] + (0.1, -0.1, 0.05)[seed], 4.0 + 0.1 * seed

    methods = {"gain": GAIN, "near": near}
    numbers, without = numbers_of(compare_sweep(tiny_sweep.synthetic(tmp_path / "near", methods)))
    assert numbers["matched.gain-minus-near"].value == pytest.approx(-10.1, abs=0.3)
    assert without == {}


def test_methods_with_one_rate_each_have_a_plain_difference_matched_or_not(tmp_path):
    methods = {"gain": GAIN, "worse": effect({0.01: 5.0}, 4.0)}  # it improves nowhere
    numbers, without = numbers_of(compare_sweep(tiny_sweep.synthetic(tmp_path, methods, rates=(0.01,), orders=2)))
    assert numbers["gain-minus-worse"].value == pytest.approx(-10.0, abs=0.3)
    assert "worse improves in-domain at no rate" in without["matched.gain-minus-worse"]


def test_what_survives_at_a_rate_is_not_a_variant_s_best(tmp_path):
    def broken(lr, order, seed):
        return None if (lr, seed) == (0.01, 1) else (-30.0, -30.0)

    table = tiny_sweep.synthetic(tmp_path / "two", {"gain": GAIN, "broken": broken})
    numbers, without = numbers_of(compare_sweep(table))
    assert numbers["broken.best"].value == pytest.approx(-30.0, abs=0.3), "that of the other rate"
    assert "broken.worst" in without
    table = tiny_sweep.synthetic(tmp_path / "one", {"gain": GAIN, "broken": broken}, rates=(0.01,))
    numbers, without = numbers_of(compare_sweep(table))
    assert "broken.best" not in numbers and "diverged" in without["broken.best"]
