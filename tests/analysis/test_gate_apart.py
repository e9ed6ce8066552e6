"""Differences of mean gates equal those of whole tensors, and their intervals those of NumPy's own resampling."""

import numpy as np
import pytest
import torch
from scipy import stats
from test_gates import whole_gates

from gaintune.analysis import Group, apart, record_gates
from gaintune.analysis.gates.report import apart_table, row_table
from gaintune.analysis.gates.survey import GateRecord, LayerGates, compared
from gaintune.analysis.positions import ModulePosition
from gaintune.config import EvaluateConfig
from gaintune.errors import ConfigError
from support import tiny_gated

SETTINGS = EvaluateConfig(bootstrap_samples=4000, confidence=0.9, seed=1)
LAW, CODE = tiny_gated.tokens(rows=6, seed=5), tiny_gated.tokens(rows=9, seed=6)
RESPONSES = torch.arange(8) >= torch.tensor([3, 0, 8, 5, 7, 2])[:, None]  # the third row has none


@pytest.fixture(scope="module")
def found():
    """Gates of law's responses, in batches, and of all of code: as recorded, and whole, `(rows, tokens, r)` each."""
    model = tiny_gated.model()
    with record_gates(model) as recorder, torch.inference_mode():
        for rows in (slice(0, 4), slice(4, 6)):
            with recorder.counting("law", RESPONSES[rows]):
                model(input_ids=LAW[rows])
        with recorder.counting("code", torch.ones_like(CODE, dtype=torch.bool)):
            model(input_ids=CODE)
    whole = {"law": whole_gates(model, LAW), "code": whole_gates(model, CODE)}
    return recorder.result(), {name: {key: each.numpy() for key, each in of.items()} for name, of in whole.items()}


def by_row(gates, mask, *parts) -> list[np.ndarray]:
    """Every counted gate value of the modules whose name has one of the parts, row by row."""
    chosen = [values for name, values in gates.items() if any(part in name for part in parts)]
    return [np.concatenate([values[row][mask[row]].ravel() for values in chosen]) for row in range(len(mask))]


def test_rows_have_the_sums_of_their_counted_gates(found):
    record, whole = found
    for layer in record.domains["law"]:
        rows = by_row(whole["law"], RESPONSES.numpy(), layer.position.name)
        assert layer.row_values.tolist() == [len(row) for row in rows]
        assert layer.row_totals == pytest.approx([row.sum() for row in rows], rel=1e-5, abs=1e-9)
        assert layer.row_totals.sum() == pytest.approx(layer.total.sum(), rel=1e-5)


@pytest.mark.parametrize("depth, part, parts", [
    ("all", "all", [""]),
    ("late", "all", ["layers.2."]),
    ("all", "mlp", ["mlp"]),
    ("all", "q_proj", ["q_proj"]),
])  # fmt: skip
def test_two_domains_are_resampled_each_over_its_own_rows(found, depth, part, parts):
    record, whole = found
    one = by_row(whole["law"], RESPONSES.numpy(), *parts)
    one = [row for row in one if len(row)]
    other = by_row(whole["code"], np.ones((9, 8), bool), *parts)
    told = apart(record, Group("law", depth, part), Group("code", depth, part), SETTINGS)
    assert told.value == pytest.approx(np.concatenate(one).mean() - np.concatenate(other).mean(), rel=1e-4)
    generator = np.random.default_rng(0)
    deviations = []
    for rows in (one, other):
        sums, counts = np.array([row.sum() for row in rows]), np.array([len(row) for row in rows])
        drawn = generator.integers(len(rows), size=(4000, len(rows)))
        means = sums[drawn].sum(1) / counts[drawn].sum(1) - sums.sum() / counts.sum()
        deviations.append(means * np.sqrt(len(rows) / (len(rows) - 1)))
    first, second = (each.var() for each in deviations)
    freedom = (first + second) ** 2 / (first**2 / (len(one) + 1) + second**2 / (len(other) + 1)) - 2
    student = stats.t.ppf(0.95, freedom) / 1.644854
    low, high = student * np.quantile(deviations[0] - deviations[1], [0.05, 0.95])
    size = high - low
    assert told.low == pytest.approx(told.value + low, abs=0.06 * size)
    assert told.high == pytest.approx(told.value + high, abs=0.06 * size)


def test_parts_of_the_model_are_paired_by_rows(found):
    record, whole = found
    one, other = (np.array(by_row(whole["code"], np.ones((9, 8), bool), part)) for part in ("mlp", "self_attn"))
    told = apart(record, Group("code", part="mlp"), Group("code", part="attention"), SETTINGS)
    differences = one.mean(axis=1) - other.mean(axis=1)
    assert told.value == pytest.approx(differences.mean(), rel=1e-4)
    student = 1.859548 * differences.std(ddof=1) / 3
    assert (told.high - told.low) / 2 == pytest.approx(student, rel=0.1)
    same = apart(record, Group("code", part="mlp"), Group("code", part="mlp"), SETTINGS)
    assert (same.value, same.low, same.high) == (0, 0, 0)


def made(domain_rows: dict[str, np.ndarray]) -> GateRecord:
    """A record of one module of rank 1 from the mean gates of rows of ten tokens."""
    place = ModulePosition("model.layers.0.mlp.up_proj", 0, "early", "up_proj", "mlp")
    empty = np.zeros(1)
    return GateRecord("default", {
        name: (LayerGates(place, 10 * len(rows), empty, empty, empty, np.full(len(rows), 10), 10 * rows),)
        for name, rows in domain_rows.items()
    })  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("rows", [(4, 4), (8, 8), (4, 30)])
def test_intervals_cover_the_true_difference_as_often_as_they_say(rows):
    generator = np.random.default_rng(3)
    settings = EvaluateConfig(bootstrap_samples=400, confidence=0.9)
    covered = 0
    for _ in range(300):
        samples = {"one": generator.normal(0.5, 0.1, rows[0]), "other": generator.normal(0.3, 0.02, rows[1])}
        told = apart(made(samples), Group("one"), Group("other"), settings)
        covered += told.low <= 0.2 <= told.high
    assert 0.86 * 300 <= covered <= 0.94 * 300


def test_one_row_has_no_interval_and_a_group_without_gates_is_refused():
    record = made({"one": np.array([0.5]), "other": np.array([0.2, 0.4])})
    told = apart(record, Group("one"), Group("other"), SETTINGS)
    assert (told.value, told.low, told.high) == (pytest.approx(0.2), None, None)
    with pytest.raises(ConfigError, match="no gate was counted of one, late, all"):
        apart(record, Group("one", "late"), Group("other"), SETTINGS)
    with pytest.raises(ConfigError, match="domains: one, other"):
        apart(record, Group("third"), Group("other"), SETTINGS)


def test_everything_is_compared_in_both_directions(found):
    record, whole = found
    pairs = compared(record, SETTINGS)
    depths, blocks, projections = 4, 3, 7
    assert len(pairs) == 2 * (depths * blocks + projections) + 2 * (2 + projections * (projections - 1))
    forth, back = (Group("law", "late"), Group("code", "late")), (Group("code", "late"), Group("law", "late"))
    assert pairs[forth].value == -pairs[back].value
    assert pairs[forth].low == pytest.approx(-pairs[back].high)
    alone = apart(record, *forth, SETTINGS)  # whatever else is asked
    assert (pairs[forth].low, pairs[forth].high) == pytest.approx((alone.low, alone.high))
    table = apart_table(compared(record, SETTINGS))
    assert len(table) == len(pairs) and table["low"].le(table["difference"]).all()
    rows = row_table(record)
    assert len(rows) == 21 * (5 + 9)
    chosen = rows[(rows["domain"] == "law") & (rows["row"] == 3) & (rows["depth"] == "late")].set_index("projection")
    name = next(name for name in whole["law"] if "layers.2." in name and "down_proj" in name)
    assert chosen.loc["down_proj", "mean"] == pytest.approx(
        whole["law"][name][3][RESPONSES[3].numpy()].mean(), rel=1e-5
    )


def test_a_layer_that_is_used_twice_sees_each_row_twice():
    model = tiny_gated.model()
    with record_gates(model) as recorder, torch.inference_mode():
        with recorder.counting("law", RESPONSES):
            model(input_ids=LAW)
        once = recorder.result().domains["law"][0]
        with recorder.counting("twice", RESPONSES):
            model(input_ids=LAW)
            model(input_ids=LAW)
    twice = recorder.result().domains["twice"][0]
    assert np.array_equal(twice.row_values, 2 * once.row_values)
    assert twice.row_totals == pytest.approx(2 * once.row_totals)
