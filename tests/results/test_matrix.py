"""The matrix against closed forms and a slow reference; its intervals, paired and joint, against a plain bootstrap."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from gaintune.config import EvaluateConfig
from gaintune.errors import DataError, RunDirectoryError
from gaintune.results import DomainLoss, Matrix, MethodRun, Stage, build_matrix, change, replicate_means
from gaintune.storage import canonical_json
from support import refused

QUICK = EvaluateConfig(bootstrap_samples=200)
DOMAINS = ("one", "two", "three")


def loss(nats_per_token, tokens=(255, 255, 100, 255), spread=0.0, seed=0, bytes_per_token=4):
    noise = np.random.default_rng(seed).normal(0, spread, len(tokens)) if spread else np.zeros(len(tokens))
    nll = tuple(float(count * (nats_per_token + shift)) for count, shift in zip(tokens, noise, strict=True))
    return DomainLoss(nll, tuple(tokens), tuple(bytes_per_token * count for count in tokens))


def random_run(label, domains=DOMAINS, extra=(), blocks=12, seed=0, effect=0.2):
    """Base losses depend on the domain only, so several methods share them; stages depend on the seed."""
    names = [*domains, *extra]
    tokens = {n: tuple(np.random.default_rng([7, i]).integers(50, 256, blocks).tolist()) for i, n in enumerate(names)}
    base = {name: loss(3.0 + i / 5, tokens[name], 0.3, seed=i) for i, name in enumerate(tokens)}
    generator = np.random.default_rng([seed, 99])

    def after(name):
        factors = np.exp(generator.normal(-effect / 3, effect / 3, blocks))
        return replace(base[name], nll=tuple((np.array(base[name].nll) * factors).tolist()))

    stages = tuple(Stage(domain, {name: after(name) for name in tokens}) for domain in domains)
    return MethodRun(label, base, stages, {"method": label, "lr": 0.01})


def same_everywhere(domains, changes, base_nats=3.0):
    """A run whose changes are given in %, stage by domain, identical in every block."""
    base = {name: loss(base_nats, spread=0.4, seed=i) for i, name in enumerate(domains)}
    stages = []
    for domain, row in zip(domains, changes, strict=True):
        losses = {}
        for name, percent in zip(domains, row, strict=True):
            old, shift = base[name], math.log1p(percent / 100)
            losses[name] = replace(old, nll=tuple(n + shift * t for n, t in zip(old.nll, old.tokens, strict=True)))
        stages.append(Stage(domain, losses))
    return MethodRun("method", base, tuple(stages))


def test_perplexity_and_bits_per_byte_have_their_closed_forms():
    one = DomainLoss((math.log(8) * 3, math.log(2) * 1), (3, 1), (5, 2))
    assert one.perplexity == pytest.approx((8**3 * 2) ** (1 / 4), rel=1e-14)
    assert one.bits_per_byte == pytest.approx((3 * 3 + 1) / 7, rel=1e-14)
    uniform = loss(math.log(512))
    assert (uniform.perplexity, uniform.bits_per_byte) == (pytest.approx(512), pytest.approx(9 / 4))


def test_change_is_percent_of_perplexity_and_exactly_zero_for_the_base():
    base, after = loss(math.log(20)), loss(math.log(15))
    assert change(base, after) == pytest.approx(-25, rel=1e-12)
    assert change(after, base) == pytest.approx(100 / 3, rel=1e-12)
    uneven = loss(2.345, spread=0.5)
    assert change(uneven, uneven) == 0.0


def test_base_against_base_is_exactly_zero_with_intervals_of_exactly_zero():
    base = random_run("x").base
    run = MethodRun("none", base, tuple(Stage(name, dict(base)) for name in DOMAINS))
    method = build_matrix([run], QUICK).methods[0]
    for row in method.stages:
        for cell in row.cells.values():
            assert (cell.change, cell.low, cell.high) == (0.0, 0.0, 0.0)
    for figure in vars(method.summary).values():
        assert (figure.value, figure.low, figure.high, figure.sign) == (0.0, 0.0, 0.0, 0)


def test_the_five_figures_average_the_right_cells():
    changes = [[-10.0, 1.0, 2.0], [-8.0, -20.0, 4.0], [-5.0, 3.0, -30.0]]
    matrix = build_matrix([same_everywhere(DOMAINS, changes)], QUICK)
    summary = matrix.methods[0].summary
    since = (100 * (0.95 / 0.90 - 1) + 100 * (1.03 / 0.80 - 1)) / 2
    expected = {"in_domain": -20.0, "backward_transfer": -1.0, "backward_transfer_since_learnt": since}
    expected |= {"below_diagonal": (-8 - 5 + 3) / 3, "forward_interference": (1 + 2 + 4) / 3}
    for name, value in expected.items():
        figure = getattr(summary, name)
        # a shift of every token by the same nats leaves the resamples nothing to vary: pairing with the base
        assert figure.value == pytest.approx(value, abs=1e-9), name
        assert figure.low == pytest.approx(value, abs=1e-9) and figure.high == pytest.approx(value, abs=1e-9), name
    rows = matrix.methods[0].per_stage
    assert [row.domain for row in rows] == list(DOMAINS)
    assert [row.in_domain.value for row in rows] == pytest.approx([-10, -20, -30])
    assert rows[0].earlier is None and rows[2].later is None
    assert [rows[1].earlier.value, rows[2].earlier.value] == pytest.approx([-8, -1])
    assert [rows[0].later.value, rows[1].later.value] == pytest.approx([1.5, 4])
    assert [matrix.methods[0].place(1, name) for name in DOMAINS] == ["earlier", "learning", "later"]


def test_values_match_a_slow_reference():
    run = random_run("gain", extra=("other",))
    method, names = build_matrix([run], QUICK).methods[0], [*DOMAINS, "other"]

    def ppl(one):
        total = tokens = 0.0
        for nll, count in zip(one.nll, one.tokens, strict=True):
            total, tokens = total + nll, tokens + count
        return 2.718281828459045 ** (total / tokens)

    table = [[100 * (ppl(stage.losses[n]) / ppl(run.base[n]) - 1) for n in names] for stage in run.stages]
    for stage, trained, row in zip(method.stages, run.stages, table, strict=True):
        assert stage.domain == trained.domain
        assert [stage.cells[n].change for n in names] == pytest.approx(row, rel=1e-9)
        assert [stage.cells[n].perplexity for n in names] == pytest.approx([ppl(trained.losses[n]) for n in names])
    above = [table[s][d] for s in range(3) for d in range(4) if d > s]
    below = [table[s][d] for s in range(3) for d in range(3) if d < s]
    assert method.summary.forward_interference.value == pytest.approx(sum(above) / len(above))
    assert method.summary.below_diagonal.value == pytest.approx(sum(below) / len(below))
    assert method.summary.backward_transfer.value == pytest.approx((table[2][0] + table[2][1]) / 2)
    assert method.per_stage[2].later.value == pytest.approx(table[2][3])
    assert method.base["other"].blocks == 12 and method.base["other"].tokens == sum(run.base["other"].tokens)


def test_one_domain_has_no_earlier_domains_and_a_domain_that_is_never_trained_is_always_later():
    matrix = build_matrix([random_run("gain", domains=("only",))], QUICK)
    summary = matrix.methods[0].summary
    assert summary.in_domain is not None
    assert summary.backward_transfer is summary.backward_transfer_since_learnt is None
    assert summary.below_diagonal is summary.forward_interference is None
    assert Matrix.from_dict(json.loads(canonical_json(matrix.to_dict()))) == matrix
    matrix = build_matrix([random_run("gain", domains=("only",), extra=("other",))], QUICK)
    assert matrix.domains == ("only", "other") and matrix.planned == ("only",)
    method = matrix.methods[0]
    assert method.summary.forward_interference.value == method.stages[0].cells["other"].change
    assert method.summary.backward_transfer is None and not matrix.partial


def test_a_partial_run_reports_what_is_there():
    whole = random_run("gain")
    cut = Stage("two", {"one": whole.stages[1].losses["one"]})
    matrix = build_matrix([MethodRun("gain", whole.base, (whole.stages[0], cut), whole.info)], QUICK, planned=DOMAINS)
    method = matrix.methods[0]
    assert matrix.partial and [row.finished for row in method.stages] == [True, False]
    assert set(method.stages[1].cells) == {"one"}
    assert method.stages[1].cells["one"] == build_matrix([whole], QUICK).methods[0].stages[1].cells["one"]
    assert len(method.per_stage) == 1 and method.summary.backward_transfer is None
    assert Matrix.from_dict(json.loads(canonical_json(matrix.to_dict()))) == matrix
    nothing = build_matrix([MethodRun("gain", whole.base)], QUICK, planned=DOMAINS)
    assert nothing.partial and nothing.methods[0].summary.in_domain is None
    assert nothing.methods[0].base["one"].blocks == 12
    assert build_matrix([MethodRun("gain", {})], QUICK, planned=DOMAINS).partial
    assert not build_matrix([whole], QUICK, planned=DOMAINS).partial


def test_methods_are_compared_after_the_stages_both_have_finished():
    first, second = random_run("gain", seed=1), random_run("lora", seed=2)
    short = MethodRun("lora", second.base, second.stages[:2])
    (comparison,) = build_matrix([first, short], QUICK).comparisons
    both = build_matrix([MethodRun("gain", first.base, first.stages[:2]), short], QUICK).methods
    assert (comparison.label, comparison.against, comparison.stages) == ("lora", "gain", 2)
    first_transfer, second_transfer = (method.summary.backward_transfer.value for method in both)
    assert comparison.summary.backward_transfer.value == pytest.approx(second_transfer - first_transfer)
    assert build_matrix([first, MethodRun("lora", second.base, second.stages[::-1])], QUICK).comparisons == ()


def test_equal_inputs_give_equal_bytes_and_the_seed_matters():
    runs = [random_run("gain", seed=1), random_run("lora", seed=2)]
    text = canonical_json(build_matrix(runs, QUICK).to_dict())
    assert canonical_json(build_matrix(runs, QUICK).to_dict()) == text
    assert Matrix.from_dict(json.loads(text)) == build_matrix(runs, QUICK)
    other = build_matrix(runs, EvaluateConfig(bootstrap_samples=200, seed=1))
    assert other.methods[0].summary.in_domain.value == build_matrix(runs, QUICK).methods[0].summary.in_domain.value
    assert other.methods[0].summary.in_domain.low != build_matrix(runs, QUICK).methods[0].summary.in_domain.low


def test_mistakes_are_named():
    run = random_run("gain")
    refused(DataError, "different labels", build_matrix, [run, run], QUICK)
    refused(DataError, "different labels", build_matrix, [], QUICK)
    twice = MethodRun("gain", run.base, (run.stages[0], run.stages[0]))
    refused(DataError, "trained twice in one, one", build_matrix, [twice], QUICK)
    moved = MethodRun("gain", run.base, (Stage("one", {**run.stages[0].losses, "two": loss(3.0)}),))
    refused(DataError, "two: gain, stage one was measured on other blocks", build_matrix, [moved], QUICK)
    many, zero = ((1.0,), (1, 2), (1,)), ((1.0,), (0,), (1,))
    for wrong in (((), (), ()), many, ((math.nan,), (1,), (1,)), zero, ((1.0,), (1,), (0,))):
        with pytest.raises(DataError):
            DomainLoss(*wrong)
    refused(RunDirectoryError, "format 1", Matrix.from_dict, {"format": 99})
    refused(RunDirectoryError, "missing or wrong", Matrix.from_dict, {"format": 1, "domains": ["one"]})
    refused(RunDirectoryError, "losses of a domain", DomainLoss.from_dict, {"nll": [1.0]})
    assert DomainLoss.from_dict(json.loads(canonical_json(run.base["one"].to_dict()))) == run.base["one"]


def test_a_model_with_exploded_losses_still_gives_numbers():
    matrix = build_matrix([MethodRun("full", {"one": loss(3.0)}, (Stage("one", {"one": loss(5000.0)}),))], QUICK)
    assert math.isfinite(matrix.methods[0].stages[0].cells["one"].change)
    canonical_json(matrix.to_dict())


def test_eight_domains_and_three_methods_with_all_resamples():
    names = tuple(f"domain-{i}" for i in range(8))
    matrix = build_matrix([random_run(f"m{i}", names, blocks=64, seed=i) for i in range(3)], EvaluateConfig())
    assert len(matrix.comparisons) == 2 and len(matrix.methods[2].stages[7].cells) == 8
    assert matrix.comparisons[1].label == "m2" and matrix.comparisons[1].stages == 8


MANY = EvaluateConfig(bootstrap_samples=4000)


def measured(nats, tokens):
    """Losses of blocks whose mean nats per token are given."""
    return DomainLoss(*(tuple(np.asarray(each).tolist()) for each in (nats * tokens, tokens, 4 * tokens)))


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
    assert width(build_matrix([run], MANY).methods[0].stages[0].cells["d"]) < 1e-9
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
        MethodRun(label, base, tuple(map(Stage, domains, stages)))
        for label, stages in (("first", first), ("second", second))
    ]
    matrix = build_matrix(runs, MANY)
    single, difference = matrix.methods[1].summary, matrix.comparisons[0].summary
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
    joint = math.sqrt(sum(width(cell) ** 2 for cell in cells)) / 4
    assert width(matrix.methods[0].summary.in_domain) == pytest.approx(joint, rel=0.1)


@pytest.mark.slow
def test_intervals_cover_the_truth_about_as_often_as_they_say():
    truth, hits, trials = -20.0, 0, 200
    generator = np.random.default_rng(2024)
    for trial in range(trials):
        tokens, nats = np.full(30, 255), generator.normal(3.0, 0.8, 30)
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
    assert (beside[1], beside[0].stages[0].cells) == (alone, alone.stages[0].cells)
    # two domains are drawn apart, even where their blocks look the same
    assert alone.stages[0].cells["d"].low != beside[0].stages[1].cells["e"].low
