"""Recorded gates equal those computed from whole gate tensors; masks, memory, and a model left as it was."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from gaintune.analysis import record_gates, response_tokens, summarise
from gaintune.analysis.gates.survey import all_tokens
from gaintune.analysis.positions import DEPTHS, positions_of
from gaintune.errors import AdapterError, ConfigError, TrainingError, UnsupportedModuleError
from gaintune.tuners.disel import disel_layers
from support import refused, tiny_gated

IDS = tiny_gated.tokens()
LABELS = torch.tensor(
    [
        [-100, -100, 5, 6, 7, -100, -100, -100],  # a prompt, a response, padding
        [-100, 4, 5, -100, -100, 6, 7, -100],  # two texts in a row, padding
        [-100, -100, -100, -100, -100, -100, -100, 9],
        [1, 2, 3, 4, 5, 6, 7, 8],
    ]
)


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
    expected = whole_gates(gated, IDS)
    layers = recorded(gated, mask)
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
    figures = summarise(layers)
    assert figures.values == every.size
    assert figures.mean == pytest.approx(every.mean(), rel=1e-5)
    assert figures.deviation == pytest.approx(every.std(), rel=1e-4)
    assert figures.closed == pytest.approx((every < 0.05).mean(), abs=2e-3)
    assert figures.open == pytest.approx((every >= 0.5).mean(), abs=2e-3)
    one = np.concatenate([values[mask].numpy()[:, 1] for values in expected.values()])
    assert summarise(layers, part=1).mean == pytest.approx(one.mean(), rel=1e-5)


def test_gates_of_exactly_zero_and_one_are_counted_in_the_outer_bins(gated):
    with record_gates(gated, bins=20) as recorder:
        observe = recorder._layers[next(iter(recorder._layers))].gate_observers[0]
        with recorder.counting("edges", torch.ones(1, 4, dtype=torch.bool)):
            observe("default", torch.tensor([[[0.0], [0.05], [0.5], [1.0]]]))
    (layer,) = recorder.result().domains["edges"]
    assert layer.histogram[0].nonzero()[0].tolist() == [0, 1, 10, 19]
    figures = summarise([layer])
    assert (figures.closed, figures.open) == (0.25, 0.5)


def test_a_gate_counts_by_its_own_token_and_padding_never_does(gated):
    batch = {"labels": LABELS}
    assert torch.equal(response_tokens(batch), LABELS != -100)
    ends = [5, 7, 8, 8]
    assert torch.equal(all_tokens(batch), torch.arange(8) < torch.tensor(ends).unsqueeze(1))
    others = IDS.clone()
    others[0, 5:] = 1  # other padding after the last counted token of a causal model
    others[1, 7:] = 1
    for before, after in zip(
        recorded(gated, all_tokens(batch)), recorded(gated, all_tokens(batch), others), strict=True
    ):
        assert np.array_equal(before.histogram, after.histogram)


def test_outputs_are_untouched_and_no_observer_stays(gated):
    with torch.no_grad():
        before = gated(input_ids=IDS).logits
        with pytest.raises(RuntimeError, match="stop"), record_gates(gated) as recorder:
            with recorder.counting("text", torch.ones_like(IDS, dtype=torch.bool)):
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
    assert stored == [fixed + layers * 4 * batches for batches in (1, 2, 3)]  # one number a layer and row
    assert recorder.result().domains["text"][0].tokens == 4 * (8 + 32 + 64)


def test_only_forward_passes_inside_counting_count_and_domains_stay_apart(gated):
    mask = torch.ones_like(IDS, dtype=torch.bool)
    with record_gates(gated) as recorder, torch.no_grad():
        gated(input_ids=IDS)
        for domain, times in (("law", 1), ("code", 2)):
            for _ in range(times):
                with recorder.counting(domain, mask):
                    gated(input_ids=IDS)
        with recorder.counting("nothing", ~mask):
            gated(input_ids=IDS)
    domains = recorder.result().domains
    assert [domains[name][0].tokens for name in ("law", "code", "nothing")] == [32, 64, 0]
    assert np.array_equal(2 * domains["law"][0].histogram, domains["code"][0].histogram)
    refused(ValueError, "no gate value", summarise, domains["nothing"])


def test_recording_works_inside_and_outside_of_inference_mode_and_while_training(gated):
    mask = torch.ones_like(IDS, dtype=torch.bool)
    with record_gates(gated) as recorder:
        with torch.inference_mode(), recorder.counting("text", mask):
            gated(input_ids=IDS)
        with recorder.counting("text", mask):
            gated(input_ids=IDS).logits.sum().backward()
    gated.zero_grad()
    first = recorder.result().domains["text"][0]
    assert first.tokens == 64
    assert (first.histogram % 2 == 0).all()


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


def test_projections_that_share_a_name_are_told_apart():
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
    mask = torch.ones_like(IDS, dtype=torch.bool)
    model.base_model.set_adapter(["default", "other"])
    with record_gates(model, adapter="other") as recorder, torch.no_grad():
        with recorder.counting("text", mask):
            model(input_ids=IDS)
        model.set_adapter("default")
        with recorder.counting("text", mask):
            model(input_ids=IDS)
    assert recorder.result().domains["text"][0].tokens == mask.numel()


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
        with recorder.counting("text", torch.ones_like(IDS, dtype=torch.bool)):
            model(input_ids=IDS)
        refused(TrainingError, "not finite", recorder.result)
