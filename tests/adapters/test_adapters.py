"""Adapters on disk: what is saved comes back exactly, on its own base, or not at all."""

import json
import shutil
import warnings
from dataclasses import replace

import peft
import pytest
import torch
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gaintune.adapters import load_adapter, read_record, save_adapter
from gaintune.errors import AdapterError, BaseMismatchError
from gaintune.models import load_base
from support import tiny_base
from support.files import contents, cut_short, edit_json
from support.tiny_adapters import CONFIGS, adapted, base_of, logits, moved, record_of, saved


def config_in(folder):
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("method", [*CONFIGS, "full"])
def test_an_adapter_comes_back_exactly(tiny, tmp_path, method, trainable):
    expected, base = saved(tiny, tmp_path / "adapter", method), base_of(tiny)
    assert not torch.equal(logits(base.model), expected)
    model = load_adapter(base, tmp_path / "adapter", trainable=trainable)
    assert torch.equal(logits(model), expected)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert bool(trained) == trainable
    if trainable and method != "full":
        assert not any("embed" in name or "q_proj" in name for name in trained)
    if method == "full":
        assert model is base.model and model.dtype == torch.bfloat16


def test_an_adapter_that_is_loaded_and_saved_again_is_the_same_files(tiny, tmp_path):
    saved(tiny, tmp_path / "first", "gain-ffn")
    base = base_of(tiny)
    again = load_adapter(base, tmp_path / "first", trainable=True)
    save_adapter(again, tmp_path / "second", record_of(base, "gain-ffn"))
    assert contents(tmp_path / "first") == contents(tmp_path / "second")


@pytest.mark.parametrize("name", ["demo", "demo-gemma"])
def test_an_adapter_of_an_embedded_base_names_no_repository_and_knows_its_base(tiny, tmp_path, name):
    base = replace(base_of(tiny), name=name)
    model = adapted(base, "lora")
    expected = logits(model)
    save_adapter(model, tmp_path / "adapter", record_of(base, "lora"))
    card = ModelCard.load(tmp_path / "adapter" / "README.md")
    assert card.data.base_model is None and not [tag for tag in card.data.tags or () if name in tag]
    again = replace(base_of(tiny), name=name)
    assert torch.equal(logits(load_adapter(again, tmp_path / "adapter")), expected)
    other = replace(base_of(tiny), name=name, fingerprint="0" * 64)
    with pytest.raises(BaseMismatchError):
        load_adapter(other, tmp_path / "adapter")


def test_full_weights_in_fp32_load_into_the_bases_own_dtype_and_adapters_into_any(tiny, tmp_path):
    saved(tiny, tmp_path / "adapter")
    load_adapter(base_of(tiny, "fp32"), tmp_path / "adapter")
    base = base_of(tiny, "fp32")
    save_adapter(moved(base.model), tmp_path / "full", record_of(base, "full"))
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
    config = config_in(tmp_path / "adapter")
    assert (config["base_model_name_or_path"], config["revision"]) == (str(tiny), "v1")


@pytest.mark.parametrize("method", [*CONFIGS, "full"])
def test_plain_peft_and_transformers_load_what_we_save(tiny, tmp_path, method):
    expected = saved(tiny, tmp_path / "adapter", method)
    if method == "full":
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.bfloat16)
        assert torch.equal(logits(plain), expected)
        return
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
    base = load_base(str(tmp_path / "tiny.gguf"))
    model = adapted(base, "gain-ffn")
    save_adapter(model, tmp_path / "adapter", record_of(base, "gain-ffn"))
    again = load_base(config_in(tmp_path / "adapter")["base_model_name_or_path"])
    assert torch.equal(logits(PeftModel.from_pretrained(again.model, tmp_path / "adapter")), logits(model))
    files = AutoModelForCausalLM.from_pretrained(again.folder, dtype=base.model.dtype)
    assert torch.equal(logits(PeftModel.from_pretrained(files, tmp_path / "adapter")), logits(model))


def test_an_adapter_of_another_name_is_saved_flat_and_its_target_modules_in_the_same_order(tiny, tmp_path):
    """PEFT keeps them in a set, whose order changes with the process."""
    base, names = base_of(tiny), ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = moved(get_peft_model(base.model, LoraConfig(r=1, target_modules=names), adapter_name="contracts"))
    save_adapter(model, tmp_path / "adapter", record_of(base, "lora"))
    assert torch.equal(logits(load_adapter(base_of(tiny), tmp_path / "adapter")), logits(model))
    assert config_in(tmp_path / "adapter")["target_modules"] == sorted(names)


def test_another_base_is_refused_unless_it_is_allowed(tiny, tmp_path, caplog):
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


def test_a_foreign_adapter_loads_with_a_warning(tiny, tmp_path, caplog):
    model = adapted(base_of(tiny), "lora")
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
    cut_short(weights)
    message = refused(tiny, tmp_path / "adapter")
    assert message.count("cut short") == 1 and message.count(weights.name) == 1


def test_an_adapter_without_its_manifest_was_never_finished(tiny, tmp_path):
    saved(tiny, tmp_path / "adapter")
    (tmp_path / "adapter" / "manifest.json").unlink()
    assert "never finished" in refused(tiny, tmp_path / "adapter")


@pytest.mark.parametrize("method", CONFIGS)
def test_the_card_of_peft_stays_and_names_no_path(tiny, tmp_path, method):
    for folder, base in (("first", tiny), ("second", shutil.copytree(tiny, tmp_path / "elsewhere"))):
        saved(base, tmp_path / folder, method)
    text = (tmp_path / "first" / "README.md").read_text()
    assert ModelCard(text).data.library_name == "peft" and f"- PEFT {peft.__version__}" in text
    assert str(tiny) not in text and "base_model" not in text
    assert text == (tmp_path / "second" / "README.md").read_text()


def test_the_card_names_a_base_of_the_hub(tiny, tmp_path):
    base = base_of(tiny)
    model = get_peft_model(base.model, CONFIGS["lora"](), adapter_name="contracts")
    save_adapter(model, tmp_path / "adapter", record_of(base, "lora", base_name="org/model"))
    card = ModelCard.load(tmp_path / "adapter" / "README.md").data
    assert card.base_model == "org/model"
    assert card.tags == ["base_model:adapter:org/model", "lora", "transformers"]


def test_a_card_that_was_rewritten_or_is_missing_is_no_damage(tiny, tmp_path):
    expected = saved(tiny, tmp_path / "adapter")
    (tmp_path / "adapter" / "README.md").write_text("what this adapter is for")
    assert torch.equal(logits(load_adapter(base_of(tiny), tmp_path / "adapter")), expected)
    (tmp_path / "adapter" / "README.md").unlink()
    assert torch.equal(logits(load_adapter(base_of(tiny), tmp_path / "adapter")), expected)


KEY = "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def tensors(change):
    def rewrite(folder):
        values = load_file(folder / WEIGHTS)
        change(values)
        save_file(values, folder / WEIGHTS)

    return rewrite


def pickle(folder):
    (folder / WEIGHTS).unlink()
    torch.save({}, folder / "adapter_model.bin")


DAMAGE = {  # where PEFT only warns, or says nothing
    "cut short": (lambda at: cut_short(at / WEIGHTS), ["cut short"]),
    "a tensor under another name": (
        tensors(lambda values: values.update({"base_model.model.typo.lora_A.weight": values.pop(KEY)})),
        [f"1 missing (first: {KEY})", "1 unexpected (first: base_model.model.typo"],
    ),
    "another shape": (tensors(lambda values: values.update({KEY: torch.zeros(2, 5)})), ["PEFT cannot load it"]),
    "not finite": (tensors(lambda values: values[KEY].view(-1)[3].fill_(float("nan"))), ["not finite"]),
    "an unknown kind": (
        lambda at: edit_json(at / CONFIG, peft_type="TELEPATHY"),
        ["unknown peft_type 'TELEPATHY'", "LORA", "GAIN"],
    ),
    "no weights": (lambda at: (at / WEIGHTS).unlink(), [f"{WEIGHTS} is missing"]),
    "pickled": (pickle, ["pickled"]),
    "broken settings": (lambda at: (at / CONFIG).write_text("{"), ["not valid JSON"]),
    "a broken record": (lambda at: (at / "gaintune.json").write_text('{"method": 1}'), ["damaged record"]),
    "no adapter": (lambda at: (at / CONFIG).unlink(), ["not an adapter"]),
    "nothing": (shutil.rmtree, ["no such adapter folder"]),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.filterwarnings("ignore:Found missing adapter keys")  # all that PEFT does
def test_a_damaged_adapter_as_peft_writes_it_is_refused(tiny, tmp_path, damage):
    adapted(base_of(tiny), "lora").save_pretrained(tmp_path / "foreign")
    harm, parts = DAMAGE[damage]
    harm(tmp_path / "foreign")
    message = refused(tiny, tmp_path / "foreign")
    assert all(part in message for part in parts), message


def test_full_weights_of_another_architecture_are_refused(tiny, tmp_path):
    wide = base_of(tiny_base.folder(tmp_path / "wide", intermediate_size=64))
    save_adapter(wide.model, tmp_path / "full", record_of(base_of(tiny), "full"))
    assert "do not fit" in refused(tiny, tmp_path / "full")
