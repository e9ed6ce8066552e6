"""What gains share equals NumPy's own figures, and parts of adapters are measured as the adapters they would be."""

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import get_peft_model

from gaintune.adapters import AdapterRecord, save_adapter, strip_adapters
from gaintune.analysis import TransferOptions, survey_transfer
from gaintune.analysis.transfer.report import markdown, result, table
from gaintune.analysis.transfer.survey import (
    Ablation,
    GainVectors,
    controls_of,
    read_gain_vectors,
    shared_component,
    sharing_of,
)
from gaintune.config import EvaluateConfig, build_plan
from gaintune.errors import AdapterError, ConfigError
from gaintune.evaluate import compare_adapters
from gaintune.models import load_base
from gaintune.results import DomainLoss
from gaintune.tuners.gain import GainConfig, GainLayer
from support import refused, tiny_adapters, tiny_base, tiny_domains

NAMES = ("prose", "code", "more")


def write_adapter(folder, base, v, domains, ffn=True):
    """A GAIN-FFN adapter whose vectors are `v`, module names in alphabetical order."""
    model = get_peft_model(base.model, GainConfig(ffn=ffn))
    layers = sorted((name, each) for name, each in model.named_modules() if isinstance(each, GainLayer))
    ends = np.cumsum([each.in_features for _, each in layers])[:-1]
    with torch.no_grad():
        for (_, each), part in zip(layers, np.split(v[: ends[-1] + layers[-1][1].in_features], ends), strict=True):
            each.gain_v["default"].copy_(torch.from_numpy(part))
    save_adapter(model, folder, AdapterRecord(base.name, base.fingerprint, "gain-ffn", "gain-ffn", domains))
    strip_adapters(base.model)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Three adapters with a common part and parts of their own, and the plan of the domains they claim."""
    folder = tmp_path_factory.mktemp("transfer")
    name = str(tiny_base.folder(folder / "base", dtype=torch.float32))
    values = tiny_domains.plan(name, folder)
    values["data"]["domains"].append(f"more={folder / 'prose.jsonl'}")
    values["data"]["watched"] = [f"unseen={folder / 'code.jsonl'}"]
    base = load_base(name, dtype=torch.float32)
    generator = np.random.default_rng(0)
    common = generator.normal(size=160)
    vectors = np.float32(0.1) * np.stack([common + generator.normal(size=160) for _ in NAMES]).astype(np.float32)
    for v, domain in zip(vectors, NAMES, strict=True):
        write_adapter(folder / domain, base, v, (domain,))
    return folder, build_plan(values), vectors.astype(np.float64)


def test_shares_and_correlations_equal_those_computed_pair_by_pair(place):
    folder, _, v = place
    vectors = read_gain_vectors({name: folder / name for name in NAMES})
    assert np.allclose(vectors.values, v, atol=1e-12)
    found, pairs = sharing_of(vectors), [(0, 1), (0, 2), (1, 2)]
    assert found.pairs == pytest.approx([np.corrcoef(v[i], v[j])[0, 1] for i, j in pairs])
    squares = [float(np.sum(row**2)) for row in v]
    products = [float(np.sum(v[i] * v[j])) for i, j in pairs]
    assert found.common_share == pytest.approx(np.mean(products) / np.mean(squares))
    assert found.mean_share == pytest.approx(np.sum(np.broadcast_to(v.mean(0), v.shape) ** 2) / np.sum(squares))
    assert found.principal_share == pytest.approx(np.linalg.svd(v)[1][0] ** 2 / np.sum(squares))
    agree = np.all(v > 0, axis=0) | np.all(v < 0, axis=0)
    assert found.agreeing == pytest.approx(agree.mean())
    assert found.agreeing_energy == pytest.approx(np.sum(v[:, agree] ** 2) / np.sum(squares))
    others = (v[1] + v[2]) / 2
    cosine = v[0] @ others / np.linalg.norm(v[0]) / np.linalg.norm(others)
    assert found.explained_by_others[0] == pytest.approx(cosine**2)
    assert 0.3 < found.common_share < 0.7  # half of the variance was made common


def test_nothing_in_common_is_zero_and_all_in_common_is_one(place):
    folder, _, _ = place
    vectors = read_gain_vectors({name: folder / name for name in NAMES})
    generator = np.random.default_rng(1)
    apart = type(vectors)(vectors.labels, vectors.modules, generator.normal(size=(3, 100_000)))
    assert sharing_of(apart).common_share == pytest.approx(0.0, abs=0.01)
    assert sharing_of(apart).mean_share == pytest.approx(1 / 3, abs=0.01)
    alike = type(vectors)(vectors.labels, vectors.modules, np.tile(generator.normal(size=50), (3, 1)))
    assert sharing_of(alike).common_share == pytest.approx(1.0)
    assert sharing_of(alike).principal_share == pytest.approx(1.0)


def test_components_equal_their_definitions(place):
    folder, _, v = place
    vectors = read_gain_vectors({name: folder / name for name in NAMES})
    assert np.allclose(shared_component(vectors, "mean", "prose", "code"), v.mean(0))
    held_out = shared_component(vectors, "held-out", "prose", "code")
    assert np.allclose(held_out, (v[0] + v[2]) / 2), "nothing of the adapter trained on the measured domain"
    assert np.allclose(shared_component(vectors, "held-out", "prose", "unseen"), v.mean(0))
    _, _, right = np.linalg.svd(v)
    assert np.allclose(shared_component(vectors, "principal", "code", "prose"), (v[1] @ right[0]) * right[0])


def test_a_cross_fitted_part_is_the_least_squares_fit_to_the_adapters_of_other_domains(place):
    folder, _, v = place
    vectors = read_gain_vectors({name: folder / name for name in NAMES})
    for trained, measured in [(a, b) for a in NAMES for b in (*NAMES, "unseen")]:
        others = [v[index] for index, name in enumerate(NAMES) if name not in (trained, measured)]
        direction = sum(others) / len(others)
        own = v[NAMES.index(trained)]
        (coefficient,), *_ = np.linalg.lstsq(direction[:, None], own, rcond=None)
        shared = shared_component(vectors, "cross-fitted", trained, measured)
        np.testing.assert_allclose(shared, coefficient * direction, rtol=1e-9)
        assert abs((own - shared) @ shared) < 1e-12 * (own @ own)


def test_vectors_with_nothing_in_common_share_nothing_only_if_cross_fitted():
    """The mean holds a part of every adapter; a projection on the others' mean does not."""
    generator = np.random.default_rng(2)
    v = generator.normal(size=(5, 100_000))
    vectors = GainVectors(tuple("abcde"), (("module", 100_000),), v)
    norms = {
        component: np.linalg.norm(shared_component(vectors, component, "a", "b")) / np.linalg.norm(v[0])
        for component in ("mean", "held-out", "cross-fitted")
    }
    assert norms["mean"] == pytest.approx(5**-0.5, rel=0.02) and norms["held-out"] == pytest.approx(0.5, rel=0.02)
    assert norms["cross-fitted"] < 0.02
    changed = vectors.values.copy()
    changed[1] *= -7.0  # the measured domain's adapter has no say
    shared = shared_component(vectors, "cross-fitted", "a", "b")
    assert np.array_equal(
        shared, shared_component(GainVectors(vectors.labels, vectors.modules, changed), "cross-fitted", "a", "b")
    )


def test_controls_keep_the_norm_and_signs_the_magnitudes():
    generator = np.random.default_rng(3)
    whole, shared = generator.normal(size=(2, 10_000))
    made = controls_of(whole, 0.5 * shared, "law", ("signs", "norm"), seed=1)
    assert np.array_equal(np.abs(made["signs"]), np.abs(0.5 * shared))
    assert abs(np.mean(np.sign(made["signs"]) * np.sign(shared))) < 0.03
    assert np.sum(made["norm"] ** 2) == pytest.approx(np.sum((0.5 * shared) ** 2))
    assert np.corrcoef(made["norm"], whole)[0, 1] == pytest.approx(1.0)
    again = controls_of(whole, 0.5 * shared, "law", ("signs",), seed=1)
    assert list(again) == ["signs"] and np.array_equal(again["signs"], made["signs"])
    for other in (("law", 2), ("code", 1)):
        drawn = controls_of(whole, 0.5 * shared, other[0], ("signs",), seed=other[1])["signs"]
        assert not np.array_equal(drawn, made["signs"])


def test_controls_are_measured_as_adapters_of_their_own_and_leave_the_rest_as_it_was(place, tmp_path):
    folder, plan, v = place
    paths = [folder / name for name in NAMES]
    plain = survey_transfer(plan, paths, TransferOptions(components=("mean", "cross-fitted")))
    options = TransferOptions(components=("mean", "cross-fitted"), controls=("signs", "norm"))
    found = survey_transfer(plan, paths, options)
    base, vectors = load_base(plan.model), read_gain_vectors(dict(zip(NAMES, paths, strict=True)))
    expected = {}
    for ablation in found.ablations:
        shared = shared_component(vectors, ablation.component, "prose", "code")
        signs = controls_of(v[0], shared, "prose", ("signs",), plan.evaluate.seed)["signs"]
        norm = v[0] * np.sqrt(np.sum(shared**2) / np.sum(v[0] ** 2))
        for part, vector in (("shared", shared), ("own", v[0] - shared), ("signs", signs), ("norm", norm)):
            one = write_adapter(tmp_path / f"{ablation.component}-{part}", base, np.float32(vector), (part,))
            expected[str(one)] = ablation.change(part, "prose", "code").value
        size = ablation.sizes["prose", "code"]
        assert size == pytest.approx(np.linalg.norm(shared) / np.linalg.norm(v[0]))
    alone = {
        each.label: each.change for each in compare_adapters(plan, [*map(Path, expected)]) if each.domain == "code"
    }
    assert {name: alone[name] for name in expected} == pytest.approx(expected, abs=1e-4)

    more, less = result(found), result(plain)
    assert {name: more.numbers[name] for name in less.numbers} == less.numbers
    added = {
        f"{c}.{p}.{n}" for c in options.components for p in options.controls for n in ("transfer", "in_domain", "left")
    }
    assert {*more.numbers, *more.without} - {*less.numbers, *less.without} == added
    mean = found.ablations[0]
    across = [mean.change("norm", a, b).value for a in NAMES for b in NAMES if a != b]
    assert more.numbers["mean.norm.transfer"].value == pytest.approx(np.mean(across))
    rows, before = table(found), table(plain)
    assert rows[~rows["part"].isin(options.controls)].reset_index(drop=True).equals(before)
    assert "shared part, random signs" in markdown(found) and "random signs" not in markdown(plain)
    assert "controls" in mean.to_dict() and "controls" not in plain.ablations[0].to_dict()


def test_parts_are_measured_as_adapters_of_their_own(place):
    folder, plan, v = place
    found = survey_transfer(plan, [folder / name for name in NAMES], TransferOptions(components=("mean", "held-out")))
    one, held = found.ablations
    base = load_base(plan.model)
    write_adapter(folder / "mean", base, v.mean(0), ("mean",))
    write_adapter(folder / "own", base, v[0] - v.mean(0), ("own",))
    write_adapter(folder / "others", base, (v[0] + v[2]) / 2, ("others",))
    paths = [folder / name for name in ("prose", "mean", "own", "others")]
    expected = {(each.domain, each.label): each for each in compare_adapters(plan, paths)}
    for domain in (*NAMES, "unseen"):
        for part, path in (("whole", "prose"), ("shared", "mean"), ("own", "own")):
            alone, change = expected[domain, str(folder / path)], one.change(part, "prose", domain)
            assert one.losses[part, "prose", domain].perplexity == pytest.approx(alone.perplexity, rel=1e-6)
            figures = (change.value, change.low, change.high)
            assert figures == pytest.approx((alone.change, alone.low, alone.high), abs=1e-4)
    without = expected["code", str(folder / "others")].perplexity
    assert held.losses["shared", "prose", "code"].perplexity == pytest.approx(without, rel=1e-6)
    across = [(a, b) for a in NAMES for b in NAMES if a != b]
    assert one.transfer("own").value == pytest.approx(np.mean([one.change("own", a, b).value for a, b in across]))
    assert one.in_domain("whole").value == pytest.approx(np.mean([one.change("whole", a, a).value for a in NAMES]))
    assert one.unseen("whole").value == pytest.approx(np.mean([one.change("whole", a, "unseen").value for a in NAMES]))


def test_what_is_left_is_a_ratio_and_missing_for_a_transfer_that_may_be_zero():
    generator, tokens = np.random.default_rng(0), (31,) * 40
    base = {name: generator.normal(90, 3, 40) for name in "ab"}

    def moved(name, nats, noise=0.3):
        return DomainLoss(tuple(base[name] + (31 * nats + generator.normal(0, noise, 40))), tokens, tokens)

    shifts = {"whole": -0.2, "shared": -0.1, "own": -0.05}
    losses = {(part, a, b): moved(b, nats) for part, nats in shifts.items() for a in "ab" for b in "ab"}
    plain = {name: DomainLoss(tuple(nll), tokens, tokens) for name, nll in base.items()}
    settings = EvaluateConfig(bootstrap_samples=500)
    found = Ablation("mean", ("a", "b"), (), plain, losses, settings)
    left = found.left("shared")
    assert left.value == pytest.approx(100 * found.transfer("shared").value / found.transfer("whole").value)
    assert left.value == pytest.approx(100 * np.expm1(-0.1) / np.expm1(-0.2), rel=0.05)
    assert left.low < left.value < left.high < 100
    assert found.left("whole").value == found.left("whole").low == 100.0 and found.unseen("whole") is None
    noisy = {**losses, **{("whole", a, b): moved(b, 0.0, noise=30.0) for a in "ab" for b in "ab"}}
    assert Ablation("mean", ("a", "b"), (), plain, noisy, settings).left("shared") is None


def test_what_cannot_be_compared_is_refused(place, tmp_path):
    folder, plan, v = place
    base, prose = load_base(plan.model), folder / "prose"
    several = write_adapter(tmp_path / "several", base, v[0], ("prose", "code"))
    elsewhere = write_adapter(tmp_path / "elsewhere", base, v[0], ("elsewhere",))
    narrow = write_adapter(tmp_path / "narrow", base, v[0], ("code",), ffn=False)
    for adapters, message in (
        ([prose, several], r"several was trained on prose, code: give adapters that were each trained"),
        ([prose, elsewhere], "was trained on elsewhere, which is not measured"),
        ([prose], "takes two or more"),
        ([prose, narrow], "in other modules"),
        ([prose, write_adapter(tmp_path / "still", base, np.zeros(160), ("code",))], "code are all alike"),
    ):
        refused(ConfigError, message, survey_transfer, plan, adapters)
    options, few = TransferOptions(components=("held-out",)), r"held-out.*three or more, and 2 were given"
    refused(ConfigError, few, survey_transfer, plan, [prose, folder / "code"], options)
    options, few = TransferOptions(components=("cross-fitted",)), r"cross-fitted.*three or more, and 2 were given"
    refused(ConfigError, few, survey_transfer, plan, [prose, folder / "code"], options)
    twice = TransferOptions(controls=("norm", "norm"))
    refused(ConfigError, "name each once", survey_transfer, plan, [prose, folder / "code"], twice)
    refused(AdapterError, "no such adapter folder", survey_transfer, plan, [prose, tmp_path / "missing"])


def test_adapters_with_gains_on_outputs_are_compared_too(place, tmp_path):
    folder, plan, _ = place
    names = ("prose", "code")
    paths = [tiny_adapters.save(folder / "base", tmp_path / name, "gain-ia3", domain=name) for name in names]
    vectors = read_gain_vectors(dict(zip(names, paths, strict=True)))
    assert vectors.values.shape == (2, 2 * (32 + 48 + 16 + 16))  # output and down-projection, keys, values
    found = survey_transfer(plan, paths, TransferOptions(components=("mean",))).ablations[0]
    for each in compare_adapters(plan, paths):
        if each.label != "base":
            trained = names[paths.index(Path(each.label))]
            assert found.losses["whole", trained, each.domain].perplexity == pytest.approx(each.perplexity, rel=1e-6)
    refused(ConfigError, "gains are in other modules", read_gain_vectors, {"a": paths[0], "b": folder / "code"})
