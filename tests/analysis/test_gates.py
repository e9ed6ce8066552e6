"""Recorded gates equal those of whole gate tensors, and intervals of their differences NumPy's own resampling."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from scipy import stats

from gaintune.analysis import Group, apart, record_gates, response_tokens, summarize
from gaintune.analysis.gates.report import apart_table, row_table
from gaintune.analysis.gates.survey import GateRecord, LayerGates, all_tokens, compared, levels
from gaintune.analysis.positions import DEPTHS, ModulePosition, positions_of
from gaintune.config import EvaluateConfig
from gaintune.errors import AdapterError, ConfigError, TrainingError, UnsupportedModuleError
from gaintune.tuners.disel import disel_layers
from support import refused, tiny_gated

IDS = tiny_gated.tokens()
EVERY = torch.ones_like(IDS, dtype=torch.bool)
LABELS = torch.tensor([
    [-100, -100, 5, 6, 7, -100, -100, -100],  # a prompt, a response, padding
    [-100, 4, 5, -100, -100, 6, 7, -100],  # two texts in a row, padding
    [-100, -100, -100, -100, -100, -100, -100, 9],
    [1, 2, 3, 4, 5, 6, 7, 8],
])  # fmt: skip


@pytest.fixture(scope="module")
def gated():
    return tiny_gated.model()


def whole_gates(model, ids) -> dict[str, torch.Tensor]:
    """Every layer's gates `(batch, tokens, r)`, from its inputs and parameters by the formula, in float64."""
    inputs, handles = {}, []
    for name, layer in disel_layers(model):
        handles.append(layer.register_forward_pre_hook(lambda _, given, name=name: inputs.update({name: given[0]})))
    with torch.no_grad():
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    gates = {}
    for name, layer in disel_layers(model):
        gate = layer.lora_G["default"]
        gates[name] = torch.sigmoid(inputs[name].double() @ gate.weight.double().T + gate.bias.double()).detach()
    return gates


def recorded(model, mask, ids=IDS, **options):
    with record_gates(model, **options) as recorder, torch.inference_mode():
        for rows in (slice(0, 2), slice(2, None)):  # two batches add up
            with recorder.counting("text", mask[rows]):
                model(input_ids=ids[rows])
    return recorder.result().domains["text"]


@pytest.mark.parametrize("mask", [torch.ones(4, 8, dtype=torch.bool), LABELS != -100], ids=["all", "some"])
def test_histograms_and_moments_equal_those_of_whole_gate_tensors(gated, mask):
    expected, layers = whole_gates(gated, IDS), recorded(gated, mask)
    assert [each.position.name for each in layers] == list(expected)
    for each in layers:
        values = expected[each.position.name][mask].numpy()
        assert each.tokens == len(values) == int(mask.sum())
        for part in range(tiny_gated.RANK):
            counts, _ = np.histogram(values[:, part], bins=100, range=(0, 1))
            assert each.histogram[part].sum() == len(values)
            assert np.abs(each.histogram[part] - counts).sum() <= 2  # float32 may put a value into the next bin
        assert each.total == pytest.approx(values.sum(0), rel=1e-5)
        assert each.squares == pytest.approx((values**2).sum(0), rel=1e-5)
    every = np.concatenate([values[mask].numpy().ravel() for values in expected.values()])
    figures = summarize(layers)
    assert figures.values == every.size
    assert figures.mean == pytest.approx(every.mean(), rel=1e-5)
    assert figures.deviation == pytest.approx(every.std(), rel=1e-4)
    assert figures.closed == pytest.approx((every < 0.05).mean(), abs=2e-3)
    assert figures.open == pytest.approx((every >= 0.5).mean(), abs=2e-3)
    one = np.concatenate([values[mask].numpy()[:, 1] for values in expected.values()])
    assert summarize(layers, part=1).mean == pytest.approx(one.mean(), rel=1e-5)


def test_gates_of_exactly_zero_and_one_are_counted_in_the_outer_bins(gated):
    with record_gates(gated, bins=20) as recorder:
        observe = recorder._layers[next(iter(recorder._layers))].gate_observers[0]
        with recorder.counting("edges", torch.ones(1, 4, dtype=torch.bool)):
            observe("default", torch.tensor([[[0.0], [0.05], [0.5], [1.0]]]))
    (layer,) = recorder.result().domains["edges"]
    assert layer.histogram[0].nonzero()[0].tolist() == [0, 1, 10, 19]
    figures = summarize([layer])
    assert (figures.closed, figures.open) == (0.25, 0.5)


def test_a_gate_counts_by_its_own_token_and_padding_never_does(gated):
    batch = {"labels": LABELS}
    assert torch.equal(response_tokens(batch), LABELS != -100)
    assert torch.equal(all_tokens(batch), torch.arange(8) < torch.tensor([[5], [7], [8], [8]]))
    others = IDS.clone()
    others[0, 5:] = 1  # other padding after the last counted token of a causal model
    others[1, 7:] = 1
    before, after = recorded(gated, all_tokens(batch)), recorded(gated, all_tokens(batch), others)
    for one, other in zip(before, after, strict=True):
        assert np.array_equal(one.histogram, other.histogram)


def test_outputs_are_untouched_and_no_observer_stays(gated):
    with torch.no_grad():
        before = gated(input_ids=IDS).logits
        with pytest.raises(RuntimeError, match="stop"), record_gates(gated) as recorder:
            with recorder.counting("text", EVERY):
                assert torch.equal(gated(input_ids=IDS).logits, before)
            raise RuntimeError("stop")
        assert torch.equal(gated(input_ids=IDS).logits, before)
    assert all(layer.gate_observers == [] for _, layer in disel_layers(gated))


def test_memory_does_not_grow_with_text(gated):
    stored = []
    with record_gates(gated) as recorder, torch.no_grad():
        for length in (8, 32, 64):
            ids = tiny_gated.tokens(length=length)
            with recorder.counting("text", torch.ones_like(ids, dtype=torch.bool)):
                gated(input_ids=ids)
            stored.append(recorder.stored_values)
    layers = len(list(disel_layers(gated)))
    fixed = layers * tiny_gated.RANK * (100 + 2 + 1)
    assert stored == [fixed + layers * 4 * 2 * batches for batches in (1, 2, 3)]  # two numbers a layer and row
    assert recorder.result().domains["text"][0].tokens == 4 * (8 + 32 + 64)


def test_only_forward_passes_inside_counting_count_and_domains_stay_apart(gated):
    with record_gates(gated) as recorder, torch.no_grad():
        gated(input_ids=IDS)
        for domain, times in (("law", 1), ("code", 2)):
            for _ in range(times):
                with recorder.counting(domain, EVERY):
                    gated(input_ids=IDS)
        with recorder.counting("nothing", ~EVERY):
            gated(input_ids=IDS)
    domains = recorder.result().domains
    assert [domains[name][0].tokens for name in ("law", "code", "nothing")] == [32, 64, 0]
    assert np.array_equal(2 * domains["law"][0].histogram, domains["code"][0].histogram)
    refused(ValueError, "no gate value", summarize, domains["nothing"])


def test_recording_works_inside_and_outside_of_inference_mode_and_while_training(gated):
    with record_gates(gated) as recorder:
        with torch.inference_mode(), recorder.counting("text", EVERY):
            gated(input_ids=IDS)
        with recorder.counting("text", EVERY):
            gated(input_ids=IDS).logits.sum().backward()
    gated.zero_grad()
    first = recorder.result().domains["text"][0]
    assert first.tokens == 64 and (first.histogram % 2 == 0).all()


def test_places_say_layer_third_projection_and_block():
    model = tiny_gated.model(tiny_gated.llama(layers=7))
    places = list(positions_of(model, [name for name, _ in disel_layers(model)]).values())
    assert [place.depth for place in places if place.projection == "q_proj"] == [
        *["early"] * 3, *["middle"] * 2, *["late"] * 2
    ]  # fmt: skip
    blocks = {place.projection: place.block for place in places}
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    mlp = ["gate_proj", "up_proj", "down_proj"]
    assert blocks == {**dict.fromkeys(attention, "attention"), **dict.fromkeys(mlp, "mlp")}
    assert {place.layer for place in places} == set(range(7))


def test_projections_that_share_a_name_get_longer_names():
    model = tiny_gated.model(tiny_gated.gpt2())
    places = positions_of(model, [name for name, _ in disel_layers(model)]).values()
    blocks = {place.projection: place.block for place in places}
    assert blocks == {"c_attn": "attention", "attn.c_proj": "attention", "c_fc": "mlp", "mlp.c_proj": "mlp"}
    assert [place.depth for place in places if place.projection == "c_fc"] == list(DEPTHS)


def test_one_of_several_adapters_is_recorded_by_name():
    model = tiny_gated.model()
    model.add_adapter("other", model.peft_config["default"])
    tiny_gated.randomise(model, "other", seed=9)
    with pytest.raises(AdapterError, match="default, other"), record_gates(model):
        pass
    with pytest.raises(AdapterError, match="'missing'"), record_gates(model, adapter="missing"):
        pass
    model.base_model.set_adapter(["default", "other"])
    with record_gates(model, adapter="other") as recorder, torch.no_grad():
        with recorder.counting("text", EVERY):
            model(input_ids=IDS)
        model.set_adapter("default")
        with recorder.counting("text", EVERY):
            model(input_ids=IDS)
    assert recorder.result().domains["text"][0].tokens == EVERY.numel()


def test_what_cannot_be_recorded_is_refused(gated):
    torch.manual_seed(0)
    lora = get_peft_model(tiny_gated.AutoModelForCausalLM.from_config(tiny_gated.llama()), LoraConfig(r=2))
    with pytest.raises(AdapterError, match="only a DISeL adapter"), record_gates(lora):
        pass
    with pytest.raises(AdapterError, match="no sigmoid gates"), record_gates(tiny_gated.model(gate_kind="relu")):
        pass
    with pytest.raises(ConfigError, match="multiple of 20"), record_gates(gated, bins=50):
        pass
    with record_gates(gated) as recorder, torch.no_grad():
        with pytest.raises(ConfigError, match="bool"), recorder.counting("text", torch.ones(4, 8)):
            pass
        with (
            pytest.raises(UnsupportedModuleError, match="32 tokens, but the mask has 16"),
            recorder.counting("text", torch.ones(2, 8, dtype=torch.bool)),
        ):
            gated(input_ids=IDS)


def test_gates_that_are_not_finite_are_an_error_not_a_figure():
    model = tiny_gated.model()
    with torch.no_grad():
        next(layer for _, layer in disel_layers(model)).lora_G["default"].bias.fill_(float("nan"))
    with record_gates(model) as recorder, torch.no_grad():
        with recorder.counting("text", EVERY):
            model(input_ids=IDS)
        refused(TrainingError, "not finite", recorder.result)


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
        assert layer.row_open.tolist() == [(row >= 0.5).sum() for row in rows]


def test_a_level_and_a_share_of_open_gates_have_intervals_over_rows(found):
    record, whole = found
    late = Group("code", "late")
    rows = [row.mean() for row in by_row(whole["code"], np.ones((9, 8), bool), "layers.2.")]
    level = levels(record, SETTINGS, [late])[late]
    reach = 1.859548 * np.std(rows, ddof=1) / 3  # Student's t of nine rows at 90 %
    assert level.value == pytest.approx(np.mean(rows), rel=1e-4)
    assert (level.high - level.low) / 2 == pytest.approx(reach, rel=0.1)
    pair = (Group("code"), Group("law"))
    masks = {"code": np.ones((9, 8), bool), "law": RESPONSES.numpy()}
    shares = [np.mean(np.concatenate(by_row(whole[name], mask, "")) >= 0.5) for name, mask in masks.items()]
    difference = compared(record, SETTINGS, [pair], "open")[pair]
    assert difference.value == pytest.approx(shares[0] - shares[1]) and difference.low < difference.value
    assert 0 < shares[0] < 1, "else nothing is counted"


@pytest.mark.parametrize(("depth", "part", "parts"), [
    ("all", "all", [""]), ("late", "all", ["layers.2."]), ("all", "mlp", ["mlp"]), ("all", "q_proj", ["q_proj"]),
])  # fmt: skip
def test_two_domains_are_resampled_each_over_its_own_rows(found, depth, part, parts):
    record, whole = found
    one = by_row(whole["law"], RESPONSES.numpy(), *parts)
    one = [row for row in one if len(row)]
    other = by_row(whole["code"], np.ones((9, 8), bool), *parts)
    difference = apart(record, Group("law", depth, part), Group("code", depth, part), SETTINGS)
    assert difference.value == pytest.approx(np.concatenate(one).mean() - np.concatenate(other).mean(), rel=1e-4)
    generator, deviations = np.random.default_rng(0), []
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
    assert difference.low == pytest.approx(difference.value + low, abs=0.06 * size)
    assert difference.high == pytest.approx(difference.value + high, abs=0.06 * size)


def test_parts_of_the_model_are_paired_by_rows(found):
    record, whole = found
    one, other = (np.array(by_row(whole["code"], np.ones((9, 8), bool), part)) for part in ("mlp", "self_attn"))
    difference = apart(record, Group("code", part="mlp"), Group("code", part="attention"), SETTINGS)
    differences = one.mean(axis=1) - other.mean(axis=1)
    assert difference.value == pytest.approx(differences.mean(), rel=1e-4)
    assert (difference.high - difference.low) / 2 == pytest.approx(1.859548 * differences.std(ddof=1) / 3, rel=0.1)
    same = apart(record, Group("code", part="mlp"), Group("code", part="mlp"), SETTINGS)
    assert (same.value, same.low, same.high) == (0, 0, 0)


def made(domain_rows: dict[str, np.ndarray]) -> GateRecord:
    """A record of one module of rank 1 from the mean gates of rows of ten tokens."""
    place = ModulePosition("model.layers.0.mlp.up_proj", 0, "early", "up_proj", "mlp")
    empty = np.zeros(1)
    return GateRecord("default", {
        name: (LayerGates(place, 10 * len(rows), empty, empty, empty, np.full(len(rows), 10), 10 * rows, 0 * rows),)
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
        difference = apart(made(samples), Group("one"), Group("other"), settings)
        covered += difference.low <= 0.2 <= difference.high
    assert 0.86 * 300 <= covered <= 0.94 * 300


def test_one_row_has_no_interval_and_a_group_without_gates_is_refused():
    record = made({"one": np.array([0.5]), "other": np.array([0.2, 0.4])})
    difference = apart(record, Group("one"), Group("other"), SETTINGS)
    assert (difference.value, difference.low, difference.high) == (pytest.approx(0.2), None, None)
    with pytest.raises(ConfigError, match="no gate was counted of one, late, all"):
        apart(record, Group("one", "late"), Group("other"), SETTINGS)
    refused(ConfigError, "domains: one, other", apart, record, Group("third"), Group("other"), SETTINGS)


def test_everything_is_compared_in_both_directions(found):
    record, whole = found
    pairs = compared(record, SETTINGS)
    depths, blocks, projections = 4, 3, 7
    within = 2 + projections * (projections - 1) + (depths - 1) * (depths - 2)
    assert len(pairs) == 2 * (depths * blocks + projections) + 2 * within
    forth, back = (Group("law", "late"), Group("code", "late")), (Group("code", "late"), Group("law", "late"))
    assert pairs[forth].value == -pairs[back].value and pairs[forth].low == pytest.approx(-pairs[back].high)
    alone = apart(record, *forth, SETTINGS)  # whatever else is asked
    assert (pairs[forth].low, pairs[forth].high) == pytest.approx((alone.low, alone.high))
    table = apart_table(compared(record, SETTINGS))
    assert len(table) == len(pairs) and table["low"].le(table["difference"]).all()
    rows = row_table(record)
    assert len(rows) == 21 * (5 + 9)
    chosen = rows[(rows["domain"] == "law") & (rows["row"] == 3) & (rows["depth"] == "late")].set_index("projection")
    name = next(name for name in whole["law"] if "layers.2." in name and "down_proj" in name)
    expected = whole["law"][name][3][RESPONSES[3].numpy()].mean()
    assert chosen.loc["down_proj", "mean"] == pytest.approx(expected, rel=1e-5)


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
