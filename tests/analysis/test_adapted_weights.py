"""Adapted weights equal their formulas and act as their adapters do; surveys over whole models, and refusals."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from gaintune.adapters import AdapterRecord, load_adapter, save_adapter
from gaintune.analysis import Subject, SubspaceOptions, survey_subspace, write_result
from gaintune.analysis.subspace.report import markdown, remarks, result
from gaintune.analysis.subspace.survey import adapted_weights
from gaintune.config import MethodConfig, ModelConfig, Plan
from gaintune.errors import AdapterError, BaseMismatchError, ConfigError
from gaintune.methods import attach
from gaintune.models import load_base
from support import tiny_base

NARROW = {"head_dim": 4, "intermediate_size": 24}  # o_proj and down_proj reach 16 and 24 of 32 outputs: an outside
O_PROJ = "model.layers.0.self_attn.o_proj"
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    """A base whose output projections do not reach every output."""
    return tiny_base.folder(tmp_path_factory.mktemp("narrow"), dtype=torch.float32, **NARROW)


def adapter(base_folder, out, method: MethodConfig, seed: int = 5):
    """An adapter with an effect, saved as training saves it; the tensors as they are on disk."""
    base = load_base(str(base_folder), dtype=torch.float32)
    model = attach(base.model, method, seed=0)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    record = AdapterRecord(str(base_folder), base.fingerprint, method.name, method.name, ("prose",))
    save_adapter(model, out, record)
    return out


def method(name: str, **options) -> MethodConfig:
    return MethodConfig(name=name, label=name, **options)


def pairs(base_folder, folder, **options):
    base = load_base(str(base_folder), dtype=torch.float32)
    with adapted_weights(base, folder, **options) as weights:
        return {pair.name: pair for pair in weights}


def test_weights_of_gains_and_lora_equal_their_formulas_in_float64(narrow, tmp_path):
    weight = load_base(str(narrow), dtype=torch.float32).model.state_dict()[f"{O_PROJ}.weight"].double()
    gains = adapter(narrow, tmp_path / "gain", method("gain-ffn"))
    v = load_file(gains / WEIGHTS)[f"base_model.model.{O_PROJ}.gain_v"]
    found = pairs(narrow, gains)
    assert len(found) == 4 and found[O_PROJ].adapted.dtype == torch.float64
    assert torch.equal(found[O_PROJ].pretrained, weight)
    assert torch.equal(found[O_PROJ].adapted, weight * (1 + v))  # the gain is rounded to fp32 as it is in the model
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


def test_what_full_weights_change_beside_linear_weights_is_said(narrow, tmp_path, caplog):
    pairs(narrow, adapter(narrow, tmp_path / "full", method("full")))
    (said,) = [record.message for record in caplog.records if "is left out" in record.message]
    assert "model.layers.0.input_layernorm.weight" in said and "q_proj" not in said
    base = load_base(str(narrow), dtype=torch.float32)
    attach(base.model, method("full"), seed=0)
    with torch.no_grad():
        base.model.get_submodule(O_PROJ).weight.mul_(2)
    save_adapter(base.model, tmp_path / "one", AdapterRecord(str(narrow), base.fingerprint, "full", "full", ("prose",)))
    caplog.clear()
    pairs(narrow, tmp_path / "one")
    assert not [record for record in caplog.records if "is left out" in record.message]


class LackingMemory:
    """A number that no memory is left to multiply by."""

    def __rmul__(self, other):
        raise torch.OutOfMemoryError("out of memory")

    __mul__ = __rmul__


def test_a_lack_of_memory_is_not_said_to_be_the_adapters_fault(narrow, tmp_path):
    folder = adapter(narrow, tmp_path / "lora", method("lora", rank=2))
    base = load_base(str(narrow), dtype=torch.float32)
    with pytest.raises(torch.OutOfMemoryError), adapted_weights(base, folder) as weights:
        _, layer = weights.modules[O_PROJ]
        layer.scaling["default"] = LackingMemory()
        list(weights)


def test_adapters_that_change_the_base_as_they_load_leave_it_to_the_next_as_it_was(narrow, tmp_path):
    """One base for all of a survey: each adapter's figures are those it has alone."""
    kinds = {"pissa": {"rank": 2}, "osf": {}, "full": {}, "lora": {"rank": 2}}
    folders = [adapter(narrow, tmp_path / name, method(name, **options)) for name, options in kinds.items()]
    plan, options = Plan(model=ModelConfig(name=str(narrow), device="cpu")), SubspaceOptions(top=4)
    together = survey_subspace(plan, folders, options).adapters
    for folder, one in zip(folders, together, strict=True):
        (alone,) = survey_subspace(plan, [folder], options).adapters
        assert [each.figures for each in one.modules] == [each.figures for each in alone.modules], folder.name


OTHERS = {
    "dora": {"rank": 2},
    "adalora": {"rank": 2},
    "hira": {"rank": 2},
    "vera": {"rank": 8},
    "osf": {},
    "ia3": {},
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_methods_weights_act_as_their_adapters_do(narrow, tmp_path, name):
    """The adapted weights, put into a plain model, give the logits of the adapter on its base."""
    folder = adapter(narrow, tmp_path / name, method(name, **OTHERS[name]))
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
    found = pairs(tmp_path / "base", folder)
    down = found["transformer.h.0.mlp.c_proj"]
    assert down.pretrained.shape == (32, 20)
    v = load_file(folder / WEIGHTS)["base_model.model.transformer.h.0.mlp.c_proj.gain_v"]
    assert torch.equal(down.adapted, down.pretrained * (1 + v))
    lora = adapter(tmp_path / "base", tmp_path / "disel", method("disel", rank=2, targets=("mlp.c_proj",)))
    tensors = load_file(lora / WEIGHTS)
    a, b = (tensors[f"base_model.model.transformer.h.0.mlp.c_proj.lora_{part}.weight"].double() for part in "AB")
    held = pairs(tmp_path / "base", lora, gate=0.5)["transformer.h.0.mlp.c_proj"]
    torch.testing.assert_close(held.adapted, held.pretrained + 0.5 * 2 * b @ a)


def test_a_survey_measures_zero_for_gains_and_not_for_lora(narrow, tmp_path):
    folders = [
        adapter(narrow, tmp_path / "gain", method("gain-ffn")),
        adapter(narrow, tmp_path / "lora", method("lora", rank=1)),
    ]
    survey = survey_subspace(Plan(model=ModelConfig(name=str(narrow), device="cpu")), folders, SubspaceOptions(top=4))
    gains, lora = survey.adapters
    assert gains.scales_inputs and not lora.scales_inputs
    assert gains.with_outside == 4 and gains.outside < 1e-28
    assert lora.with_outside == 2 and 0.2 < lora.outside < 1
    energies = [each.figures.update_energy for each in lora.modules]
    shares = [each.figures.outside for each in lora.modules]
    assert lora.outside == pytest.approx(np.average(shares, weights=energies))
    assert gains.looked_at == 16 and lora.looked_at == 8
    assert lora.intruders(1.0) >= lora.intruders() >= lora.intruders(0.1)
    write_result("subspace", result(survey, Subject()), tmp_path / "out")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        f"subspace.{kind}" for kind in ("csv", "md", "json", "png", "svg")
    }
    told = json.loads((tmp_path / "out" / "subspace.json").read_text())
    assert told["adapters"][0]["zero_outside_by_construction"] is True
    assert told["provenance"]["base_fingerprint"] and told["provenance"]["environment"]["packages"]["torch"]
    table = pd.read_csv(tmp_path / "out" / "subspace.csv")
    assert len(table) == 6 and table["has_outside"].all()
    assert "by construction" in markdown(survey)


def test_weights_without_an_outside_are_said_to_have_none(tmp_path):
    square = tiny_base.folder(tmp_path / "base", dtype=torch.float32)
    folder = adapter(square, tmp_path / "lora", method("lora", rank=1))
    survey = survey_subspace(Plan(model=ModelConfig(name=str(square), device="cpu")), [folder])
    (lora,) = survey.adapters
    assert lora.with_outside == 0 and lora.outside is None
    assert all(each.figures.outside < 1e-25 for each in lora.modules)
    assert any("no update of any method can leave it" in remark for remark in remarks(survey))
    assert "no outside" in markdown(survey)
    write_result("subspace", result(survey, Subject()), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "subspace.json").read_text())["adapters"][0]["outside"] is None


def test_gates_must_be_held_at_a_value_that_is_said(narrow, tmp_path):
    folder = adapter(narrow, tmp_path / "disel", method("disel", rank=2, targets="output-projection"))
    plan = Plan(model=ModelConfig(name=str(narrow), device="cpu"))
    with pytest.raises(AdapterError, match="open and shut token by token"):
        survey_subspace(plan, [folder])
    with pytest.raises(ConfigError, match=r"here: gate: .* greater than 0"):
        SubspaceOptions.read({"gate": 0}, "here")
    half, whole = (survey_subspace(plan, [folder], SubspaceOptions(gate=gate)) for gate in (0.5, 1.0))
    assert half.adapters[0].outside == pytest.approx(whole.adapters[0].outside)
    assert half.adapters[0].relative_update == pytest.approx(0.5 * whole.adapters[0].relative_update)
    assert "every gate held at 0.5" in markdown(half)
    lora = adapter(narrow, tmp_path / "lora", method("lora", rank=1))
    with pytest.raises(ConfigError, match="none of these adapters has gates"):
        survey_subspace(plan, [lora], SubspaceOptions(gate=1))
    base = load_base(str(narrow), dtype=torch.float32)
    with pytest.raises(ConfigError, match="has no gates"), adapted_weights(base, lora, gate=1):
        pass
    beside = survey_subspace(plan, [folder, lora], SubspaceOptions(gate=0.5)).adapters
    assert [each.gate for each in beside] == [0.5, None]
    assert beside[0].outside == pytest.approx(half.adapters[0].outside)


def test_another_base_and_no_adapter_are_refused(narrow, tmp_path):
    folder = adapter(narrow, tmp_path / "gain", method("gain"))
    other = tiny_base.folder(tmp_path / "other", seed=1, dtype=torch.float32, **NARROW)
    with pytest.raises(BaseMismatchError):
        survey_subspace(Plan(model=ModelConfig(name=str(other), device="cpu")), [folder])
    assert survey_subspace(Plan(model=ModelConfig(name=str(other), device="cpu")), [folder], allow_other_base=True)
    with pytest.raises(ConfigError, match="at least one"):
        survey_subspace(Plan(model=ModelConfig(name=str(narrow))), [])
