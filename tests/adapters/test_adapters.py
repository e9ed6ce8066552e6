"""Adapters on disk: what is saved comes back exactly, on its own base, or not at all."""

import json
import shutil
import warnings
from dataclasses import replace

import peft
import pytest
import torch
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM, IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gaintune.adapters import AdapterRecord, load_adapter, read_record, save_adapter
from gaintune.config import ModelConfig
from gaintune.errors import AdapterError, BaseMismatchError
from gaintune.models import load_base
from gaintune.tuners.gain import GainConfig
from support import tiny_base

TARGETS = ["o_proj", "down_proj"]
CONFIGS = {
    "gain-ffn": lambda: GainConfig(ffn=True, task_type="CAUSAL_LM"),
    "ia3": lambda: IA3Config(target_modules=TARGETS, feedforward_modules=TARGETS, task_type="CAUSAL_LM"),
    "lora": lambda: LoraConfig(r=2, target_modules=TARGETS, task_type="CAUSAL_LM"),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_base.folder(tmp_path_factory.mktemp("base") / "tiny")


def base_of(folder, dtype="bf16"):
    return load_base(ModelConfig(name=str(folder), device="cpu", dtype=dtype))


def record_of(base, method, **changes):
    return AdapterRecord(base.name, base.fingerprint, method, method, ("medical", "law"), **changes)


def shaken(model, scale=0.05):
    """Move every trainable weight, as training would."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype), alpha=scale)
    return model.eval()


def logits(model):
    with torch.inference_mode():
        return model(tiny_base.blocks()).logits


def saved(tiny, folder, method="lora", **changes):
    """An adapter of the tiny base on disk, and what the adapted model computes."""
    base = base_of(tiny)
    torch.manual_seed(0)
    model = base.model if method == "full" else get_peft_model(base.model, CONFIGS[method]())
    shaken(model)
    save_adapter(model, folder, record_of(base, method, **changes))
    return logits(model)


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("method", [*CONFIGS, "full"])
def test_an_adapter_comes_back_exactly(tiny, tmp_path, method, trainable):
    expected = saved(tiny, tmp_path / "adapter", method)
    base = base_of(tiny)
    assert not torch.equal(logits(base.model), expected)
    model = load_adapter(base, tmp_path / "adapter", trainable=trainable)
    assert torch.equal(logits(model), expected)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert bool(trained) == trainable
    if trainable and method != "full":
        assert not any("embed" in name or "q_proj" in name for name in trained)
    if method == "full":
        assert model is base.model and model.dtype == torch.bfloat16


def test_an_adapter_saved_after_being_carried_on_is_the_same_file(tiny, tmp_path):
    saved(tiny, tmp_path / "first", "gain-ffn")
    base = base_of(tiny)
    save_adapter(
        load_adapter(base, tmp_path / "first", trainable=True), tmp_path / "second", record_of(base, "gain-ffn")
    )
    for file in sorted((tmp_path / "first").iterdir()):
        assert file.read_bytes() == (tmp_path / "second" / file.name).read_bytes(), file.name


def test_full_weights_in_fp32_load_into_the_bases_own_dtype(tiny, tmp_path):
    base = base_of(tiny, "fp32")
    shaken(base.model)
    save_adapter(base.model, tmp_path / "full", record_of(base, "full"))
    half = base_of(tiny)
    load_adapter(half, tmp_path / "full")
    for exact, rounded in zip(base.model.parameters(), half.model.parameters(), strict=True):
        assert torch.equal(exact.to(torch.bfloat16), rounded)


def test_the_record_says_where_it_comes_from(tiny, tmp_path):
    saved(tiny, tmp_path / "adapter", settings={"lr": 0.01}, versions={"peft": "1"}, base_revision="v1")
    record = read_record(tmp_path / "adapter")
    assert record is not None
    assert (record.base_name, record.method, record.domains) == (str(tiny), "lora", ("medical", "law"))
    assert (record.settings, record.versions, record.base_revision) == ({"lr": 0.01}, {"peft": "1"}, "v1")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (str(tiny), "v1")


@pytest.mark.parametrize("method", CONFIGS)
def test_plain_peft_loads_what_we_save(tiny, tmp_path, method):
    expected = saved(tiny, tmp_path / "adapter", method)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        plain = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16)
        assert torch.equal(logits(PeftModel.from_pretrained(plain, tmp_path / "adapter")), expected)
        auto = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.bfloat16)
    assert torch.equal(logits(auto), expected)


def test_plain_peft_gets_a_base_that_only_we_know_by_name(tmp_path, monkeypatch):
    """Of a .gguf file, as of 'demo', PEFT would ask the hub."""
    monkeypatch.setenv("GAINTUNE_CACHE", str(tmp_path / "cache"))
    tiny_base.gguf(tmp_path / "tiny.gguf")
    name = str(tmp_path / "tiny.gguf")
    base = load_base(name)
    model = shaken(get_peft_model(base.model, CONFIGS["gain-ffn"]()))
    save_adapter(model, tmp_path / "adapter", record_of(base, "gain-ffn"))
    again = load_base(json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"])
    assert torch.equal(logits(PeftModel.from_pretrained(again.model, tmp_path / "adapter")), logits(model))
    files = AutoModelForCausalLM.from_pretrained(again.folder, dtype=base.model.dtype)
    assert torch.equal(logits(PeftModel.from_pretrained(files, tmp_path / "adapter")), logits(model))


def test_plain_transformers_loads_a_full_adapter(tiny, tmp_path):
    expected = saved(tiny, tmp_path / "adapter", "full")
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.bfloat16)), expected
    )


def test_target_modules_are_written_in_the_same_order_by_every_process(tiny, tmp_path):
    """PEFT keeps them in a set, whose order changes with the process."""
    base, names = base_of(tiny), ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(base.model, LoraConfig(r=1, target_modules=names))
    save_adapter(model, tmp_path / "adapter", record_of(base, "lora"))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(names)


def test_an_adapter_under_another_name_is_saved_flat(tiny, tmp_path):
    base = base_of(tiny)
    model = shaken(get_peft_model(base.model, CONFIGS["lora"](), adapter_name="contracts"))
    save_adapter(model, tmp_path / "adapter", record_of(base, "lora"))
    assert torch.equal(logits(load_adapter(base_of(tiny), tmp_path / "adapter")), logits(model))


def test_another_base_is_refused_unless_asked_for(tiny, tmp_path, caplog):
    saved(tiny, tmp_path / "adapter")
    other = base_of(tiny_base.folder(tmp_path / "other", seed=5))
    untouched = logits(other.model)
    with pytest.raises(BaseMismatchError) as caught:
        load_adapter(other, tmp_path / "adapter")
    for part in (str(tiny), str(tmp_path / "other"), "--allow-other-base", other.fingerprint[:12]):
        assert part in str(caught.value)
    assert torch.equal(logits(other.model), untouched)
    assert not torch.equal(logits(load_adapter(other, tmp_path / "adapter", allow_other_base=True)), untouched)
    assert "loading it anyway" in caplog.text


def test_the_same_base_in_other_numbers_is_the_same_base(tiny, tmp_path):
    saved(tiny, tmp_path / "adapter")
    load_adapter(base_of(tiny, "fp32"), tmp_path / "adapter")


def test_a_foreign_adapter_loads_with_a_warning(tiny, tmp_path, caplog):
    model = shaken(get_peft_model(base_of(tiny).model, CONFIGS["lora"]()))
    model.save_pretrained(tmp_path / "foreign")
    assert read_record(tmp_path / "foreign") is None
    assert torch.equal(logits(load_adapter(base_of(tiny), tmp_path / "foreign")), logits(model))
    assert "cannot be checked" in caplog.text


def refused(tiny, folder) -> str:
    base = base_of(tiny)
    untouched = logits(base.model)
    with pytest.raises(AdapterError) as caught:
        load_adapter(base, folder)
    assert torch.equal(logits(base.model), untouched), "the base is as it was"
    return str(caught.value)


@pytest.mark.parametrize("method", ["gain-ffn", "full"])
def test_a_file_cut_short_is_refused(tiny, tmp_path, method):
    saved(tiny, tmp_path / "adapter", method)
    weights = next((tmp_path / "adapter").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-8])
    message = refused(tiny, tmp_path / "adapter")
    assert message.count("cut short") == 1 and message.count(weights.name) == 1


def test_an_adapter_without_its_manifest_was_never_finished(tiny, tmp_path):
    saved(tiny, tmp_path / "adapter")
    (tmp_path / "adapter" / "manifest.json").unlink()
    assert "never finished" in refused(tiny, tmp_path / "adapter")


@pytest.mark.parametrize("method", CONFIGS)
def test_the_card_of_peft_stays_and_names_no_path(tiny, tmp_path, method):
    copy = shutil.copytree(tiny, tmp_path / "elsewhere")
    for folder, base in (("first", tiny), ("second", copy)):
        saved(base, tmp_path / folder, method)
    text = (tmp_path / "first" / "README.md").read_text()
    assert ModelCard(text).data.library_name == "peft" and f"- PEFT {peft.__version__}" in text
    assert str(tiny) not in text and "base_model" not in text
    assert text == (tmp_path / "second" / "README.md").read_text()


def test_the_card_names_a_base_of_the_hub(tiny, tmp_path):
    base = base_of(tiny)
    model = get_peft_model(base.model, CONFIGS["lora"](), adapter_name="contracts")
    save_adapter(model, tmp_path / "adapter", replace(record_of(base, "lora"), base_name="org/model"))
    card = ModelCard.load(tmp_path / "adapter" / "README.md").data
    assert card.base_model == "org/model"
    assert card.tags == ["base_model:adapter:org/model", "lora", "transformers"]


def test_a_card_that_was_rewritten_or_is_not_there_is_no_damage(tiny, tmp_path):
    expected = saved(tiny, tmp_path / "adapter")
    (tmp_path / "adapter" / "README.md").write_text("what this adapter is for")
    assert torch.equal(logits(load_adapter(base_of(tiny), tmp_path / "adapter")), expected)
    (tmp_path / "adapter" / "README.md").unlink()
    assert torch.equal(logits(load_adapter(base_of(tiny), tmp_path / "adapter")), expected)


@pytest.fixture
def foreign(tiny, tmp_path):
    """An adapter as PEFT writes it, to be damaged: nothing but its own files can tell."""
    shaken(get_peft_model(base_of(tiny).model, CONFIGS["lora"]())).save_pretrained(tmp_path / "foreign")
    return tmp_path / "foreign"


def rewrite(folder, change):
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def test_a_foreign_file_cut_short_is_refused(tiny, foreign):
    weights = foreign / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    assert "cut short" in refused(tiny, foreign)


def test_missing_and_unexpected_tensors_are_refused(tiny, foreign):
    """Where PEFT only warns, or says nothing."""
    key = "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"
    rewrite(foreign, lambda tensors: tensors.update({"base_model.model.typo.lora_A.weight": tensors.pop(key)}))
    message = refused(tiny, foreign)
    assert f"1 missing (first: {key})" in message and "1 unexpected (first: base_model.model.typo" in message


def test_tensors_of_another_shape_are_refused(tiny, foreign):
    key = "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"
    rewrite(foreign, lambda tensors: tensors.update({key: torch.zeros(2, 5)}))
    assert "PEFT cannot load it" in refused(tiny, foreign)


def test_values_that_are_not_finite_are_refused(tiny, foreign):
    key = "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"
    rewrite(foreign, lambda tensors: tensors[key].view(-1)[3].fill_(float("nan")))
    assert "not finite" in refused(tiny, foreign)


def test_an_unknown_kind_of_adapter_is_refused(tiny, foreign):
    config = json.loads((foreign / "adapter_config.json").read_text())
    (foreign / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "TELEPATHY"}))
    message = refused(tiny, foreign)
    assert "unknown peft_type 'TELEPATHY'" in message and "LORA" in message and "GAIN" in message


def test_pickled_adapters_are_refused(tiny, foreign):
    (foreign / "adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors is missing" in refused(tiny, foreign)
    torch.save({}, foreign / "adapter_model.bin")
    assert "pickled" in refused(tiny, foreign)


def test_folders_that_are_no_adapter_are_refused(tiny, foreign, tmp_path):
    assert "no such adapter folder" in refused(tiny, tmp_path / "nowhere")
    assert "not an adapter" in refused(tiny, tiny)
    (foreign / "adapter_config.json").write_text("{")
    assert "not valid JSON" in refused(tiny, foreign)
    (foreign / "gaintune.json").write_text('{"method": 1}')
    assert "damaged record" in refused(tiny, foreign)


def test_full_weights_of_another_architecture_are_refused(tiny, tmp_path):
    wide = base_of(tiny_base.folder(tmp_path / "wide", intermediate_size=64))
    save_adapter(wide.model, tmp_path / "full", record_of(base_of(tiny), "full"))
    assert "do not fit" in refused(tiny, tmp_path / "full")
