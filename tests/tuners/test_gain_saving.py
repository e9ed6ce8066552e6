"""Saving, loading and the transformers integration; gains are float32 wherever they come from."""

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gaintune.tuners.gain import GainConfig
from support import tiny_models

IDS = tiny_models.tokens()


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def float32(model, adapter="default"):
    return {v.dtype for v in tiny_models.gains(model, adapter).values()} == {torch.float32}


@pytest.fixture
def saved(tmp_path):
    """A base folder, an adapter folder, and what the two compute together."""
    base = tiny_models.llama()
    base.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = tiny_models.randomise(get_peft_model(base, GainConfig(ffn=True, task_type="CAUSAL_LM"))).eval()
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "base", tmp_path / "adapter", logits(model)


def test_the_file_holds_the_gains_and_nothing_else(saved):
    _, adapter, _ = saved
    tensors = load_file(adapter / "adapter_model.safetensors")
    modules = [
        f"base_model.model.model.layers.{i}.{end}" for i in (0, 1) for end in ("self_attn.o_proj", "mlp.down_proj")
    ]
    assert set(tensors) == {f"{module}.gain_v" for module in modules}
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    config = PeftConfig.from_pretrained(adapter)
    assert isinstance(config, GainConfig)
    assert config.ffn and config.target_modules == {"o_proj", "down_proj"}


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_loading_gives_the_same_model(saved, low_cpu_mem_usage):
    base, adapter, expected = saved
    model = AutoModelForCausalLM.from_pretrained(base)
    model = PeftModel.from_pretrained(model, adapter, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(model), expected)
    assert float32(model)
    assert not any(p.requires_grad for p in model.parameters())
    model.load_adapter(adapter, "more", is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage)
    model.set_adapter("more")
    assert torch.equal(logits(model), expected)


def test_continuing_an_adapter(saved):
    base, adapter, _ = saved
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter, is_trainable=True)
    gains = tiny_models.gains(model)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(gains)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(v.grad.abs().max() > 0 for v in gains.values())


def test_auto_class(saved):
    _, adapter, expected = saved
    model = AutoPeftModelForCausalLM.from_pretrained(adapter)
    assert torch.equal(logits(model), expected)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # two adapters on one model are the point
def test_transformers_integration(saved, tmp_path):
    base, adapter, expected = saved
    model = AutoModelForCausalLM.from_pretrained(base)
    plain = logits(model)
    model.load_adapter(adapter)
    assert torch.equal(logits(model), expected)
    assert float32(model)
    model.add_adapter(GainConfig(), "fresh")
    assert model.active_adapters() == ["fresh"]
    assert torch.equal(logits(model), plain)
    tiny_models.randomise(model, "fresh")
    both_apart = logits(model)
    model.set_adapter("default")
    assert torch.equal(logits(model), expected)
    model.disable_adapters()
    assert torch.equal(logits(model), plain)
    model.enable_adapters()
    model.set_adapter("fresh")
    model.save_pretrained(tmp_path / "out")
    model.delete_adapter("default")
    assert torch.equal(logits(model), both_apart)
    again = AutoModelForCausalLM.from_pretrained(base)
    again.load_adapter(tmp_path / "out")
    assert torch.equal(logits(again), both_apart)
    model.delete_adapter("fresh")
    assert torch.equal(logits(model), plain)


def test_from_pretrained_on_an_adapter_folder(saved):
    _, adapter, expected = saved
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(adapter)), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gains_are_float32_whatever_is_asked(dtype):
    base = tiny_models.llama().to(dtype)
    model = get_peft_model(base, GainConfig(), autocast_adapter_dtype=False)
    model.add_adapter("other", GainConfig(), autocast_adapter_dtype=False)
    assert float32(model) and float32(model, "other")
    tiny_models.randomise(model)
    before = [v.detach().clone() for v in tiny_models.gains(model).values()]
    model(input_ids=IDS, labels=IDS).loss.backward()
    gradients = [v.grad.clone() for v in tiny_models.gains(model).values()]
    for cast in (lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.bfloat16().float()):
        cast(model)
        assert float32(model)
    for v, old, gradient in zip(tiny_models.gains(model).values(), before, gradients, strict=True):
        assert torch.equal(v, old)
        assert torch.equal(v.grad, gradient)
    assert torch.equal(base.lm_head.weight, base.lm_head.weight.bfloat16().float())


@pytest.mark.parametrize("how", ["peft", "low_cpu_mem_usage", "transformers", "assign"])
def test_a_half_precision_file_is_widened(saved, how):
    base, adapter, _ = saved
    file = adapter / "adapter_model.safetensors"
    narrow = {name: t.bfloat16() for name, t in load_file(file).items()}
    save_file(narrow, file, metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    if how == "transformers":
        model.load_adapter(adapter)
    elif how == "assign":
        model = get_peft_model(model, GainConfig(ffn=True))
        model.load_state_dict({f"{name}.default": t for name, t in narrow.items()}, strict=False, assign=True)
    else:
        model = PeftModel.from_pretrained(
            model, adapter, low_cpu_mem_usage=how == "low_cpu_mem_usage", autocast_adapter_dtype=False
        )
    assert float32(model)
    loaded = {name.removeprefix("base_model.model."): v for name, v in tiny_models.gains(model).items()}
    for name, t in narrow.items():
        assert torch.equal(loaded[name.removeprefix("base_model.model.") + ".default"], t.float())


def test_modules_to_save_travel_with_the_adapter(tmp_path):
    config = GainConfig(modules_to_save=["lm_head"])
    model = tiny_models.randomise(get_peft_model(tiny_models.llama(), config)).eval()
    with torch.no_grad():
        model.lm_head.modules_to_save["default"].weight.mul_(2)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_models.llama(), tmp_path)), expected)
    assert model.lm_head.modules_to_save["default"].weight.requires_grad


def test_random_start():
    model = get_peft_model(tiny_models.llama(), GainConfig(init_weights=False))
    assert all(v.std() > 0.1 for v in tiny_models.gains(model).values())
