"""Adapted weights equal their formulas; what of an update leaves a column space equals a float64 reference."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from gaintune.adapters import AdapterRecord, load_adapter, save_adapter
from gaintune.analysis import Subject, SubspaceOptions, survey_subspace, write_result
from gaintune.analysis.subspace.report import markdown, remarks, result
from gaintune.analysis.subspace.survey import adapted_weights, compare_weights, share_outside
from gaintune.config import MethodConfig, ModelConfig, Plan
from gaintune.errors import AdapterError, BaseMismatchError, ConfigError
from gaintune.methods import attach
from gaintune.models import load_base
from support import refused, tiny_adapters, tiny_base


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reference(before: np.ndarray, after: np.ndarray, top: int, epsilon: float) -> tuple[float, int, list[float]]:
    """Share outside by least squares onto the columns, and similarities by eigenvectors of the Gram matrices."""
    update = after - before
    fitted = before @ np.linalg.lstsq(before, update, rcond=None)[0]
    outside = ((update - fitted) ** 2).sum() / (update**2).sum()
    old = np.linalg.eigh(before @ before.T)[1][:, ::-1][:, : min(before.shape)]
    new = np.linalg.eigh(after @ after.T)[1][:, ::-1][:, :top]
    similarities = [max(abs(float(x @ y)) for x in old.T) for y in new.T]
    return outside, sum(each < epsilon for each in similarities), similarities


@pytest.mark.parametrize("shape", [(24, 10), (16, 16), (10, 24)], ids=["tall", "square", "wide"])
def test_low_rank_updates_equal_the_numpy_reference(shape):
    before = random(*shape)
    after = before + 2.0 * random(shape[0], 2, seed=1) @ random(2, shape[1], seed=2)
    settings = SubspaceOptions(top=6, epsilon=0.6)
    figures = compare_weights(before, after, settings)
    outside, intruders, similarities = reference(before.numpy(), after.numpy(), 6, 0.6)
    assert figures.rank == min(shape) and figures.has_outside is (shape[0] > shape[1])
    assert figures.has_outside_rows is (shape[1] > shape[0])
    assert figures.outside == pytest.approx(outside, rel=1e-9, abs=1e-24)
    assert (figures.outside > 0.1) is figures.has_outside
    assert figures.similarities == pytest.approx(similarities, rel=1e-7)
    assert figures.intruders == intruders and 0 < intruders < 6
    assert figures.update_energy == pytest.approx(float(((after - before) ** 2).sum()), rel=1e-12)
    turned = compare_weights(before.T, after.T, settings)
    assert turned.outside == pytest.approx(figures.outside_rows, rel=1e-9, abs=1e-24)
    assert turned.outside_rows == pytest.approx(figures.outside, rel=1e-9, abs=1e-24)


def test_gains_leave_nothing_outside_the_column_space_but_may_leave_the_row_space():
    before = random(24, 10)
    figures = compare_weights(before, before * (1 + 0.3 * random(10, seed=1)))
    assert figures.has_outside and figures.outside < 1e-28
    wide = compare_weights(before.T, before.T * (1 + 0.3 * random(24, seed=1)))
    assert wide.has_outside_rows and wide.outside_rows > 0.1


def test_an_update_of_nothing_has_no_shares_and_no_intruders():
    before = random(8, 5)
    figures = compare_weights(before, before.clone())
    assert figures.outside is None and figures.outside_rows is None and figures.outside_leading is None
    assert figures.intruders == 0 and min(figures.similarities) == pytest.approx(1.0)
    scaled = compare_weights(before, before.clone(), SubspaceOptions(relative_update=0.1)).scaled
    assert scaled == figures, "nothing can be scaled to no size"


@pytest.mark.parametrize("relative", [0.02, 0.7, 3.0])
@pytest.mark.parametrize("kind", ["low-rank", "gains"])
def test_updates_scaled_to_one_size_equal_the_numpy_reference(kind, relative):
    before = random(24, 10)
    update = random(24, 1, seed=1) @ random(1, 10, seed=2) if kind == "low-rank" else before * random(10, seed=3)
    plain = SubspaceOptions(top=6, epsilon=0.8)
    figures = compare_weights(before, before + update, plain.model_copy(update={"relative_update": relative}))
    factor = relative * np.sqrt((before.numpy() ** 2).sum() / (update.numpy() ** 2).sum())
    outside, intruders, similarities = reference(before.numpy(), (before + factor * update).numpy(), 6, 0.8)
    scaled = figures.scaled
    assert scaled.similarities == pytest.approx(similarities, rel=1e-7) and scaled.intruders == intruders
    assert (scaled.update_energy / scaled.weight_energy) ** 0.5 == pytest.approx(relative)
    assert scaled.outside == pytest.approx(outside, rel=1e-9, abs=1e-24) and scaled.scaled is None
    whole = compare_weights(before, before + factor * update, plain)
    assert scaled.outside_leading == pytest.approx(whole.outside_leading)
    assert scaled.singular_values == pytest.approx(whole.singular_values)
    assert replace(figures, scaled=None) == compare_weights(before, before + update, plain)


def test_at_equal_size_a_gain_makes_many_intruders_in_a_module_and_a_rank_one_update_makes_one():
    before, options = random(40, 40), SubspaceOptions(epsilon=0.7, relative_update=2.0)
    rank_one = random(40, 1, seed=1) @ random(1, 40, seed=2)
    ones = [compare_weights(before, before + size * rank_one, options) for size in (1e-3, 1.0)]
    assert [each.intruders for each in ones] == [0, 1] and [each.scaled.intruders for each in ones] == [1, 1]
    gains = compare_weights(before, before * (1 + 1e-3 * random(40, seed=3)), options)
    assert gains.intruders == 0 and gains.scaled.intruders > 2


def test_a_direction_from_nowhere_is_one_intruder_and_lies_outside():
    before = torch.diag(torch.tensor([5.0, 4.0, 3.0, 0.0], dtype=torch.float64))[:, :3]
    after = before.clone()
    after[3, 2] = 9.0  # the third direction is turned almost wholly into the fourth, which the weight never reached
    figures = compare_weights(before, after, SubspaceOptions(top=3, epsilon=0.5))
    assert figures.rank == 3 and figures.outside == pytest.approx(1.0)
    assert figures.intruders == 1 and figures.similarities[0] == pytest.approx(3 / 90**0.5)
    assert compare_weights(before, after, SubspaceOptions(top=3, epsilon=0.3)).intruders == 0


def test_the_rank_follows_the_tolerance_and_leading_directions_the_energy():
    basis, _ = np.linalg.qr(random(6, 6).numpy())
    before = torch.from_numpy(basis[:, :4] @ np.diag([10.0, 1.0, 1e-3, 1e-9]) @ np.linalg.qr(random(4, 4).numpy())[0])
    update = torch.from_numpy(np.outer(basis[:, 2], [1.0, 0, 0, 0]) + np.outer(basis[:, 5], [0, 2.0, 0, 0]))
    figures = compare_weights(before, before + update)
    assert figures.rank == 3  # 1e-9 of 10 is below 6 fp32 epsilons
    assert figures.outside == pytest.approx(0.8)
    assert figures.leading_rank == 1 and figures.outside_leading == pytest.approx(1.0)
    assert compare_weights(before, before + update, SubspaceOptions(tolerance=1e-2)).rank == 2
    assert compare_weights(before, before + update, SubspaceOptions(tolerance=0)).rank == 4
    assert compare_weights(before, before + update, SubspaceOptions(leading=1.0)).leading_rank == 3


def test_wrong_settings_and_weights_are_refused():
    for wrong in (
        {"top": 0},
        {"epsilon": 0},
        {"epsilon": 1.5},
        {"leading": 0},
        {"tolerance": 1.0},
        {"relative_update": 0},
    ):
        refused(ConfigError, next(iter(wrong)), SubspaceOptions.read, wrong, "here")
    refused(ConfigError, "one shape", compare_weights, random(3, 2), random(2, 3))
    refused(ConfigError, "zero everywhere", compare_weights, torch.zeros(3, 2), random(3, 2))
    assert share_outside(torch.zeros(3, 2), torch.eye(3)[:, :1]) is None


NARROW = {"head_dim": 4, "intermediate_size": 24}  # o_proj and down_proj reach 16 and 24 of 32 outputs: an outside
O_PROJ = "model.layers.0.self_attn.o_proj"
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    """A base whose output projections do not reach every output."""
    return tiny_base.folder(tmp_path_factory.mktemp("narrow"), dtype=torch.float32, **NARROW)


def adapter(base, folder, method: MethodConfig):
    return tiny_adapters.save(base, folder, method, seed=5, scale=0.2)


def method(name: str, **options) -> MethodConfig:
    return MethodConfig(name=name, label=name, **options)


def plan_of(base) -> Plan:
    return Plan(model=ModelConfig(name=str(base), device="cpu"))


def pairs(base_folder, folder, **options):
    with adapted_weights(load_base(str(base_folder), dtype=torch.float32), folder, **options) as weights:
        return {pair.name: pair for pair in weights}


def test_weights_of_gains_and_lora_equal_their_formulas_in_float64(narrow, tmp_path):
    weight = load_base(str(narrow), dtype=torch.float32).model.state_dict()[f"{O_PROJ}.weight"].double()
    gains = adapter(narrow, tmp_path / "gain", method("gain-ffn"))
    v = load_file(gains / WEIGHTS)[f"base_model.model.{O_PROJ}.gain_v"]
    found = pairs(narrow, gains)
    assert len(found) == 4 and found[O_PROJ].adapted.dtype == torch.float64
    assert torch.equal(found[O_PROJ].pretrained, weight)
    assert torch.equal(found[O_PROJ].adapted, weight * (1 + v))  # the gain is rounded to fp32 as it is in the model
    both = adapter(narrow, tmp_path / "both", method("gain-ia3"))
    v = load_file(both / WEIGHTS)["base_model.model.model.layers.1.self_attn.v_proj.gain_v"]
    weighed = pairs(narrow, both)
    values = weighed["model.layers.1.self_attn.v_proj"]
    assert len(weighed) == 8 and torch.equal(values.adapted, values.pretrained * (1 + v)[:, None])
    lora = adapter(narrow, tmp_path / "lora", method("lora", rank=2, alpha=6.0))
    tensors = load_file(lora / WEIGHTS)
    a, b = (tensors[f"base_model.model.{O_PROJ}.lora_{part}.weight"].double() for part in "AB")
    torch.testing.assert_close(pairs(narrow, lora)[O_PROJ].adapted, weight + 3 * b @ a, rtol=1e-6, atol=1e-6)


def test_full_weights_and_pissa_are_compared_with_the_untouched_base(narrow, tmp_path):
    """PiSSA takes its start out of the base's weight as it is loaded."""
    weight = load_base(str(narrow), dtype=torch.float32).model.state_dict()[f"{O_PROJ}.weight"].double()
    for name, options in (("full", {}), ("pissa", {"rank": 2})):
        found = pairs(narrow, adapter(narrow, tmp_path / name, method(name, **options)))
        assert torch.equal(found[O_PROJ].pretrained, weight), name
        assert not torch.equal(found[O_PROJ].adapted, weight), name
    assert "lm_head" in pairs(narrow, tmp_path / "full")


def test_a_note_names_what_full_weights_change_beside_linear_weights(narrow, tmp_path, caplog):
    pairs(narrow, adapter(narrow, tmp_path / "full", method("full")))
    (note,) = [record.message for record in caplog.records if "is left out" in record.message]
    assert "model.layers.0.input_layernorm.weight" in note and "q_proj" not in note
    base = load_base(str(narrow), dtype=torch.float32)
    attach(base.model, method("full"), seed=0)
    with torch.no_grad():
        base.model.get_submodule(O_PROJ).weight.mul_(2)
    save_adapter(base.model, tmp_path / "one", AdapterRecord(str(narrow), base.fingerprint, "full", "full", ("prose",)))
    caplog.clear()
    pairs(narrow, tmp_path / "one")
    assert not [record for record in caplog.records if "is left out" in record.message]


def test_a_lack_of_memory_is_not_blamed_on_the_adapter(narrow, tmp_path):
    folder = adapter(narrow, tmp_path / "lora", method("lora", rank=2))
    base = load_base(str(narrow), dtype=torch.float32)

    class LackingMemory:
        """A number that no memory is left to multiply by."""

        def __mul__(self, other):
            raise torch.OutOfMemoryError("out of memory")

        __rmul__ = __mul__

    with pytest.raises(torch.OutOfMemoryError), adapted_weights(base, folder) as weights:
        _, layer = weights.modules[O_PROJ]
        layer.scaling["default"] = LackingMemory()
        list(weights)


def test_adapters_that_change_the_base_as_they_load_leave_it_to_the_next_as_it_was(narrow, tmp_path):
    """One base for all of a survey: each adapter's figures are those it has alone."""
    kinds = {"pissa": {"rank": 2}, "osf": {}, "full": {}, "lora": {"rank": 2}}
    folders = [adapter(narrow, tmp_path / name, method(name, **options)) for name, options in kinds.items()]
    plan, options = plan_of(narrow), SubspaceOptions(top=4)
    for folder, one in zip(folders, survey_subspace(plan, folders, options).adapters, strict=True):
        (alone,) = survey_subspace(plan, [folder], options).adapters
        assert [each.figures for each in one.modules] == [each.figures for each in alone.modules], folder.name


@pytest.mark.parametrize(
    ("name", "rank"), [("dora", 2), ("adalora", 2), ("hira", 2), ("vera", 8), ("osf", None), ("ia3", None)]
)
def test_other_methods_weights_act_as_their_adapters_do(narrow, tmp_path, name, rank):
    """The adapted weights, put into a plain model, give the logits of the adapter on its base."""
    folder = adapter(narrow, tmp_path / name, method(name, rank=rank))
    found = pairs(narrow, folder)
    plain, ids = load_base(str(narrow), dtype=torch.float32).model.double(), tiny_base.blocks(2)
    with torch.no_grad():
        expected = load_adapter(load_base(str(narrow), dtype=torch.float32), folder)(input_ids=ids).logits
        for module, pair in found.items():
            plain.get_submodule(module).weight.copy_(pair.adapted)
        torch.testing.assert_close(plain(input_ids=ids).logits.float(), expected, rtol=1e-3, atol=1e-3)


def test_conv1d_weights_are_turned_to_outputs_by_inputs(tmp_path):
    torch.manual_seed(0)
    settings = GPT2Config(vocab_size=300, n_embd=32, n_layer=1, n_head=4, n_positions=64, n_inner=20)
    GPT2LMHeadModel(settings).save_pretrained(tmp_path / "base")
    tiny_base.tokenizer().save_pretrained(tmp_path / "base")
    folder = adapter(tmp_path / "base", tmp_path / "gain", method("gain-ffn"))
    down = pairs(tmp_path / "base", folder)["transformer.h.0.mlp.c_proj"]
    assert down.pretrained.shape == (32, 20)
    v = load_file(folder / WEIGHTS)["base_model.model.transformer.h.0.mlp.c_proj.gain_v"]
    assert torch.equal(down.adapted, down.pretrained * (1 + v))
    lora = adapter(tmp_path / "base", tmp_path / "disel", method("disel", rank=2, targets=("mlp.c_proj",)))
    tensors = load_file(lora / WEIGHTS)
    a, b = (tensors[f"base_model.model.transformer.h.0.mlp.c_proj.lora_{part}.weight"].double() for part in "AB")
    held = pairs(tmp_path / "base", lora, gate=0.5)["transformer.h.0.mlp.c_proj"]
    torch.testing.assert_close(held.adapted, held.pretrained + 0.5 * 2 * b @ a)


def test_a_survey_measures_zero_for_gains_and_not_for_lora(narrow, tmp_path):
    kinds = (method("gain-ffn"), method("lora", rank=1))
    folders = [adapter(narrow, tmp_path / kind.name, kind) for kind in kinds]
    survey = survey_subspace(plan_of(narrow), folders, SubspaceOptions(top=4))
    gains, lora = survey.adapters
    assert gains.scales_inputs and not lora.scales_inputs and gains.with_outside == 4 and gains.outside < 1e-28
    assert lora.with_outside == 2 and 0.2 < lora.outside < 1
    energies = [each.figures.update_energy for each in lora.modules]
    shares = [each.figures.outside for each in lora.modules]
    assert lora.outside == pytest.approx(np.average(shares, weights=energies))
    assert gains.looked_at == 16 and lora.looked_at == 8
    assert lora.intruders(1.0) >= lora.intruders() >= lora.intruders(0.1)
    write_result("subspace", result(survey, Subject()), tmp_path / "out")
    names = {f"subspace.{kind}" for kind in ("csv", "md", "json", "png", "svg")}
    assert {file.name for file in (tmp_path / "out").iterdir()} == names
    saved = json.loads((tmp_path / "out" / "subspace.json").read_text())
    assert saved["adapters"][0]["zero_outside_by_construction"] is True
    assert saved["provenance"]["base_fingerprint"] and saved["provenance"]["environment"]["packages"]["torch"]
    table = pd.read_csv(tmp_path / "out" / "subspace.csv")
    assert len(table) == 6 and table["has_outside"].all() and "by construction" in markdown(survey)


def test_intruders_are_counted_by_module_at_their_own_and_at_equal_size(narrow, tmp_path):
    kinds = (method("gain-ffn"), method("lora", rank=1))
    folders = [adapter(narrow, tmp_path / kind.name, kind) for kind in kinds]
    options, subject = SubspaceOptions(top=4, epsilon=0.9), Subject(names=("gains", "lora"))
    own = survey_subspace(plan_of(narrow), folders, options)
    both = survey_subspace(plan_of(narrow), folders, options.model_copy(update={"relative_update": 0.1}))
    plain, more = result(own, subject), result(both, subject)
    for label, folder in zip(subject.names, folders, strict=True):
        counts, scaled = [], []
        for pair in pairs(narrow, folder).values():
            before, after = pair.pretrained.numpy(), pair.adapted.numpy()
            factor = 0.1 * np.linalg.norm(before) / np.linalg.norm(after - before)
            counts.append(reference(before, after, 4, 0.9)[1])
            scaled.append(reference(before, before + factor * (after - before), 4, 0.9)[1])
        assert any(counts) and sum(counts) != sum(scaled)
        for prefix, each in ((label, counts), (f"{label}.scaled", scaled)):
            assert more.numbers[f"{prefix}.intruders"].value == sum(each)
            assert more.numbers[f"{prefix}.modules"].value == len(each)
            assert more.numbers[f"{prefix}.intruders_per_module"].value == pytest.approx(sum(each) / len(each))
            share = 100 * sum(count > 0 for count in each) / len(each)
            assert more.numbers[f"{prefix}.intruder_share"].value == pytest.approx(share)
        assert more.numbers[f"{label}.scaled.outside_leading"].value > 0
    assert {name: more.numbers[name] for name in plain.numbers} == plain.numbers
    assert not [name for name in plain.numbers if "scaled" in name]

    added = ["scaled_intruders", "scaled_smallest_similarity"]
    tables = plain.tables["subspace"], more.tables["subspace"]
    assert [*tables[1].columns] == [*tables[0].columns, *added] and tables[1].drop(columns=added).equals(tables[0])
    assert "scaled" not in plain.markdown and "relative_update" not in plain.record["settings"]
    assert "lora on prose, scaled | o_proj |" in more.markdown and "1.00e-01" in more.markdown
    assert both.adapters[1].scaled.relative_update == pytest.approx(0.1)
    record, before = json.loads(json.dumps(more.record)), json.loads(json.dumps(plain.record))
    for adapter_now, adapter_before in zip(record["adapters"], before["adapters"], strict=True):
        assert set(adapter_now.pop("scaled")) >= {"intruder_modules", "intruders_per_module", "outside_leading"}
        assert all(len(module.pop("scaled")["similarities"]) == 4 for module in adapter_now["modules"])
        assert adapter_now == adapter_before


def test_weights_without_an_outside_are_reported_as_such(tmp_path):
    square = tiny_base.folder(tmp_path / "base", dtype=torch.float32)
    survey = survey_subspace(plan_of(square), [adapter(square, tmp_path / "lora", method("lora", rank=1))])
    (lora,) = survey.adapters
    assert lora.with_outside == 0 and lora.outside is None
    assert all(each.figures.outside < 1e-25 for each in lora.modules)
    assert any("no update of any method can leave it" in remark for remark in remarks(survey))
    assert "no outside" in markdown(survey)
    write_result("subspace", result(survey, Subject()), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "subspace.json").read_text())["adapters"][0]["outside"] is None


def test_gates_must_be_held_at_a_value_that_is_given(narrow, tmp_path):
    folder = adapter(narrow, tmp_path / "disel", method("disel", rank=2, targets="output-projection"))
    plan = plan_of(narrow)
    refused(AdapterError, "open and shut token by token", survey_subspace, plan, [folder])
    refused(ConfigError, r"here: gate: .* greater than 0", SubspaceOptions.read, {"gate": 0}, "here")
    half, whole = (survey_subspace(plan, [folder], SubspaceOptions(gate=gate)) for gate in (0.5, 1.0))
    assert half.adapters[0].outside == pytest.approx(whole.adapters[0].outside)
    assert half.adapters[0].relative_update == pytest.approx(0.5 * whole.adapters[0].relative_update)
    assert "every gate held at 0.5" in markdown(half)
    lora = adapter(narrow, tmp_path / "lora", method("lora", rank=1))
    refused(ConfigError, "none of these adapters has gates", survey_subspace, plan, [lora], SubspaceOptions(gate=1))
    base = load_base(str(narrow), dtype=torch.float32)
    with pytest.raises(ConfigError, match="has no gates"), adapted_weights(base, lora, gate=1):
        pass
    beside = survey_subspace(plan, [folder, lora], SubspaceOptions(gate=0.5)).adapters
    assert [each.gate for each in beside] == [0.5, None]
    assert beside[0].outside == pytest.approx(half.adapters[0].outside)


def test_another_base_and_no_adapter_are_refused(narrow, tmp_path):
    folder = adapter(narrow, tmp_path / "gain", method("gain"))
    other = tiny_base.folder(tmp_path / "other", seed=1, dtype=torch.float32, **NARROW)
    refused(BaseMismatchError, "was trained on", survey_subspace, plan_of(other), [folder])
    assert survey_subspace(plan_of(other), [folder], allow_other_base=True)
    refused(ConfigError, "at least one", survey_subspace, plan_of(narrow), [])
