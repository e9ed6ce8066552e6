"""Intervals: they agree with a plain bootstrap, they are paired, and they cover the truth as often as they say."""

import math

import numpy as np
import pytest
from scipy import stats

from gaintune.config import EvaluateConfig
from gaintune.results import DomainLoss, MethodRun, Stage, build_matrix, replicate_means

MANY = EvaluateConfig(bootstrap_samples=4000)


def measured(nats, tokens):
    """Losses of blocks whose mean nats per token are given."""
    return DomainLoss(
        tuple(float(x) for x in np.asarray(nats) * tokens), tuple(map(int, tokens)), tuple(int(t) * 4 for t in tokens)
    )


def hard_and_easy_blocks(blocks=16, seed=0):
    """Blocks that differ a lot from one another, as texts do: (nats per token, scored tokens)."""
    generator = np.random.default_rng(seed)
    return generator.normal(3.0, 0.8, blocks), generator.integers(100, 256, blocks)


def width(interval):
    return interval.high - interval.low


def test_intervals_agree_with_a_plain_loop_over_resampled_blocks():
    nats, tokens = hard_and_easy_blocks()
    after = nats + np.random.default_rng(1).normal(-0.2, 0.1, len(nats))
    run = MethodRun("gain", {"d": measured(nats, tokens)}, (Stage("d", {"d": measured(after, tokens)}),))
    cell = build_matrix([run], MANY).methods[0].stages[0].cells["d"]

    generator, changes = np.random.default_rng(123), []
    for _ in range(4000):
        drawn = generator.integers(0, len(nats), len(nats))
        total = tokens[drawn].sum()
        before_ppl = math.exp((nats * tokens)[drawn].sum() / total)
        changes.append(100 * (math.exp((after * tokens)[drawn].sum() / total) / before_ppl - 1))
    # Student's quantile and the unbiased spread of 16 blocks, in log perplexity
    reach = stats.t.ppf(0.975, 15) / stats.norm.ppf(0.975) * math.sqrt(16 / 15)
    logs, middle = np.log1p(np.array(changes) / 100), math.log1p(cell.change / 100)
    low, high = (100 * math.expm1(end) for end in middle + reach * (np.percentile(logs, [2.5, 97.5]) - middle))
    assert cell.low == pytest.approx(low, abs=0.25) and cell.high == pytest.approx(high, abs=0.25)
    assert cell.low < cell.change < cell.high


def test_base_and_adapted_are_resampled_together():
    nats, tokens = hard_and_easy_blocks()
    after = nats - 0.1  # every token better by the same: nothing is uncertain about it, however unlike the blocks are
    run = MethodRun("gain", {"d": measured(nats, tokens)}, (Stage("d", {"d": measured(after, tokens)}),))
    cell = build_matrix([run], MANY).methods[0].stages[0].cells["d"]
    assert width(cell) < 1e-9
    # the bootstrap that forgets the pairing would say +-50 %
    alone = replicate_means((nats * tokens)[None], tokens, samples=4000, seed=0, domain="d")[1:, 0]
    assert 100 * np.ptp(np.exp(np.quantile(alone, [0.025, 0.975]) - alone.mean())) > 50


def test_methods_and_stages_are_resampled_together():
    """Two methods with noisy but parallel losses: each is uncertain, their difference is not."""
    domains, generator = ("a", "b"), np.random.default_rng(5)
    base, first, second = {}, [{}, {}], [{}, {}]
    for name in domains:
        nats, tokens = hard_and_easy_blocks(seed=len(base))
        base[name] = measured(nats, tokens)
        effect = generator.normal(-0.3, 0.15, len(nats))
        for stage in range(2):
            first[stage][name] = measured(nats + effect, tokens)
            second[stage][name] = measured(nats + effect + 0.001, tokens)
    runs = [
        MethodRun(label, base, tuple(Stage(name, losses) for name, losses in zip(domains, stages, strict=True)))
        for label, stages in (("first", first), ("second", second))
    ]
    matrix = build_matrix(runs, MANY)
    single = matrix.methods[1].summary
    difference = matrix.comparisons[0].summary
    for name in ("in_domain", "backward_transfer", "below_diagonal", "forward_interference"):
        assert width(getattr(difference, name)) < 0.02 * width(getattr(single, name)), name
        assert getattr(difference, name).sign == 1, name
        assert getattr(single, name).sign == -1, name
    # nothing changed between learning 'a' and the end, in any block
    since = single.backward_transfer_since_learnt
    assert (since.value, since.low, since.high) == (0.0, 0.0, 0.0)


def test_the_mean_over_domains_is_resampled_jointly():
    """Independent domains: the interval of a mean of four is about half as wide as that of one."""
    names = ("a", "b", "c", "d")
    base, after = {}, {}
    for index, name in enumerate(names):
        nats, tokens = hard_and_easy_blocks(blocks=40, seed=index)
        base[name] = measured(nats, tokens)
        after[name] = measured(nats + np.random.default_rng(10 + index).normal(-0.2, 0.1, len(nats)), tokens)
    matrix = build_matrix([MethodRun("gain", base, tuple(Stage(name, after) for name in names))], MANY)
    cells = [matrix.methods[0].stages[0].cells[name] for name in names]
    assert width(matrix.methods[0].summary.in_domain) == pytest.approx(
        math.sqrt(sum(width(cell) ** 2 for cell in cells)) / 4, rel=0.1
    )


@pytest.mark.slow
def test_intervals_cover_the_truth_about_as_often_as_they_say():
    truth, hits, trials = -20.0, 0, 200
    generator = np.random.default_rng(2024)
    for trial in range(trials):
        tokens = np.full(30, 255)
        nats = generator.normal(3.0, 0.8, 30)
        after = nats + generator.normal(math.log1p(truth / 100), 0.2, 30)
        run = MethodRun("gain", {"d": measured(nats, tokens)}, (Stage("d", {"d": measured(after, tokens)}),))
        settings = EvaluateConfig(bootstrap_samples=400, confidence=0.9, seed=trial)
        cell = build_matrix([run], settings).methods[0].stages[0].cells["d"]
        hits += cell.low <= truth <= cell.high
    assert 0.86 <= hits / trials <= 0.94  # 90 % asked


def test_a_wider_confidence_gives_a_wider_interval():
    nats, tokens = hard_and_easy_blocks()
    after = nats + np.random.default_rng(1).normal(-0.2, 0.1, len(nats))
    run = MethodRun("gain", {"d": measured(nats, tokens)}, (Stage("d", {"d": measured(after, tokens)}),))
    widths = [
        width(build_matrix([run], EvaluateConfig(confidence=level)).methods[0].stages[0].cells["d"])
        for level in (0.5, 0.9, 0.99)
    ]
    assert widths == sorted(widths) and widths[0] < widths[2] / 2


def test_one_block_has_a_value_but_no_interval():
    base = {"d": measured([3.0], np.array([255])), "e": measured([2.0, 2.5], np.array([255, 100]))}
    after = {"d": measured([2.0], np.array([255])), "e": measured([2.0, 2.1], np.array([255, 100]))}
    method = build_matrix([MethodRun("gain", base, (Stage("d", after), Stage("e", after)))], MANY).methods[0]
    cell = method.stages[0].cells["d"]
    assert cell.change == pytest.approx(100 * math.expm1(-1)) and cell.low is None and cell.high is None
    assert method.stages[0].cells["e"].low is not None
    assert method.summary.in_domain.low is None and method.summary.in_domain.sign == 0


def test_another_method_or_stage_moves_no_interval():
    nats, tokens = hard_and_easy_blocks()
    losses = [measured(nats + np.random.default_rng(i).normal(-0.2, 0.1, 16), tokens) for i in range(3)]
    base = {"d": measured(nats, tokens), "e": measured(nats, tokens)}
    one = MethodRun("one", base, (Stage("d", {"d": losses[0], "e": losses[1]}),))
    two = MethodRun("two", base, (*one.stages, Stage("e", {"d": losses[2], "e": losses[0]})))
    alone = build_matrix([one], MANY).methods[0]
    beside = build_matrix([two, one], MANY).methods
    assert beside[1] == alone
    assert beside[0].stages[0].cells == alone.stages[0].cells
    # two domains are drawn apart, even where their blocks look the same
    assert alone.stages[0].cells["d"].low != beside[0].stages[1].cells["e"].low
