"""Saving, loading and swapping: one save and one load carry the gates, bit for bit, on every path."""

import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gaintune.errors import AdapterError
from gaintune.tuners.disel import DiselConfig, DiselModel, disel_layers
from support import tiny_models

IDS = tiny_models.tokens()


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def adapted(seed=3, **options):
    config = DiselConfig(**{"r": 4, "task_type": "CAUSAL_LM", **options})
    return tiny_models.randomise_disel(get_peft_model(tiny_models.llama(), config), seed=seed).eval()


def tensors(model, adapter="default"):
    named = tiny_models.adapter_tensors(model, adapter)
    return {
        name.removeprefix("base_model.model.").replace(f".{adapter}.", "."): p.detach() for name, p in named.items()
    }


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(params=[{}, {"gate_rank": 2}, {"gate_kind": "relu"}], ids=str)
def saved(tmp_path, request):
    """A base folder, an adapter folder, what the two compute together, and the adapter's tensors."""
    tiny_models.llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = DiselConfig(r=4, task_type="CAUSAL_LM", gate_lr_ratio=3.0, **request.param)
    model = tiny_models.randomise_disel(get_peft_model(base, config)).eval()
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "base", tmp_path / "adapter", logits(model), tensors(model)


def test_the_file_holds_the_gates(saved):
    _, adapter, _, held = saved
    stored = load_file(adapter / "adapter_model.safetensors")
    assert same({name.removeprefix("base_model.model."): t for name, t in stored.items()}, held)
    config = PeftConfig.from_pretrained(adapter)
    assert isinstance(config, DiselConfig) and config.peft_type == "DISEL" and config.gate_lr_ratio == 3.0
    assert config.lora_alpha == 8
    kinds = {name.split(".lora_")[1] for name in stored}
    gates = {"G.weight", "G.bias"} if config.gate_kind == "sigmoid" else set()
    assert kinds == {"A.weight", "B.weight"} | gates | ({"G.weight_in"} if config.gate_rank else set())


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_one_load_restores_everything(saved, low_cpu_mem_usage):
    base, adapter, expected, held = saved
    model = AutoModelForCausalLM.from_pretrained(base)
    model = PeftModel.from_pretrained(model, adapter, low_cpu_mem_usage=low_cpu_mem_usage)
    assert isinstance(model.base_model, DiselModel)
    assert torch.equal(logits(model), expected) and same(tensors(model), held)
    assert not any(p.requires_grad for p in model.parameters())
    model.load_adapter(adapter, "more", is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage)
    model.set_adapter("more")
    assert torch.equal(logits(model), expected) and same(tensors(model, "more"), held)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(
        tiny_models.adapter_tensors(model, "more")
    )


def test_auto_class_and_base_class(saved):
    _, adapter, expected, _ = saved
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(adapter)), expected)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(adapter)), expected)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # two adapters on one model are the point
def test_transformers_integration(saved, tmp_path):
    base, adapter, expected, held = saved
    model = AutoModelForCausalLM.from_pretrained(base)
    plain = logits(model)
    model.load_adapter(adapter, adapter_name="mine")
    assert torch.equal(logits(model), expected) and same(tensors(model, "mine"), held)
    model.add_adapter(DiselConfig(r=2), "fresh")
    model.set_adapter("fresh")
    assert torch.equal(logits(model), plain)
    tiny_models.randomise_disel(model, "fresh")
    apart = logits(model)
    assert not torch.allclose(apart, plain)
    model.set_adapter("mine")
    assert torch.equal(logits(model), expected)
    model.disable_adapters()
    assert torch.equal(logits(model), plain)
    model.enable_adapters()
    model.set_adapter("fresh")
    model.save_pretrained(tmp_path / "out")
    model.delete_adapter("mine")
    assert torch.equal(logits(model), apart)
    again = AutoModelForCausalLM.from_pretrained(base)
    again.load_adapter(tmp_path / "out")
    assert torch.equal(logits(again), apart)
    model.delete_adapter("fresh")
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_gates_are_loaded_bit_for_bit_on_a_bf16_base(saved, low_cpu_mem_usage):
    base, adapter, _, held = saved
    gates = {name: t for name, t in held.items() if ".lora_G." in name}
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(model, adapter, low_cpu_mem_usage=low_cpu_mem_usage)
    assert same({name: t for name, t in tensors(model).items() if ".lora_G." in name}, gates)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model.load_adapter(adapter, adapter_name="mine", low_cpu_mem_usage=low_cpu_mem_usage)
    loaded = tensors(model, "mine")
    rounded = {name: t if name in gates else t.bfloat16() for name, t in held.items()}  # A and B as of plain LoRA
    assert same(loaded, rounded) and {loaded[name].dtype for name in gates} <= {torch.float32}


def test_transformers_trains_gates_in_fp32_on_a_bf16_base():
    model = tiny_models.llama().bfloat16()
    model.add_adapter(DiselConfig(r=2))
    before = {name: t.clone() for name, t in tensors(model).items() if ".lora_G." in name}
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1.0)
    tiny_models.randomise_disel(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_G.default.bias"):
                parameter.fill_(-3.0)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    biases = {name: p for name, p in model.named_parameters() if name.endswith("lora_G.default.bias")}
    assert before and {t.dtype for t in before.values()} == {torch.float32}
    assert any(0 < (p + 3).abs().max() < 2**-7 for p in biases.values())  # less than half a step of bf16 there


def test_gates_stay_in_fp32_whatever_the_model_is_cast_to(tmp_path):
    model = adapted()
    held = {name: t.clone() for name, t in tensors(model).items() if ".lora_G." in name}
    for cast in (lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double().float()):
        cast(model)
        assert same({name: t for name, t in tensors(model).items() if ".lora_G." in name}, held)
    assert model.half().lm_head.weight.dtype == torch.float16


def without_gates(adapter):
    """Take the gates out of a saved adapter."""
    file = adapter / "adapter_model.safetensors"
    save_file({name: t for name, t in load_file(file).items() if "lora_G" not in name}, file, metadata={"format": "pt"})


def test_transformers_own_loader_reports_missing_gates_and_goes_on(tmp_path):
    """It never calls a tuner with the file's keys, so nothing of ours can refuse there; `DiselConfig` says so."""
    adapted().save_pretrained(tmp_path)
    without_gates(tmp_path)
    report = tiny_models.llama().load_adapter(tmp_path)
    assert len([key for key in report.missing_keys if ".lora_G." in key]) == 2 * 14
    assert not [key for key in report.missing_keys if ".lora_G." not in key]


def test_an_adapter_without_its_gates_is_not_loaded_silently(saved):
    base, adapter, _, _ = saved
    config = json.loads((adapter / "adapter_config.json").read_text())
    if config["gate_kind"] == "relu":
        pytest.skip("Gated LoRA has no gates in the file")
    without_gates(adapter)
    with pytest.raises(AdapterError, match=r"14 modules \(first: .*down_proj\) without their gates"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)


def test_a_file_without_gates_is_not_swapped_in(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    without_gates(tmp_path)
    before = logits(model)
    with pytest.raises(AdapterError, match="without their gates"):
        hotswap_adapter(model, str(tmp_path), "default", torch_device="cpu")
    assert torch.equal(logits(model), before)


def test_modules_to_save_travel_with_the_adapter(tmp_path):
    model = adapted(modules_to_save=["lm_head"])
    with torch.no_grad():
        model.lm_head.modules_to_save["default"].weight.mul_(2)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_models.llama(), tmp_path)), logits(model))


@pytest.mark.parametrize("rank", [4, 2, 6])
@pytest.mark.parametrize("options", [{}, {"gate_rank": 2}, {"gate_kind": "relu"}], ids=str)
def test_hot_swap(tmp_path, rank, options):
    new = adapted(seed=7, r=rank, lora_alpha=5, **options)
    new.save_pretrained(tmp_path)
    model = adapted(**options)
    assert not torch.allclose(logits(model), logits(new))
    hotswap_adapter(model, str(tmp_path), "default", torch_device="cpu")
    torch.testing.assert_close(logits(model), logits(new), rtol=1e-4, atol=1e-4)


def test_hot_swap_of_fewer_layers_leaves_the_others_at_the_base(tmp_path):
    new = adapted(seed=7, target_modules=["o_proj"])
    new.save_pretrained(tmp_path)
    model = adapted()
    hotswap_adapter(model, str(tmp_path), "default", torch_device="cpu")
    torch.testing.assert_close(logits(model), logits(new))


@pytest.mark.parametrize("options", [{"gate_kind": "relu"}, {"gate_rank": 2}, {"use_rslora": True}], ids=str)
def test_hot_swap_of_another_kind_is_refused(tmp_path, options):
    adapted(**options).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"incompatible: for {next(iter(options))}"):
        hotswap_adapter(adapted(), str(tmp_path), "default", torch_device="cpu")


def test_hot_swap_into_a_compiled_model_does_not_recompile(tmp_path):
    new = adapted(seed=7, r=6, lora_alpha=5)
    new.save_pretrained(tmp_path)
    model = adapted()
    expected = logits(model)
    prepare_model_for_compiled_hotswap(model, target_rank=8, config=model.peft_config)
    for _, layer in disel_layers(model):
        assert {len(layer.lora_A["default"].weight), len(layer.lora_G["default"].bias)} == {8}
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    compiled = torch.compile(model, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(logits(compiled), expected, rtol=1e-4, atol=1e-4)
        hotswap_adapter(compiled, str(tmp_path), "default", torch_device="cpu")
        torch.testing.assert_close(logits(compiled), logits(new), rtol=1e-4, atol=1e-4)
