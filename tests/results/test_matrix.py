"""The matrix against closed forms and a slow reference written another way."""

import json
import math

import numpy as np
import pytest

from gaintune.config import EvaluateConfig
from gaintune.errors import DataError, RunDirectoryError
from gaintune.results import DomainLoss, Matrix, MethodRun, Stage, build_matrix, change
from gaintune.storage import canonical_json

QUICK = EvaluateConfig(bootstrap_samples=200)
DOMAINS = ("one", "two", "three")


def loss(nats_per_token, tokens=(255, 255, 100, 255), spread=0.0, seed=0, bytes_per_token=4):
    noise = np.random.default_rng(seed).normal(0, spread, len(tokens)) if spread else np.zeros(len(tokens))
    nll = tuple(float(count * (nats_per_token + shift)) for count, shift in zip(tokens, noise, strict=True))
    return DomainLoss(nll, tuple(tokens), tuple(bytes_per_token * count for count in tokens))


def random_run(label, domains=DOMAINS, extra=(), blocks=12, seed=0, effect=0.2):
    """Base losses depend on the domain only, so several methods share them; stages depend on the seed."""
    tokens = {
        name: tuple(int(n) for n in np.random.default_rng([7, i]).integers(50, 256, blocks))
        for i, name in enumerate([*domains, *extra])
    }
    base = {name: loss(3.0 + i / 5, tokens[name], 0.3, seed=i) for i, name in enumerate(tokens)}
    generator = np.random.default_rng([seed, 99])

    def after(name):
        factors = np.exp(generator.normal(-effect / 3, effect / 3, blocks))
        return DomainLoss(
            tuple(float(n * f) for n, f in zip(base[name].nll, factors, strict=True)),
            *((base[name].tokens, base[name].bytes)),
        )

    stages = tuple(Stage(domain, {name: after(name) for name in tokens}) for domain in domains)
    return MethodRun(label, base, stages, {"method": label, "lr": 0.01})


def same_everywhere(domains, changes, base_nats=3.0):
    """A run whose changes are given in %, stage by domain, identical in every block."""
    base = {name: loss(base_nats, spread=0.4, seed=i) for i, name in enumerate(domains)}
    stages = []
    for domain, row in zip(domains, changes, strict=True):
        losses = {}
        for name, percent in zip(domains, row, strict=True):
            shift = math.log1p(percent / 100)
            old = base[name]
            nll = tuple(n + shift * t for n, t in zip(old.nll, old.tokens, strict=True))
            losses[name] = DomainLoss(nll, old.tokens, old.bytes)
        stages.append(Stage(domain, losses))
    return MethodRun("method", base, tuple(stages))


def test_perplexity_and_bits_per_byte_have_their_closed_forms():
    one = DomainLoss((math.log(8) * 3, math.log(2) * 1), (3, 1), (5, 2))
    assert one.perplexity == pytest.approx((8**3 * 2) ** (1 / 4), rel=1e-14)
    assert one.bits_per_byte == pytest.approx((3 * 3 + 1) / 7, rel=1e-14)
    uniform = loss(math.log(512))
    assert uniform.perplexity == pytest.approx(512)
    assert uniform.bits_per_byte == pytest.approx(9 / 4)


def test_change_is_percent_of_perplexity_and_exactly_zero_for_the_base():
    base, after = loss(math.log(20)), loss(math.log(15))
    assert change(base, after) == pytest.approx(-25, rel=1e-12)
    assert change(after, base) == pytest.approx(100 / 3, rel=1e-12)
    uneven = loss(2.345, spread=0.5)
    assert change(uneven, uneven) == 0.0


def test_base_against_base_is_exactly_zero_with_intervals_of_exactly_zero():
    base = random_run("x").base
    run = MethodRun("none", base, tuple(Stage(name, dict(base)) for name in DOMAINS))
    matrix = build_matrix([run], QUICK)
    method = matrix.methods[0]
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
    expected = {
        "in_domain": -20.0,
        "backward_transfer": -1.0,
        "backward_transfer_since_learnt": since,
        "below_diagonal": (-8 - 5 + 3) / 3,
        "forward_interference": (1 + 2 + 4) / 3,
    }
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
    method = build_matrix([run], QUICK).methods[0]
    names = [*DOMAINS, "other"]

    def ppl(one):
        total = tokens = 0.0
        for nll, count in zip(one.nll, one.tokens, strict=True):
            total, tokens = total + nll, tokens + count
        return 2.718281828459045 ** (total / tokens)

    table = [[100 * (ppl(stage.losses[n]) / ppl(run.base[n]) - 1) for n in names] for stage in run.stages]
    for stage, row in zip(method.stages, table, strict=True):
        assert [stage.cells[n].change for n in names] == pytest.approx(row, rel=1e-9)
        assert [stage.cells[n].perplexity for n in names] == pytest.approx(
            [ppl(run.stages[[s.domain for s in run.stages].index(stage.domain)].losses[n]) for n in names]
        )
    above = [table[s][d] for s in range(3) for d in range(4) if d > s]
    below = [table[s][d] for s in range(3) for d in range(3) if d < s]
    assert method.summary.forward_interference.value == pytest.approx(sum(above) / len(above))
    assert method.summary.below_diagonal.value == pytest.approx(sum(below) / len(below))
    assert method.summary.backward_transfer.value == pytest.approx((table[2][0] + table[2][1]) / 2)
    assert method.per_stage[2].later.value == pytest.approx(table[2][3])
    assert method.base["other"].blocks == 12 and method.base["other"].tokens == sum(run.base["other"].tokens)


def test_one_domain_has_no_earlier_domains():
    matrix = build_matrix([random_run("gain", domains=("only",))], QUICK)
    summary = matrix.methods[0].summary
    assert summary.in_domain is not None
    assert summary.backward_transfer is summary.backward_transfer_since_learnt is None
    assert summary.below_diagonal is summary.forward_interference is None
    assert Matrix.from_dict(json.loads(canonical_json(matrix.to_dict()))) == matrix


def test_a_domain_never_learnt_counts_as_later_for_ever():
    matrix = build_matrix([random_run("gain", domains=("only",), extra=("other",))], QUICK)
    assert matrix.domains == ("only", "other") and matrix.planned == ("only",)
    method = matrix.methods[0]
    assert method.summary.forward_interference.value == method.stages[0].cells["other"].change
    assert method.summary.backward_transfer is None and not matrix.partial


def test_a_partial_run_reports_what_is_there():
    whole = random_run("gain")
    cut = Stage("two", {"one": whole.stages[1].losses["one"]})
    run = MethodRun("gain", whole.base, (whole.stages[0], cut), whole.info)
    matrix = build_matrix([run], QUICK, planned=DOMAINS)
    method = matrix.methods[0]
    assert matrix.partial and [row.finished for row in method.stages] == [True, False]
    assert set(method.stages[1].cells) == {"one"}
    assert method.stages[1].cells["one"] == build_matrix([whole], QUICK).methods[0].stages[1].cells["one"]
    assert len(method.per_stage) == 1 and method.summary.backward_transfer is None
    assert Matrix.from_dict(json.loads(canonical_json(matrix.to_dict()))) == matrix

    nothing = build_matrix([MethodRun("gain", whole.base)], QUICK, planned=DOMAINS)
    assert (
        nothing.partial and nothing.methods[0].summary.in_domain is None and nothing.methods[0].base["one"].blocks == 12
    )
    assert build_matrix([MethodRun("gain", {})], QUICK, planned=DOMAINS).partial
    assert not build_matrix([whole], QUICK, planned=DOMAINS).partial


def test_methods_are_compared_after_the_stages_both_have_finished():
    first, second = random_run("gain", seed=1), random_run("lora", seed=2)
    short = MethodRun("lora", second.base, second.stages[:2])
    (comparison,) = build_matrix([first, short], QUICK).comparisons
    both = build_matrix([MethodRun("gain", first.base, first.stages[:2]), short], QUICK).methods
    assert (comparison.label, comparison.against, comparison.stages) == ("lora", "gain", 2)
    assert comparison.summary.backward_transfer.value == pytest.approx(
        both[1].summary.backward_transfer.value - both[0].summary.backward_transfer.value
    )
    other_way = MethodRun("lora", second.base, second.stages[::-1])
    assert build_matrix([first, other_way], QUICK).comparisons == ()


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
    with pytest.raises(DataError, match="different labels"):
        build_matrix([run, run], QUICK)
    with pytest.raises(DataError, match="different labels"):
        build_matrix([], QUICK)
    with pytest.raises(DataError, match="trained twice in one, one"):
        build_matrix([MethodRun("gain", run.base, (run.stages[0], run.stages[0]))], QUICK)
    moved = {**run.stages[0].losses, "two": loss(3.0)}
    with pytest.raises(DataError, match="two: gain, stage one was measured on other blocks"):
        build_matrix([MethodRun("gain", run.base, (Stage("one", moved),))], QUICK)
    for wrong in [
        ((), (), ()),
        ((1.0,), (1, 2), (1,)),
        ((math.nan,), (1,), (1,)),
        ((1.0,), (0,), (1,)),
        ((1.0,), (1,), (0,)),
    ]:
        with pytest.raises(DataError):
            DomainLoss(*wrong)
    with pytest.raises(RunDirectoryError, match="format 1"):
        Matrix.from_dict({"format": 99})
    with pytest.raises(RunDirectoryError, match="missing or wrong"):
        Matrix.from_dict({"format": 1, "domains": ["one"]})
    with pytest.raises(RunDirectoryError, match="losses of a domain"):
        DomainLoss.from_dict({"nll": [1.0]})
    assert DomainLoss.from_dict(json.loads(canonical_json(run.base["one"].to_dict()))) == run.base["one"]


def test_a_model_that_fell_apart_still_gives_numbers():
    base = {"one": loss(3.0)}
    matrix = build_matrix([MethodRun("full", base, (Stage("one", {"one": loss(5000.0)}),))], QUICK)
    assert math.isfinite(matrix.methods[0].stages[0].cells["one"].change)
    canonical_json(matrix.to_dict())


def test_eight_domains_and_three_methods_with_all_resamples():
    names = tuple(f"domain-{i}" for i in range(8))
    runs = [random_run(f"m{i}", names, blocks=64, seed=i) for i in range(3)]
    matrix = build_matrix(runs, EvaluateConfig())
    assert len(matrix.comparisons) == 2 and len(matrix.methods[2].stages[7].cells) == 8
    assert matrix.comparisons[1].label == "m2" and matrix.comparisons[1].stages == 8
