"""Hot swap: another adapter's values in place of the active one's, in a compiled model too, or a refusal."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from safetensors.torch import load_file, save_file

from gaintune.errors import AdapterError
from gaintune.tuners.disel import DiselConfig, disel_layers
from gaintune.tuners.gain import GainConfig
from support import refused
from support.tiny_models import adapter_tensors, llama, logits, randomise

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def gain(seed=3, layers=2, **options):
    config = GainConfig(**{"ffn": True, **options})
    return randomise(get_peft_model(llama(num_hidden_layers=layers), config), seed=seed).eval()


def disel(seed=3, layers=2, **options):
    config = DiselConfig(**{"r": 4, **options})
    return randomise(get_peft_model(llama(num_hidden_layers=layers), config), seed=seed).eval()


def swap(model, folder):
    hotswap_adapter(model, str(folder), "default", torch_device="cpu")


def test_gains_are_swapped_in_place_into_a_compiled_model(tmp_path):
    new = gain(seed=6, layers=1)
    new.save_pretrained(tmp_path)
    model = gain(layers=1)
    before = {name: id(p) for name, p in adapter_tensors(model).items()}
    compiled = torch.compile(model, backend="eager")
    logits(compiled)
    swap(compiled, tmp_path)
    assert torch.equal(logits(model), logits(new))
    assert {name: id(p) for name, p in adapter_tensors(model).items()} == before


@pytest.mark.parametrize("rank", [4, 2, 6])
@pytest.mark.parametrize("options", [{}, {"gate_rank": 2}, {"gate_kind": "relu"}], ids=str)
def test_gates_are_swapped_with_their_adapter_whatever_its_rank(tmp_path, rank, options):
    new = disel(seed=7, r=rank, lora_alpha=5, **options)
    new.save_pretrained(tmp_path)
    model = disel(**options)
    assert not torch.allclose(logits(model), logits(new))
    swap(model, tmp_path)
    torch.testing.assert_close(logits(model), logits(new), **CLOSE)


def test_gates_are_swapped_into_a_compiled_model_without_compiling_it_again(tmp_path):
    new = disel(seed=7, layers=1, r=6, lora_alpha=5)
    new.save_pretrained(tmp_path)
    model = disel(layers=1)
    expected = logits(model)
    prepare_model_for_compiled_hotswap(model, target_rank=8, config=model.peft_config)
    for _, layer in disel_layers(model):
        assert {len(layer.lora_A["default"].weight), len(layer.lora_G["default"].bias)} == {8}
    torch.testing.assert_close(logits(model), expected, **CLOSE)
    torch._dynamo.reset()  # of what other tests compiled
    compiled = torch.compile(model, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(logits(compiled), expected, **CLOSE)
        swap(compiled, tmp_path)
        torch.testing.assert_close(logits(compiled), logits(new), **CLOSE)


@pytest.mark.parametrize(("build", "fewer"), [(gain, {"ffn": False}), (disel, {"target_modules": ["o_proj"]})])
def test_layers_that_the_new_adapter_leaves_out_are_reset(tmp_path, build, fewer):
    small = build(seed=7, **fewer)
    small.save_pretrained(tmp_path)
    model = build()
    swap(model, tmp_path)
    torch.testing.assert_close(logits(model), logits(small), **({"rtol": 0, "atol": 0} if build is gain else {}))


def test_layers_that_only_the_new_adapter_has_and_merged_adapters_are_refused(tmp_path):
    gain(seed=5).save_pretrained(tmp_path)
    model = gain(ffn=False)
    before = logits(model)
    refused(AdapterError, r"down_proj\.gain_v", swap, model, tmp_path)
    assert torch.equal(logits(model), before)
    merged = PeftModel.from_pretrained(llama(), tmp_path)
    merged.merge_adapter()
    refused(ValueError, "merged", swap, merged, tmp_path)


@pytest.mark.parametrize("options", [{"gate_kind": "relu"}, {"gate_rank": 2}, {"use_rslora": True}], ids=str)
def test_an_adapter_of_another_kind_is_refused(tmp_path, options):
    disel(**options).save_pretrained(tmp_path)
    refused(ValueError, f"incompatible: for {next(iter(options))}", swap, disel(), tmp_path)


def test_a_file_without_gates_is_refused(tmp_path):
    model = disel()
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({name: t for name, t in load_file(file).items() if "lora_G" not in name}, file, metadata={"format": "pt"})
    before = logits(model)
    refused(AdapterError, "without their gates", swap, model, tmp_path)
    assert torch.equal(logits(model), before)


def test_lora_is_swapped_as_before(tmp_path):
    config = LoraConfig(target_modules=["o_proj"], init_lora_weights=False)
    other = get_peft_model(llama(), config).eval()
    other.save_pretrained(tmp_path)
    model = get_peft_model(llama(), config).eval()
    swap(model, tmp_path)
    torch.testing.assert_close(logits(model), logits(other))
