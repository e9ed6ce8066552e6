"""Intervals cover the truth as often as they say, replicates and blocks both count, and verdicts follow intervals."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from gaintune.config import EvaluateConfig
from gaintune.errors import DataError
from gaintune.results import (
    Curve,
    DomainLoss,
    Interval,
    MethodRun,
    Stage,
    build_matrix,
    changes_of,
    curve_difference,
    judge,
    mean_change,
    mean_of_independent,
    paired_bootstrap,
    paired_change,
    paired_shares,
    reach,
    replicated,
    sign_flip_test,
)
from support import refused


def coverage(make, truth, trials):
    """Share of intervals that hold the truth."""
    found = [make(trial) for trial in range(trials)]
    return sum(each.low <= truth <= each.high for each in found) / trials


@pytest.mark.slow
@pytest.mark.parametrize(("items", "confidence"), [(8, 0.95), (40, 0.95), (40, 0.8)])
def test_paired_bootstrap_covers_at_the_nominal_rate(items, confidence):
    """Student's interval is exact for these samples: how often it covers says how lucky their draw (seeded) was."""
    trials = 2000
    samples = np.random.default_rng(7).normal(0.3, 1.0, (trials, items))
    reach = stats.sem(samples, axis=1) * stats.t.ppf(0.5 + confidence / 2, items - 1)
    luck = np.mean(np.abs(samples.mean(axis=1) - 0.3) <= reach) - confidence
    options = {"samples": 400, "confidence": confidence}
    rate = coverage(lambda trial: paired_bootstrap(samples[trial], **options, seed=trial), 0.3, trials)
    assert abs(luck) < 2.6 * math.sqrt(confidence * (1 - confidence) / trials)
    assert abs(rate - luck - confidence) < 0.006


@pytest.mark.slow
def test_paired_bootstrap_covers_for_differences_of_right_and_wrong_answers():
    samples = np.random.default_rng(8).choice([-1.0, 0.0, 1.0], p=[0.1, 0.7, 0.2], size=(600, 100))
    assert 0.925 < coverage(lambda trial: paired_bootstrap(samples[trial], samples=600, seed=trial), 0.1, 600) < 0.975


def measured(nats):
    return DomainLoss(tuple(100 * nats), (100,) * len(nats), (400,) * len(nats))


@pytest.mark.slow
@pytest.mark.parametrize(("blocks", "least"), [(2, 0.91), (4, 0.935), (8, 0.935)])
def test_changes_of_perplexity_cover_at_the_nominal_rate(blocks, least):
    """Percentiles that are not widened cover 52, 80 and 90 %."""
    generator, truth = np.random.default_rng(21), 100 * math.expm1(-0.2)
    text = generator.normal(3.0, 0.8, (1000, blocks))
    after = text + generator.normal(-0.2, 0.1, (1000, blocks))

    def change(trial):
        settings = EvaluateConfig(bootstrap_samples=300, seed=trial)
        return paired_change(measured(text[trial]), measured(after[trial]), "d", settings)

    assert least < coverage(change, truth, 1000) < 0.965


@pytest.mark.slow
@pytest.mark.parametrize(("domains", "blocks"), [(1, 2), (1, 4), (1, 8), (8, 2), (8, 4), (8, 8)])
def test_means_over_domains_and_differences_of_methods_cover_at_the_nominal_rate(domains, blocks):
    """Student's t is in each figure once; in each of eight domains by itself it made intervals cover 98 to 100 %."""
    generator, truth, trials = np.random.default_rng(22), 100 * math.expm1(-0.2), 400
    names = [f"d{number}" for number in range(domains)]
    single, difference = [], []
    for trial in range(trials):
        text = {name: generator.normal(3.0, 0.8, blocks) for name in ("first", *names)}
        base = {name: measured(nats) for name, nats in text.items()}
        runs = []
        for label in ("one", "other"):
            after = {name: measured(nats + generator.normal(-0.2, 0.1, blocks)) for name, nats in text.items()}
            runs.append(MethodRun(label, base, (Stage("first", after),)))
        matrix = build_matrix(runs, EvaluateConfig(bootstrap_samples=300, seed=trial), planned=["first"])
        single.append(matrix.methods[0].summary.forward_interference)
        difference.append(matrix.comparisons[0].summary.forward_interference)
    for found, true in ((single, truth), (difference, 0.0)):
        assert 0.92 <= coverage(found.__getitem__, true, trials) <= 0.975


@pytest.mark.slow
@pytest.mark.parametrize(("blocks", "least"), [(2, 0.9), (4, 0.925), (8, 0.93)])
def test_means_over_domains_of_unequal_spread_cover(blocks, least):
    """Each of eight domains varies half as much as the one before it: the first few have nearly all the variance."""
    generator, truth, spread = np.random.default_rng(24), 100 * math.expm1(-0.2), 0.15 * 0.5 ** np.arange(8)
    names = [f"d{number}" for number in range(8)]

    def change(trial):
        settings, same = EvaluateConfig(bootstrap_samples=300, seed=trial), measured(np.full(blocks, 3.0))
        after = {n: measured(generator.normal(2.8, s, blocks)) for n, s in zip(names, spread, strict=True)}
        return mean_change([changes_of(same, [after[n]], n, settings)[0] for n in names], settings)

    assert least < coverage(change, truth, 600) < 0.97


def test_cells_of_one_domain_share_its_blocks():
    """Two cells of one domain are as uncertain as one; two domains of equal spread are less, and surer of it."""
    one, other = (np.random.default_rng(seed).normal(0.0, 1.0, (4001, 1)) for seed in (0, 1))
    student = stats.t.ppf(0.975, [4, 10]) / stats.norm.ppf(0.975)
    assert reach(2 * one, [5], 0.95) == pytest.approx(student[0])
    assert reach(np.hstack([one, other]), [5, 5], 0.95) == pytest.approx(student[1], rel=1e-3)
    assert reach(np.hstack([one, 0 * other]), [5, 1], 0.95) == pytest.approx(student[0])
    assert reach(0 * one, [5], 0.95) == 1.0
    settings = EvaluateConfig()
    blocks = np.random.default_rng(2).normal(2.8, 0.1, (2, 5))
    text = measured(np.full(5, 3.0))
    first = changes_of(text, [measured(blocks[0])], "a", settings)[0]
    second = changes_of(text, [measured(blocks[1])], "b", settings)[0]
    assert mean_change([first, first], settings) == mean_change([first], settings)
    assert mean_change([first, second], settings, less=[second, first]) == Interval(0.0, 0.0, 0.0)
    apart = mean_change([first, second], settings, less=[second, second])
    halves = mean_change([first], settings, less=[second])
    assert apart.high - apart.low == pytest.approx((halves.high - halves.low) / 2)


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "up", "down"), [(20, 0.1, 0.3), (60, 0.05, 0.02), (400, 0.02, 0.0), (400, 0.1, 0.1)])
def test_differences_of_right_answers_cover_where_few_rows_flip(rows, up, down):
    generator, found = np.random.default_rng(23), []
    for flipped in generator.multinomial(rows, [up, down, 1 - up - down], size=1000):
        found.append(paired_shares(np.repeat([0.0, 1.0, 1.0], flipped), np.repeat([1.0, 0.0, 1.0], flipped)))
    assert 0.935 < coverage(found.__getitem__, up - down, 1000) < 0.995


def test_no_flip_is_no_certainty_but_a_model_against_itself_is():
    answers = np.repeat([0.0, 1.0], 30)
    assert paired_shares(answers, answers) == Interval(0.0, 0.0, 0.0)
    none = paired_shares(answers, answers.copy())
    reach = 1.959964 * math.sqrt(2 / 62 / 62)
    assert (none.value, none.low, none.high) == pytest.approx((0.0, -reach, reach))
    assert judge(none, (-0.04, 0.04)) == "undecided" and judge(none, (-0.05, 0.05)) == "reproduced"
    every = paired_shares(np.zeros(9), np.ones(9))
    assert every.value == every.high == 1.0 and every.low > 0.4
    assert paired_shares([1.0], [0.0]) == Interval(-1.0, None, None)


def test_means_of_independent_figures_add_their_errors_as_squares():
    found = mean_of_independent([Interval(1.0, 0.0, 3.0), Interval(5.0, 1.0, 8.0)])
    below, above = math.sqrt(1 + 16) / 2, math.sqrt(4 + 9) / 2
    assert (found.value, found.low, found.high) == pytest.approx((3, 3 - below, 3 + above))
    alone = Interval(1.0, 0.5, 4.0)
    assert mean_of_independent([alone]) == alone
    assert mean_of_independent([alone, Interval(3.0, None, None)]) == Interval(2.0, None, None)
    with pytest.raises(DataError):
        mean_of_independent([])


def test_paired_bootstrap_agrees_with_a_plain_loop():
    values = np.random.default_rng(0).exponential(1.0, 300) - 0.8
    found = paired_bootstrap(values, samples=4000)
    generator = np.random.default_rng(99)
    low, high = np.quantile([values[generator.integers(0, 300, 300)].mean() for _ in range(4000)], [0.025, 0.975])
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(low, abs=0.012) and found.high == pytest.approx(high, abs=0.012)
    assert paired_bootstrap(values, samples=4000) == found
    assert paired_bootstrap(values, samples=4000, seed=1) != found


def test_one_item_or_one_replicate_has_no_interval():
    change = paired_change(measured(np.array([3.0])), measured(np.array([3.5])), "d", EvaluateConfig())
    assert (change.value, change.low, change.high) == (pytest.approx(100 * math.expm1(0.5)), None, None)
    assert paired_bootstrap([2.0]) == Interval(2.0, None, None)
    assert replicated([2.0]) == Interval(2.0, None, None)
    assert replicated(np.ones((1, 50))) == Interval(1.0, None, None)
    assert replicated([1.0, 3.0], groups=[4, 4]) == Interval(2.0, None, None)
    for empty in ([], [math.nan]):
        with pytest.raises(DataError):
            paired_bootstrap(empty)
        with pytest.raises(DataError):
            replicated(empty)


def test_plain_replicates_get_student_s_interval():
    values = [-1.0, 0.5, -0.3, -2.0]
    low, high = stats.t.interval(0.9, 3, np.mean(values), stats.sem(values))
    found = replicated(values, confidence=0.9)
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))


def test_rows_of_one_group_count_once():
    """Five seeds of two orders are two replicates, however alike the seeds are."""
    values = [1.0, 1.1, 0.9, 1.0, 1.0, 3.0, 3.1, 2.9, 3.0, 3.0]
    groups = [0] * 5 + [1] * 5
    assert replicated(values, groups=groups) == replicated([1.0, 3.0])
    assert replicated(values, groups=groups).sign == 0 and replicated(values).sign == 1


@pytest.mark.slow
@pytest.mark.parametrize("replicates", [3, 20])
def test_intervals_over_replicates_and_blocks_cover_both(replicates):
    """Crossed: every replicate is measured on the same blocks, whose draw moves all of them together."""
    generator, found = np.random.default_rng(3), []
    for trial in range(400):
        blocks = 0.25 + generator.normal(0, 1.0, 30)
        values = blocks + generator.normal(0, 0.2, (replicates, 1))
        drawn = generator.multinomial(30, np.full(30, 1 / 30), size=400) / 30
        draws = np.concatenate([values.mean(axis=1, keepdims=True), values @ drawn.T], axis=1)
        found.append(replicated(draws, seed=trial))
    share = sum(each.low <= 0.25 <= each.high for each in found) / 400
    assert 0.92 < share < 0.985
    if replicates == 20:  # twenty replicates without their blocks would be far too sure of themselves
        alone = replicated(draws[:, 0])
        assert alone.high - alone.low < 0.5 * (found[-1].high - found[-1].low)


def test_an_interval_over_few_but_equal_replicates_is_the_blocks_alone():
    draws = np.concatenate([[[0.0]], np.random.default_rng(0).normal(0, 1, (1, 3000))], axis=1).repeat(4, axis=0)
    found = replicated(draws)
    assert found.low < -1.85 and found.high > 1.85
    assert found.high == pytest.approx(np.quantile(draws[0, 1:], 0.975, method="weibull"))


def test_sign_flips_are_counted_exactly():
    values = [0.5, -0.1, 0.7, 0.2]
    means = [abs(np.dot(signs, values)) for signs in itertools.product((1, -1), repeat=4)]
    expected = sum(mean >= abs(sum(values)) - 1e-12 for mean in means) / 16
    assert sign_flip_test(values) == expected and sign_flip_test([1.0] * 5) == 2 / 32
    assert sign_flip_test([0.0, 0.0]) == 1.0
    many = np.random.default_rng(0).normal(0.35, 1.0, 40)
    assert sign_flip_test(many) == pytest.approx(stats.ttest_1samp(many, 0).pvalue, abs=0.02)


BELOW, WITHIN = (None, 0.0), (7, 13)


@pytest.mark.parametrize(("interval", "claim", "verdict"), [
    (Interval(-2, -3, -1), BELOW, "reproduced"), (Interval(2, 1, 3), BELOW, "refuted"),
    (Interval(-2, -5, 1), BELOW, "undecided"), (Interval(0.0, 0.0, 0.0), BELOW, "refuted"),
    (Interval(-2, None, None), BELOW, "undecided"), (None, BELOW, "undecided"),
    (Interval(9, 8, 10), WITHIN, "reproduced"), (Interval(12, 11, 14), WITHIN, "undecided"),
    (Interval(15, 14, 16), WITHIN, "refuted"),
])  # fmt: skip
def test_a_verdict_needs_the_whole_interval(interval, claim, verdict):
    assert judge(interval, claim) == verdict


def curve(in_domain, earlier):
    rates = tuple(0.001 * 2**i for i in range(len(in_domain)))
    return Curve(rates, np.array(in_domain, dtype=float), np.array(earlier, dtype=float))


def test_curves_are_compared_where_both_are():
    """y = x / 2 against y = x / 2 + 3, over rates that reach other in-domain changes: 3 apart from -20 to -10."""
    first = [curve([-10 - s, -20 - s, -30 - s], [(-10 - s) / 2, (-20 - s) / 2, (-30 - s) / 2]) for s in (0, 0.1, 0.3)]
    second = [curve([-2, -14, -20 + s], [2, -4, (-20 + s) / 2 + 3]) for s in (0, 0.1, 0.2)]
    found = curve_difference(first, second)
    assert (found.low, found.high) == (pytest.approx(-19.8), pytest.approx(-10.3))
    assert found.difference.value == pytest.approx(-3.0) and found.difference.sign == -1 and found.replicates == 3
    assert [point.value for _, point in found.points] == pytest.approx([-3.0] * 9)
    assert curve_difference(second, first).difference.value == pytest.approx(3.0)


def test_a_curve_ends_at_its_best_rate():
    """A rate too high adapts less and forgets more; it must not stand for the same in-domain change at a lower rate."""
    first = [curve([-10, -20, -12], [-5, -10, 40]) for _ in range(2)]
    found = curve_difference(first, [curve([-10, -20], [-5, -10]) for _ in range(2)])
    assert found.difference.value == pytest.approx(0.0, abs=1e-12) and found.left_out == ((0.004,), ())


def test_curves_with_block_resamples_and_orders():
    generator = np.random.default_rng(5)
    first, second = [], []
    for order in range(3):
        for _ in range(2):
            noise = generator.normal(0, 0.05, (3, 1)) + np.concatenate([[0.0], generator.normal(0, 0.05, 200)])
            x = np.array([[-5.0], [-10.0], [-20.0]]) + noise
            first.append(Curve((0.001, 0.01, 0.1), x, x / 2 - 2 + order / 10, order))
            second.append(Curve((0.001, 0.01, 0.1), x, x / 2, order))
    found = curve_difference(first, second)
    assert found.replicates == 3
    assert found.difference.value == pytest.approx(-1.9, abs=0.01) and found.difference.sign == -1


def test_curves_that_share_nothing_or_do_not_pair_are_refused():
    far = [curve([-30, -40], [0, 0])] * 2
    near = [curve([-1, -5], [0, 0])] * 2
    refused(DataError, "no in-domain change in common", curve_difference, far, near)
    refused(DataError, "do not pair", curve_difference, far, near[:1])
    refused(DataError, "rates must rise", Curve, (0.1, 0.1), np.zeros(2), np.zeros(2))
