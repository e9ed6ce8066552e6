"""Merging: the model written is the adapter, or there is none; and the certificate says how near it is."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from gaintune import models
from gaintune.adapters import save_adapter
from gaintune.adapters.absorption import count_rounding
from gaintune.config import ModelConfig
from gaintune.errors import AdapterError, AssetError, BaseMismatchError, ConfigError, MergeError
from gaintune.models import fingerprint_folder, load_base
from gaintune.results import DomainLoss
from gaintune.tuners.disel import DiselConfig
from gaintune.workflows import merge_adapter
from gaintune.workflows.merge import Reading, blocks_of, distance
from support import refused, tiny_base
from support.files import edit_json
from support.tiny_adapters import CONFIGS, adapted, base_of, config_of, moved, record_of, saved

BLOCKS = tiny_base.blocks(count=6, length=24)


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory):
    """A `gain-ffn` adapter that all tests share."""
    return adapter_of(tiny, tmp_path_factory.mktemp("adapter") / "adapter")


def adapter_of(tiny, folder, method="gain-ffn", scale=0.05):
    saved(tiny, folder, method, scale)
    return folder


def merged(tiny, adapter, out, dtype="bf16", **options):
    options = {"blocks": BLOCKS, "model": config_of(tiny), "tolerance": 20.0, **options}
    return merge_adapter(adapter, out, dtype=dtype, **options)


@pytest.mark.parametrize("method", [*CONFIGS, "full"])
def test_in_fp32_the_merged_model_is_the_adapter(tiny, tmp_path, method):
    adapter = adapter_of(tiny, tmp_path / "adapter", method)
    certificate = merged(tiny, adapter, tmp_path / "out", "fp32", model=config_of(tiny, "fp32"), tolerance=1e-4)
    assert certificate.within_tolerance and certificate.largest_logit_difference < 1e-4
    assert (certificate.same_first_choice, certificate.share_unmoved) == (1.0, 0.0)
    if method in ("lora", "full"):
        assert (certificate.gains, certificate.gains_lost, certificate.gain_error) == (0, None, None)
        assert certificate.weights_changed > 1000
    untouched = base_of(tiny, "fp32").model
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert not torch.allclose(plain(BLOCKS).logits, untouched(BLOCKS).logits, atol=0.01)


def test_the_written_folder_is_a_plain_model_that_loads_without_us(tiny, adapter, tmp_path):
    certificate = merged(tiny, adapter, tmp_path / "out", max_shard_size="20KB")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("ab").input_ids
    assert (tmp_path / "out" / "generation_config.json").is_file()
    code = f"""
import sys
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "out")!r})
assert "peft" not in sys.modules and "gaintune" not in sys.modules
print(model.dtype, model.lm_head.weight.float().sum().item())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("torch.bfloat16")
    assert certificate.merged_fingerprint == fingerprint_folder(tmp_path / "out") != certificate.base_fingerprint


def test_weights_are_the_fp32_product_rounded_once(tiny, adapter, tmp_path):
    merged(tiny, adapter, tmp_path / "out")
    name = "model.layers.1.mlp.down_proj"
    base, out = load_file(tiny / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    v = load_file(adapter / "adapter_model.safetensors")[f"base_model.model.{name}.gain_v"]
    expected = (base[f"{name}.weight"].double() * (1 + v.double())).float().to(torch.bfloat16)
    assert torch.equal(out[f"{name}.weight"], expected)
    assert torch.equal(out["model.layers.1.mlp.up_proj.weight"], base["model.layers.1.mlp.up_proj.weight"])


def test_the_certificate_counts_what_rounding_takes(tiny, tmp_path):
    """A gain of 0.1 % changes no bf16 weight at all; one of 10 % changes every one."""
    small = tmp_path / "small"
    for folder, gain in ((small, 0.001), (tmp_path / "large", 0.1)):
        base = base_of(tiny)
        model = adapted(base, "gain-ffn")
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.constant_(parameter, gain)
        save_adapter(model, folder, record_of(base, "gain-ffn"))
    lost = merged(tiny, small, tmp_path / "small-out")
    assert (lost.share_unmoved, lost.gains_lost) == (1.0, 1.0)
    assert lost.gain_error == pytest.approx(1.0) and lost.gains == 2 * (32 + 48)
    assert lost.weights_changed == pytest.approx(2 * 32 * (32 + 48), abs=40), "all but weights that are zero"
    kept = merged(tiny, tmp_path / "large", tmp_path / "large-out")
    assert (kept.share_unmoved, kept.gains_lost) == (0.0, 0.0) and kept.gain_error < 0.03
    exact = merged(tiny, small, tmp_path / "exact", "fp32")
    assert (exact.share_unmoved, exact.gains_lost) == (0.0, 0.0) and exact.gain_error < 1e-3


def test_modules_trained_in_full_are_merged_too(tiny, tmp_path):
    base = base_of(tiny)
    model = moved(get_peft_model(base.model, LoraConfig(r=1, target_modules=["o_proj"], modules_to_save=["lm_head"])))
    save_adapter(model, tmp_path / "adapter", record_of(base, "lora"))
    merged(tiny, tmp_path / "adapter", tmp_path / "out", "fp32", model=config_of(tiny, "fp32"), tolerance=1e-4)
    head = load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"]
    assert not torch.equal(head, load_file(tiny / "model.safetensors")["lm_head.weight"].float())


def test_beyond_the_tolerance_nothing_is_left_unless_forced(tiny, tmp_path):
    adapter = adapter_of(tiny, tmp_path / "adapter", scale=0.3)
    out = tmp_path / "merged" / "out"
    refused(MergeError, r"NOT within tolerance.*--force", merged, tiny, adapter, out, tolerance=1e-9)
    assert not out.exists() and not list(out.parent.iterdir())
    certificate = merged(tiny, adapter, out, tolerance=1e-9, force=True)
    assert not certificate.within_tolerance and "forced" in certificate.verdict
    assert AutoModelForCausalLM.from_pretrained(out)


def test_a_merge_that_went_wrong_is_noticed(tiny, adapter, tmp_path, monkeypatch):
    """The judge reads the files: weights damaged on their way to the disk do not pass."""
    write = models.save_model

    def spoil(model, folder, **options):
        with torch.no_grad():
            model.get_submodule("model.layers.0.self_attn.o_proj").weight[:, :8].mul_(-3)
        write(model, folder, **options)

    monkeypatch.setattr(models, "save_model", spoil)
    refused(MergeError, "NOT within tolerance", merged, tiny, adapter, tmp_path / "out", tolerance=0.5)


def test_numbers_beyond_fp16_are_refused(tiny, tmp_path):
    base = base_of(tiny, "fp32")
    with torch.no_grad():
        base.model.get_submodule("model.layers.0.mlp.up_proj").weight.mul_(1e6)
    save_adapter(base.model, tmp_path / "full", record_of(base, "full"))
    with pytest.raises(MergeError, match="loss is not finite"):
        merged(tiny, tmp_path / "full", tmp_path / "out", "fp16", model=config_of(tiny, "fp32"))
    assert not (tmp_path / "out").exists()


def test_the_certificate_can_be_read_by_programs_and_people(tiny, adapter, tmp_path):
    certificate = merged(tiny, adapter, tmp_path / "out", "fp16")
    stored = json.loads((tmp_path / "out" / "certificate.json").read_text())
    assert stored["adapter_perplexity"] == certificate.adapter_perplexity
    assert stored["dtype"] == "fp16" and stored["reference"] == f"the adapter on {tiny} in bf16, on cpu"
    assert stored["computed_in"] == "fp32, on cpu" and stored["base_fingerprint"] == fingerprint_folder(tiny)
    page = (tmp_path / "out" / "certificate.md").read_text()
    assert "The merged model is within tolerance of its adapter" in page and "| gains lost in fp16 |" in page


def test_without_a_model_the_base_the_adapter_names_is_used(tiny, adapter, tmp_path):
    texts = ["some words to judge by"] * 9
    certificate = merge_adapter(adapter, tmp_path / "out", texts=texts, tolerance=20, dtype="bf16")
    assert certificate.base == str(tiny)
    assert (certificate.blocks, certificate.block_size) == (1, 128), "as long as the base takes"
    adapted(base_of(tiny), "lora").save_pretrained(tmp_path / "foreign")
    foreign = merge_adapter(tmp_path / "foreign", tmp_path / "again", blocks=BLOCKS, dtype="bf16", tolerance=20)
    assert foreign.base == str(tiny) and "unknown origin" in foreign.method


def test_another_base_and_a_folder_in_use_are_refused(tiny, adapter, tmp_path):
    other = tiny_base.folder(tmp_path / "other", seed=3)
    with pytest.raises(BaseMismatchError):
        merged(other, adapter, tmp_path / "out")
    assert merged(other, adapter, tmp_path / "out", allow_other_base=True).base == str(other)
    refused(ConfigError, "is not empty", merged, tiny, adapter, adapter, force=True)
    assert (adapter / "adapter_config.json").is_file()
    (tmp_path / "empty").mkdir()
    merged(tiny, adapter, tmp_path / "empty")


def test_wrong_settings_are_named(tiny, adapter, tmp_path):
    for wrong, message in [
        ({"dtype": "int3"}, "int3"),
        ({"tolerance": float("inf")}, "tolerance is inf %"),
        ({"tolerance": 0}, "above 0"),
        ({"blocks": None}, "judged on text"),
        ({"blocks": None, "texts": [""]}, "empty"),
        ({"blocks": torch.zeros(3, 1, dtype=torch.long)}, "shape"),
    ]:
        refused(ConfigError, message, merged, tiny, adapter, tmp_path / "out", **wrong)


@pytest.mark.parametrize(
    "config",
    [PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), DiselConfig(r=2)],
    ids=["prompt", "disel"],
)
def test_an_adapter_without_weights_to_merge_is_refused(tiny, tmp_path, config):
    base = base_of(tiny)
    save_adapter(get_peft_model(base.model, config), tmp_path / "adapter", record_of(base, "any"))
    with pytest.raises(AdapterError, match=f"an adapter of type {config.peft_type.value} has no weights to merge"):
        merged(tiny, tmp_path / "adapter", tmp_path / "out", model=config_of(tmp_path / "nowhere"))
    assert not (tmp_path / "out").exists()


def test_a_full_disk_loses_nothing(tiny, adapter, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000))
        refused(MergeError, r"0\.00 GB left", merged, tiny, adapter, tmp_path / "out")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(models, "save_model", full)
    refused(MergeError, "is full", merged, tiny, adapter, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_base_with_contradicting_generation_settings_can_be_merged(tmp_path):
    """A temperature without sampling, as in models on the hub: transformers reads it and refuses to write it."""
    folder = tiny_base.folder(tmp_path / "tiny")
    edit_json(folder / "generation_config.json", temperature=0.6)
    merged(folder, adapter_of(folder, tmp_path / "adapter"), tmp_path / "out")
    assert GenerationConfig.from_pretrained(tmp_path / "out").temperature == 0.6


def test_gains_of_gpt2s_transposed_layers_and_zero_and_negative_gains_are_counted():
    weight = torch.randn(40, 30)
    counted = count_rounding(weight, weight * (1 + 0.1 * torch.randn(40, 1)), torch.float32)
    assert (counted.gains, counted.lost) == (40, 0)
    gain = torch.ones(30)
    gain[:3] = torch.tensor([0.0, -1.0, -0.5])
    counted = count_rounding(weight, weight * gain, torch.bfloat16)
    assert (counted.gains, counted.lost, counted.changed, counted.unmoved) == (3, 0, 120, 0)
    assert counted.error / 3 < 1e-2


def test_bf16_loses_gains_as_it_was_measured_to():
    """0.1 % changes no weight, 0.2 % leaves 97 % as they were, 1 % lands with about 20 % of error a weight."""
    torch.manual_seed(0)
    weight = torch.randn(512, 200).to(torch.bfloat16).float()
    shares = [count_rounding(weight, weight * (1 + gain), torch.bfloat16) for gain in (0.001, 0.002, 0.01)]
    assert shares[0].unmoved == shares[0].changed
    assert shares[1].unmoved / shares[1].changed == pytest.approx(0.97, abs=0.03)
    assert shares[2].unmoved == 0 and 0.02 < shares[2].error / 200 < 0.3


def test_readings_have_distances_and_texts_become_blocks_with_an_end_between_them():
    loss = DomainLoss((1.0,), (1,), (1,))
    first = Reading(loss, torch.tensor([[1.0, 2.0], [4.0, 3.0]]))
    apart = distance(first, Reading(loss, torch.tensor([[1.5, 1.0], [4.0, 3.0]])))
    assert list(apart.values()) == [1.0, 0.375, 0.5]  # largest, mean, same first choice
    tokenizer = tiny_base.tokenizer()
    blocks = blocks_of(["abc", "de"], tokenizer, block_size=3)
    ids = [*tokenizer("abc").input_ids, 0, *tokenizer("de").input_ids, 0]
    assert blocks.tolist() == [ids[:3], ids[3:6]]


@pytest.mark.real_model
def test_a_gain_adapter_of_the_embedded_model_merges(tmp_path):
    try:
        base = load_base(ModelConfig(device="cpu", dtype="bf16"))
    except AssetError as error:
        pytest.skip(f"the embedded model cannot be had here: {error}")
    model = adapted(base, "gain-ffn")
    save_adapter(model, tmp_path / "adapter", record_of(base, "gain-ffn"))
    blocks = blocks_of([str(LoraConfig.__doc__)[:700]], base.tokenizer, block_size=128)
    model = ModelConfig(device="cpu", dtype="bf16")
    certificate = merge_adapter(tmp_path / "adapter", tmp_path / "out", blocks=blocks, model=model, tolerance=2.0)
    assert certificate.within_tolerance and certificate.dtype == "bf16" and certificate.same_first_choice > 0.9
    assert certificate.gains == pytest.approx(30 * (576 + 1536), abs=10), "all but those that happen to be 1"
    assert certificate.gains_lost is not None and certificate.gains_lost < 0.1
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
