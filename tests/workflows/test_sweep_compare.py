"""Methods of a sweep compared: at matched in-domain change and by curve; the intervals alone say who is ahead."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from gaintune.errors import ConfigError, DataError
from gaintune.storage import read_json
from gaintune.workflows.sweep import SweepTable, compare_sweep, curve_sentence, discard, pair_sentence, write
from gaintune.workflows.sweep.report import markdown, tradeoff
from support import refused, tiny_sweep


def noise(*key, scale=0.2):
    return float(np.random.default_rng([7, *key]).normal(0, scale))


def effect(weak, strong, share, *keys):
    """A method: its in-domain change at two rates, the share of it that earlier domains get, and noise for each."""

    def changes(lr, order, seed):
        own = {0.001: weak, 0.01: strong}[lr] + noise(keys[0], order, seed)
        return own, share * own + noise(keys[1], order, seed)

    return changes


keeping = effect(-8.0, -16.0, 0.8, 1, 2)
forgetting = effect(-10.0, -24.0, 0.2, 3, 4)
spoiling = effect(-8.0, -16.0, 0.2, 8, 12)  # as good in-domain as `keeping`, but worse on earlier domains


def compare(folder, methods, target=None, **options):
    return compare_sweep(tiny_sweep.synthetic(folder, methods, **options), target=target)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return tiny_sweep.synthetic(tmp_path_factory.mktemp("runs"), {"keeping": keeping, "forgetting": forgetting})


def test_each_method_is_taken_at_the_rate_nearest_the_target(table):
    found = compare_sweep(table, target=-11.0)
    assert [(point.variant, point.lr) for point in found.matched] == [("keeping", 0.001), ("forgetting", 0.001)]
    found = compare_sweep(table, target=-21.0)
    assert [(point.variant, point.lr) for point in found.matched] == [("keeping", 0.01), ("forgetting", 0.01)]
    found = compare_sweep(table)
    assert found.targets[0].in_domain == pytest.approx(-16.0, abs=0.5)  # the strongest that both reach
    assert (found.over, len(found.points), found.unfinished) == ("seeds", 4, 0)


def test_the_difference_is_paired_run_by_run_and_as_uncertain_as_seeds_are(table):
    (pair,) = compare_sweep(table, target=-9.0).pairs
    frame = table.frame()
    figures = frame[frame["lr"] == 0.001].pivot(index="seed", columns="label", values="backward_transfer")
    apart = (figures["keeping"] - figures["forgetting"]).to_numpy()
    assert pair.difference.value == pytest.approx(apart.mean())
    low, high = stats.t.interval(0.95, 2, apart.mean(), stats.sem(apart))
    assert pair.difference.low == pytest.approx(low, rel=0.25)  # blocks add a little to seeds
    assert pair.difference.high == pytest.approx(high, rel=0.25) and pair.replicates == 3
    assert pair.p == 0.25  # three pairs with one sign
    assert pair.in_domain.value == pytest.approx(2.0, abs=0.6)


def test_a_pair_that_is_not_matched_in_domain_has_no_better_one(table):
    for target, apart in ((-9.0, 2.0), (-21.0, 8.0)):  # many times their spread
        found = compare_sweep(table, target=target)
        (pair,) = found.pairs
        assert pair.in_domain.value == pytest.approx(apart, abs=0.6) and pair.in_domain.sign == 1
        assert pair.difference.sign == -1 and pair.unmatched and pair.better is None
        sentence = pair_sentence(pair, found)
        assert "not matched" in sentence and "is better" not in sentence


def offset(*in_domain):
    """As `keeping` at one rate, but for its in-domain change, which is off by so much for each seed, and a figure
    that is 12 points better."""

    def effect(lr, order, seed):
        own, _ = keeping(lr, order, seed)
        return own + in_domain[seed], 0.8 * own - 12.0 - 0.1 * seed

    return effect


@pytest.mark.parametrize(("in_domain", "target", "sign", "unmatched"), [
    ((7.0, 9.0), -16, 0, "8.0 points apart in-domain, and not known to be matched within"),  # two seeds cannot tell
    ((0.10, 0.11, 0.12), -16, -1, None),  # surely near, though they surely differ
    ((-2.0, 0.0, 2.0), -16, 0, "not known to be matched within 1.6: more replicates would tell"),
    ((-2.0,), -4, None, "one replicate, which cannot tell"),
    ((4.4, 4.5, 4.6), -60, -1, "not matched, 4.5 points apart"),  # a target that none reaches
])  # fmt: skip
def test_methods_are_matched_only_where_they_are_surely_near(tmp_path, in_domain, target, sign, unmatched):
    (pair,) = compare(tmp_path, {"keeping": keeping, "other": offset(*in_domain)}, target, seeds=len(in_domain)).pairs
    if unmatched is None:
        assert pair.unmatched is None and pair.better == "other"
    else:
        assert unmatched in pair.unmatched and pair.better is None
    assert sign is None or pair.in_domain.sign == sign
    assert len(in_domain) < 3 or pair.margin == pytest.approx(1.15 if target == -60 else 1.6, abs=0.1)
    assert len(in_domain) != 2 or pair.difference.sign == 1  # the figure is apart


def test_a_rate_beyond_the_best_in_domain_change_is_matched_with_nothing(tmp_path):
    def unstable(lr, order, seed):
        own = {0.001: -10.0, 0.01: -29.4, 0.03: -27.9}[lr] + noise(13, order, seed)
        return own, (-2.3 if lr == 0.03 else 0.8 * own)

    found = compare(tmp_path, {"unstable": unstable}, -28.0, rates=(0.001, 0.01, 0.03))
    assert [point.lr for point in found.matched] == [0.01]


def worsening(lr, order, seed):
    return {0.001: 1.0, 0.01: 9.0}[lr] + noise(9, order, seed), 12.0


def test_a_variant_that_never_improves_has_no_part_in_the_target(tmp_path):
    found = compare(tmp_path, {"keeping": keeping, "worsening": worsening, "forgetting": forgetting})
    (target,) = found.targets
    assert target.in_domain == pytest.approx(-16.0, abs=0.5) and target.never == ("worsening",)
    assert [point.variant for point in found.matched] == ["keeping", "forgetting"]
    pairs = {(pair.first, pair.second): pair for pair in found.pairs}
    assert "improves in-domain at no rate" in pairs["keeping", "worsening"].unmatched
    assert pairs["keeping", "worsening"].better is None
    assert "worsening improves in-domain at no rate" in markdown(found)
    alone = compare(tmp_path / "alone", {"worsening": worsening})
    assert (alone.targets[0].in_domain, alone.matched) == (None, ())
    assert "nearest no change, as nothing improves" in markdown(alone)


def test_every_budget_has_a_target_of_its_own(tmp_path):
    def less(lr, order, seed):
        return tuple(value / 4 for value in keeping(lr, order, seed))

    rows = [
        *tiny_sweep.synthetic(tmp_path / "a", {"keeping": keeping, "forgetting": forgetting}).rows,
        *tiny_sweep.synthetic(tmp_path / "b", {"keeping": less, "forgetting": less}, budget=2048).rows,
    ]
    found = compare_sweep(SweepTable(tuple(rows)))
    assert {one.budget: round(one.in_domain) for one in found.targets} == {8192: -16, 2048: -4}
    assert [point.lr for point in found.matched] == [0.01, 0.001, 0.01, 0.01]


def test_a_rate_that_failed_for_one_seed_leaves_that_seed_s_others_on_the_curve(tmp_path):
    rates = {0.001: -10.0, 0.003: -16.0, 0.01: -24.0}

    def steady(lr, order, seed):
        own = rates[lr] + noise(10, round(lr * 1000), seed)
        return own, 0.8 * own

    def diverging(lr, order, seed):
        own = rates[lr] + noise(11, round(lr * 1000), seed)
        return None if (lr, seed) == (0.01, 1) else (own, 0.2 * own)

    found = compare(tmp_path, {"steady": steady, "diverging": diverging}, rates=tuple(rates))
    (pair,) = found.curves
    assert pair.curve.replicates == 3 and pair.better == "steady"
    assert pair.curve.low == pytest.approx(-16.0, abs=0.6)  # as far as seed 1 got
    assert found.unfinished == 1
    assert [point.lr for point in found.matched] == [0.003, 0.003]  # what survives at 0.01 is not matched
    assert [(point.lr, point.failed) for point in found.points if point.failed] == [(0.01, 1)]
    assert [(one.variant, one.lr, one.runs) for one in found.missing] == [("diverging", 0.01, 1)]
    assert "diverging at 0.01: 1 run (the loss is not finite)" in markdown(found)


def test_runs_in_other_numbers_are_not_compared_and_other_devices_are_reported(tmp_path, table):
    other = tiny_sweep.synthetic(tmp_path / "b", {"forgetting": forgetting}, computed=("bfloat16", "cpu"))
    with pytest.raises(DataError, match=r"different precisions \(float32, such as .*; bfloat16, such as "):
        compare_sweep(SweepTable((*table.rows, *other.rows)))
    computed = ("float32-autocast-bfloat16", "NVIDIA H100")
    full = tiny_sweep.synthetic(tmp_path / "c", {"full": forgetting}, computed=computed)
    found = compare_sweep(SweepTable((*other.rows, *full.rows)))  # fp32 weights, and computes as the others do
    assert "different devices (cpu, NVIDIA H100)" in markdown(found)
    assert set(full.frame()["device"]) == {"NVIDIA H100"} and compare_sweep(table).notes == ()


def test_no_winner_without_an_interval_that_excludes_zero(tmp_path):
    found = compare(tmp_path, {"keeping": keeping, "the-same": effect(-8.0, -16.0, 0.8, 5, 6)})
    assert [pair.better for pair in found.pairs] == [None] and [pair.better for pair in found.curves] == [None]
    assert "no difference shown" in pair_sentence(found.pairs[0], found)
    assert "no difference shown" in curve_sentence(found.curves[0], found)
    alone = compare(tmp_path / "one", {"keeping": keeping, "forgetting": forgetting}, seeds=1)
    assert alone.pairs[0].difference.low is None
    assert alone.pairs[0].better is None  # one seed says nothing of others, however far apart


def test_curves_are_compared_over_the_range_both_reach(table):
    (pair,) = compare_sweep(table).curves
    assert pair.better == "keeping"
    assert pair.curve.low == pytest.approx(-16, abs=0.6) and pair.curve.high == pytest.approx(-10, abs=0.6)
    # 0.8 x - 0.2 x over x from -10 to -16
    assert pair.curve.difference.value == pytest.approx(-0.6 * 13, abs=0.8)


def test_orders_are_the_replicates_where_there_are_several(tmp_path):
    found = compare(tmp_path, {"keeping": keeping, "forgetting": forgetting}, orders=2, seeds=2)
    assert found.over == "orders"
    assert (found.pairs[0].replicates, found.points[0].replicates, len(found.points[0].runs)) == (2, 2, 4)


def test_a_domain_of_one_block_leaves_intervals_over_seeds(tmp_path):
    (pair,) = compare(tmp_path, {"keeping": keeping, "spoiling": spoiling}, blocks=1).pairs
    assert pair.difference.low is not None and pair.better == "keeping"


def test_everything_is_written(tmp_path):
    found = compare(tmp_path / "runs", {"keeping": keeping, "spoiling": spoiling})
    write(found, tmp_path)
    files = {file.name for file in tmp_path.iterdir() if file.is_file()}
    assert files == {"comparison.md", "comparison.json", "tradeoff.png", "tradeoff.svg"}
    written = read_json(tmp_path / "comparison.json")
    assert written["pairs"][0]["better"] == "keeping"
    assert (written["confidence"], written["pairs"][0]["margin"]) == (0.95, pytest.approx(1.6, abs=0.1))
    assert written["curves"][0]["curve"]["difference"]["high"] < 0
    text = markdown(found)
    assert "keeping is better" in text and "3 seeds" in text and "Earlier domains, against the base" in text
    assert "95 % intervals over seeds" in text and len(pd.DataFrame(written["points"])) == 4
    discard(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["runs"]


def test_the_frame_keeps_intervals_unless_they_would_squeeze_curves(tmp_path):
    def spread(lr, order, seed):
        return -10.0 - 1000 * lr - 8.0 * seed, -5.0 - 6.0 * seed  # two seeds: intervals many times as wide as the runs

    def frame(**options):
        found = compare(tmp_path / str(len(options)), {"one": spread}, seeds=2, **options)
        (axes,) = tradeoff(found).axes
        return axes.get_xlim(), found.points[0].in_domain, axes.get_title(loc="left")

    (low, high), interval, title = frame(rates=(0.001,))
    assert low < interval.low and interval.high < high and "beyond the frame" not in title
    (low, high), interval, title = frame()
    assert interval.low < low and "the intervals of 2 points reach beyond the frame" in title


def test_a_hopeless_run_leaves_the_others_their_comparison(tmp_path):
    methods = {"keeping": keeping, "spoiling": spoiling, "hopeless": lambda lr, order, seed: (1e301 * (1 + seed),) * 2}
    found = compare(tmp_path / "runs", methods, seeds=2)
    write(found, tmp_path)  # refuses what is not finite
    point = next(point for point in found.points if point.variant == "hopeless")
    assert 1e301 < point.figure.value < point.figure.high < float("inf")


def test_what_cannot_be_compared_is_refused(table):
    refused(ConfigError, "no figure is called 'retention'", compare_sweep, table, figure="retention")
    improves = "methods are matched at an in-domain change that improves"
    for target, message in ((21, improves), (0, ".* between -100 and 0 %"), (-100, ".* between -100 and 0 %")):
        refused(ConfigError, f"target {target}: {message}", compare_sweep, table, target=target)
