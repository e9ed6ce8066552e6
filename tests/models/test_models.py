"""Loading a base: from where, in which numbers, and what a person reads when it cannot be done."""

import builtins
import json
import logging
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers as hf
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, dequantize
from safetensors import safe_open

from gaintune.config import ModelConfig
from gaintune.errors import BaseModelError, ConfigError
from gaintune.models import base as models
from gaintune.models import base_fingerprint, load_base, load_classifier, load_tokenizer, resolve_device, resolve_dtype
from gaintune.models import gguf as gguf_base
from gaintune.storage import assets
from support import tiny_base, tiny_encoders
from support.files import contents, cut_short, edit_json


def at(folder, **settings) -> ModelConfig:
    return ModelConfig(name=str(folder), device="cpu", **settings)


@pytest.fixture
def changed(tiny, tmp_path):
    """A copy of the tiny model, to be changed."""
    return Path(shutil.copytree(tiny, tmp_path / "tiny"))


@pytest.fixture
def sharded(tmp_path):
    """The tiny model in several files."""
    tiny_base.model().to(torch.bfloat16).save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    tiny_base.tokenizer().save_pretrained(tmp_path / "sharded")
    return tmp_path / "sharded"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Where conversions of .gguf files go."""
    monkeypatch.setenv("GAINTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def packed(tmp_path, cache):
    """A tiny model as llama.cpp writes it."""
    tiny_base.gguf(tmp_path / "tiny.gguf")
    return at(tmp_path / "tiny.gguf")


@pytest.mark.parametrize(
    ("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_a_folder_loads_with_the_weights_it_holds_in_the_chosen_dtype(tiny, name, dtype):
    base = load_base(at(tiny, dtype=name))
    with safe_open(tiny / "model.safetensors", framework="pt") as stored:
        saved = stored.get_tensor("model.layers.1.mlp.down_proj.weight")
    loaded = base.model.get_submodule("model.layers.1.mlp.down_proj").weight
    assert loaded.dtype == dtype and torch.equal(loaded, saved.to(dtype)) and not base.model.training
    assert base.name == base.model.name_or_path == str(tiny) and base.folder == tiny
    assert base.tokenizer.decode(base.tokenizer("a b").input_ids) == "a b"
    assert base.fingerprint == base_fingerprint(at(tiny))
    assert load_base(at(tiny, dtype=name), dtype=torch.float32).model.dtype == torch.float32


def test_auto_dtype_is_bf16_only_where_the_processor_has_it(monkeypatch):
    for flags, expected in [
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True, "avx512_bf16": False}, torch.bfloat16),
        ({"avx512_bf16": False, "avx512_f": True}, torch.float32),
    ]:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda flags=flags: flags, raising=False)
        assert resolve_dtype("auto", torch.device("cpu")) == expected
    assert resolve_dtype("fp16", torch.device("cpu")) == torch.float16
    monkeypatch.undo()
    with_torch = models.cpu_has_fast_bf16()
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)  # an older torch: the kernel says it
    assert models.cpu_has_fast_bf16() == with_torch


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "cpu:x"])
def test_a_device_that_is_not_there_is_named(name):
    with pytest.raises(ConfigError, match=f"model.device.*{name}"):
        resolve_device(name)


def test_a_sharded_folder_loads_like_a_single_file(tiny, sharded):
    assert len(list(sharded.glob("*.safetensors"))) > 1
    whole, again = load_base(at(tiny)), load_base(at(sharded))
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True))


def refused(config, error=BaseModelError) -> str:
    with pytest.raises(error) as caught:
        load_base(config)
    return str(caught.value)


def test_paths_that_are_no_model_are_explained(changed, tmp_path):
    assert "neither a folder or file here nor a hub id" in refused(at(tmp_path / "nowhere"))
    assert "hf_secret" not in refused(ModelConfig(name="https://someone:hf_secret@example.org/model"))
    assert "no such .gguf file" in refused(at(tmp_path / "lost.gguf"))
    assert "has no config.json" in refused(at(tmp_path))
    assert "a file that is not .gguf" in refused(at(changed / "config.json"))
    for folder in (tmp_path, changed):  # beside a whole model it would be put onto another base than the folder's
        (folder / "adapter_config.json").write_text("{}")
        assert "holds an adapter: give its base here" in refused(at(folder))
        (folder / "adapter_config.json").unlink()


def only_pickled(folder):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def leave_out_weights(folder):
    state = tiny_base.model().state_dict()
    state.pop("model.layers.0.mlp.up_proj.weight")
    tiny_base.model().save_pretrained(folder, state_dict=state)


def leave_out_tokenizer(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()


HARM = {
    "no weights": (lambda at: (at / "model.safetensors").unlink(), ["no model.safetensors"]),
    "pickled weights": (only_pickled, ["pickled weights only (pytorch_model.bin)"]),
    "weights cut short": (lambda at: cut_short(at / "model.safetensors", 100), ["cannot be loaded"]),
    "weights that would be made up": (leave_out_weights, ["missing", "up_proj"]),
    "no tokenizer": (leave_out_tokenizer, ["no tokenizer in"]),
    "an unknown type": (lambda at: edit_json(at / "config.json", model_type="new"), ["config.json cannot be read"]),
    "broken settings": (lambda at: (at / "config.json").write_text("{"), ["config.json cannot be read"]),
}


@pytest.mark.parametrize("harm", HARM)
def test_a_folder_that_is_no_whole_model_is_refused(changed, harm):
    change, parts = HARM[harm]
    change(changed)
    message = refused(at(changed))
    assert all(part in message for part in parts), message
    if harm == "no tokenizer":
        with pytest.raises(BaseModelError, match="no tokenizer in"):
            load_tokenizer(at(changed))
    if harm == "weights cut short":
        with pytest.raises(BaseModelError, match="cut short"):
            base_fingerprint(at(changed))


def test_a_missing_shard_is_named(sharded):
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert f"names {shard.name}, which is missing" in refused(at(sharded))


def test_a_tokenizer_beyond_the_embedding_is_mentioned(tmp_path, caplog):
    load_base(at(tiny_base.folder(tmp_path / "small", vocab_size=100)))
    assert "tokenizer has 257 tokens, its embedding only 100" in caplog.text


BERT = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
T5 = {"vocab_size": 300, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}


def test_encoders_and_encoder_decoders_are_refused(tmp_path):
    for model in (hf.BertForMaskedLM(hf.BertConfig(**BERT)), hf.T5ForConditionalGeneration(hf.T5Config(**T5))):
        name = type(model).__name__
        model.save_pretrained(tmp_path / name)
        tiny_base.tokenizer().save_pretrained(tmp_path / name)
        assert f"is a {name}; a causal language model" in refused(at(tmp_path / name))


def test_quantization_without_bitsandbytes_says_how_to_get_it(tiny, monkeypatch):
    find = models.importlib.util.find_spec
    without = lambda name, *rest: None if name == "bitsandbytes" else find(name, *rest)  # noqa: E731
    monkeypatch.setattr(models.importlib.util, "find_spec", without)
    assert "gaintune[quantization]" in refused(at(tiny, quantization="4bit"))


def test_quantization_is_passed_on_with_the_compute_dtype_and_never_done_twice(tiny, changed):
    pytest.importorskip("bitsandbytes")
    model = load_base(at(tiny, quantization="4bit", dtype="bf16")).model
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    assert type(layer).__name__ == "Linear4bit"
    assert (layer.compute_dtype, layer.weight.quant_type) == (torch.bfloat16, "nf4")
    edit_json(changed / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    assert "stored quantized already" in refused(at(changed, quantization="8bit"))


@pytest.mark.parametrize("length", [0, 150, 1000, 4000, -100])
def test_a_broken_gguf_file_or_one_cut_short_is_refused_and_leaves_nothing(packed, tmp_path, cache, length):
    whole = (tmp_path / "tiny.gguf").read_bytes()
    (tmp_path / "tiny.gguf").write_bytes(whole[:length] if length else b"GGUF" + bytes(60))
    assert "not a .gguf file transformers can read" in refused(packed)
    assert not [entry for entry in (cache / "models").iterdir() if entry.is_dir()]
    assert "name the file itself" in refused(at(tmp_path))
    assert gguf.GGUFReader is GGUFReader and gguf.dequantize is dequantize, "gguf is what it was"


@pytest.mark.parametrize(
    ("kind", "stored", "error"),
    [("F32", torch.float32, 0.0), ("F16", torch.float16, 1e-3), ("Q8_0", torch.bfloat16, 0.02)],
)
@pytest.mark.usefixtures("cache")
def test_a_gguf_file_is_converted_once_into_its_own_numbers(tmp_path, kind, stored, error):
    original = tiny_base.gguf(tmp_path / "tiny.gguf", GGMLQuantizationType[kind])
    base = load_base(at(tmp_path / "tiny.gguf", dtype="fp32"))
    with safe_open(base.folder / "model.safetensors", framework="pt") as file:
        assert file.get_tensor("model.embed_tokens.weight").dtype == stored
    for expected, loaded in zip(original.parameters(), base.model.parameters(), strict=True):
        torch.testing.assert_close(loaded, expected, rtol=error, atol=error * expected.abs().max().item())
    assert base.tokenizer.chat_template and base.name == str(tmp_path / "tiny.gguf")
    written = (base.folder / "model.safetensors").stat().st_mtime_ns
    assert base_fingerprint(at(tmp_path / "tiny.gguf")) == base.fingerprint
    assert (base.folder / "model.safetensors").stat().st_mtime_ns == written
    assert "quantization_config" not in json.loads((base.folder / "config.json").read_text())


def test_an_unfinished_conversion_is_done_again(packed):
    """As after a crash: the folder is there but its manifest is not."""
    base = load_base(packed)
    (base.folder / "manifest.json").unlink()
    (base.folder / "model.safetensors").write_bytes(b"half")
    assert load_base(packed).fingerprint == base.fingerprint


def flip(file, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("harm", ["weights", "config", "tokenizer", "manifest", "a file gone"])
def test_a_damaged_conversion_is_done_again_with_one_warning(packed, monkeypatch, caplog, harm):
    folder = load_base(packed).folder
    whole = contents(folder)
    if harm == "weights":
        flip(folder / "model.safetensors", -1)  # of one of the last weights, so that the file can still be read
    elif harm == "manifest":
        flip(folder / "manifest.json", whole["manifest.json"].index(b'"config.json": "') + 20)
    elif harm == "a file gone":
        (folder / "generation_config.json").unlink()
    else:
        flip(folder / f"{harm}.json", -1)
    monkeypatch.setattr(gguf_base, "_verified", set())  # as in another process
    with caplog.at_level(logging.WARNING, "gaintune"):
        assert load_base(packed).folder == folder
    assert contents(folder) == whole
    assert caplog.text.count("tiny.gguf in the cache is damaged") == caplog.text.count("doing it again") == 1


def test_a_conversion_is_checked_once_a_process(packed, monkeypatch):
    folder = load_base(packed).folder
    checked = []
    monkeypatch.setattr(gguf_base, "_verified", set())
    monkeypatch.setattr(gguf_base, "damage", checked.append)
    for _ in range(3):
        load_tokenizer(packed)
    assert checked == [folder]


@pytest.mark.parametrize("adds", [{"bos": True}, {"bos": False}, {"bos": True, "eos": True}, {}])
@pytest.mark.usefixtures("cache")
def test_a_gguf_file_says_which_tokens_are_put_around_every_text(tmp_path, adds):
    tiny_base.gguf(tmp_path / "tiny.gguf", **adds)
    base = load_base(at(tmp_path / "tiny.gguf"))
    settings = json.loads((base.folder / "tokenizer_config.json").read_text())
    assert {key: value for key, value in settings.items() if key.startswith("add_")} == {
        f"add_{token}_token": added for token, added in adds.items()
    }
    plain = base.tokenizer("a th", add_special_tokens=False).input_ids
    assert base.tokenizer("a th").input_ids == [0] * adds.get("bos", False) + plain + [0] * adds.get("eos", False)


def test_a_conversion_of_an_earlier_version_is_not_used(packed):
    """Of version 1, which did not write `add_bos_token`."""
    folder = load_base(packed).folder
    earlier = folder.with_name(f"{folder.name.split('-')[0]}-1")
    shutil.move(folder, earlier)
    assert load_base(packed).folder == folder != earlier
    assert earlier.is_dir(), "a version that is still installed elsewhere may use it"


@pytest.mark.parametrize("kind", [*gguf.quants._type_traits, GGMLQuantizationType.F16, GGMLQuantizationType.F32])
def test_weights_are_unpacked_to_the_bits_that_gguf_gives(kind, monkeypatch):
    monkeypatch.setattr(gguf_base, "SLAB", 1000)  # a few rows at most, and a rest
    values, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = 2 if values > 1 else 512
    data = np.random.default_rng(0).integers(0, 256, (3, 25, blocks * size), dtype=np.uint8)
    if values == 1 and kind != GGMLQuantizationType.BF16:
        data = data.view(np.float16 if kind == GGMLQuantizationType.F16 else np.float32)
    with np.errstate(all="ignore"):  # random bytes make scales that are no numbers
        expected, found = dequantize(data, kind), gguf_base.dequantize(data, kind)
    assert found.shape == expected.shape == (3, 25, blocks * values)
    assert found.dtype == expected.dtype == np.float32
    assert np.array_equal(found.view(np.int32), expected.view(np.int32))


def test_metadata_is_read_as_gguf_reads_it(tmp_path):
    lists = {"words": ["", "a", "zwölf", "\u2581th"], "scores": [0.5, -1000.0], "counts": [3, 0, 8]}
    lists |= {"flags": [True, False], "nested": [[1, 2], [3]]}
    writer = GGUFWriter(str(tmp_path / "tiny.gguf"), "llama")
    for key, value in lists.items():
        writer.add_array(key, value)
    writer.add_string("after", "the arrays")
    writer.add_tensor("weight", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours, theirs = (kind(tmp_path / "tiny.gguf") for kind in (gguf_base.FastReader, GGUFReader))
    assert ours.fields.keys() == theirs.fields.keys()
    for key, field in theirs.fields.items():
        assert ours.fields[key].types == field.types and ours.fields[key].contents() == field.contents()
        read = [[bytes(each.parts[index]) for index in each.data] for each in (ours.fields[key], field)]
        assert read[0] == read[1], key
    assert ours.fields["words"].contents() == lists["words"]
    assert np.array_equal(ours.tensors[0].data, theirs.tensors[0].data)


@pytest.mark.real_model
def test_the_demo_model_holds_the_numbers_of_its_gguf_file_for_plain_transformers_too(demo):
    reader = GGUFReader(str(assets.fetch("demo-model") / assets.ASSETS["demo-model"].members[0]))
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    for stored, name in [("blk.7.ffn_down", "model.layers.7.mlp.down_proj"), ("token_embd", "model.embed_tokens")]:
        tensor = tensors[f"{stored}.weight"]
        expected = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        assert torch.equal(demo.model.get_submodule(name).weight.data, expected.to(torch.bfloat16).float())
    model = hf.AutoModelForCausalLM.from_pretrained(demo.folder, dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), demo.model.parameters(), strict=True))
    assert "quantization_config" not in json.loads((demo.folder / "config.json").read_text())


@pytest.mark.real_model
def test_the_demo_model_speaks_and_can_be_chatted_with(demo):
    ids = demo.tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.inference_mode():
        following = demo.model(ids).logits[0, -1].argmax()
    assert demo.tokenizer.decode(following).strip() == "Paris"
    chat = demo.tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert "<|im_start|>user\nHi<|im_end|>" in chat


def test_nothing_is_printed(tiny, monkeypatch):
    monkeypatch.setattr(builtins, "print", lambda *words, **_: pytest.fail(f"printed {words}"))
    load_base(at(tiny))


@pytest.fixture(scope="module")
def modernbert(tmp_path_factory):
    """An encoder whose head has a part called "head", which no list of names for heads knows."""
    folder = tmp_path_factory.mktemp("modernbert")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "cls_token_id": 0, "sep_token_id": 2}
    config = hf.ModernBertConfig(vocab_size=tiny_encoders.VOCABULARY, max_position_embeddings=64, **sizes, **ids)
    hf.AutoModelForMaskedLM.from_config(config).save_pretrained(folder)
    tiny_encoders.tokenizer().save_pretrained(folder)
    return folder


def load_head(folder, **options):
    return load_classifier(ModelConfig(name=str(folder), dtype="bf16", device="cpu", **options), ("no", "yes"), seed=0)


def test_every_part_of_a_head_is_in_fp32(modernbert):
    base = load_head(modernbert)
    assert base.head == ("head", "classifier")
    for name in base.head:
        assert {p.dtype for p in base.model.get_submodule(name).parameters()} == {torch.float32}


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_a_part_that_was_quantized_with_the_base_is_refused(modernbert, quantization):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    with pytest.raises(BaseModelError, match=r"head, a part of its new head, was quantized with the base"):
        load_head(modernbert, quantization=quantization)
