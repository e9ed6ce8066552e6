"""Saving, loading and the transformers integration: one load brings an adapter back, bit for bit, on every path."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gaintune.errors import AdapterError
from gaintune.tuners.disel import DiselConfig, DiselModel
from gaintune.tuners.gain import GainConfig, GainModel
from support.tiny_models import IDS, adapter_tensors, copies, llama, logits, randomise, trainable

DISEL = partial(DiselConfig, r=4, task_type="CAUSAL_LM", gate_lr_ratio=3.0)
CONFIGS = {
    "gain": partial(GainConfig, ffn=True, task_type="CAUSAL_LM"),
    "disel": DISEL,
    "disel with low-rank gates": partial(DISEL, gate_rank=2),
    "gated-lora": partial(DISEL, gate_kind="relu"),
}
OUTPUTS = ("self_attn.o_proj", "mlp.down_proj")
LINEARS = (*OUTPUTS, *(f"self_attn.{part}_proj" for part in "qkv"), "mlp.gate_proj", "mlp.up_proj")
LORA, GATE = ("lora_A.weight", "lora_B.weight"), ("lora_G.weight", "lora_G.bias")
PARTS = {
    "gain": (OUTPUTS, ("gain_v",)),
    "disel": (LINEARS, (*LORA, *GATE)),
    "disel with low-rank gates": (LINEARS, (*LORA, *GATE, "lora_G.weight_in")),
    "gated-lora": (LINEARS, LORA),
}


def named(values, adapter="default"):
    """Tensors by their name in a plain model, whatever holds the adapter."""
    return {name.removeprefix("base_model.model.").replace(f".{adapter}", ""): t.detach() for name, t in values.items()}


def tensors(model, adapter="default"):
    return named(adapter_tensors(model, adapter), adapter)


def same(one, other):
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def adapted(name="disel", **options):
    return randomise(get_peft_model(llama(), CONFIGS[name](**options))).eval()


@pytest.fixture(params=CONFIGS)
def saved(tmp_path, request):
    """A base folder, an adapter folder, what the two compute together, and the adapter's tensors."""
    llama().save_pretrained(tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), CONFIGS[request.param]())
    randomise(model).eval().save_pretrained(tmp_path / "adapter")
    return SimpleNamespace(
        name=request.param,
        base=partial(AutoModelForCausalLM.from_pretrained, tmp_path / "base"),
        adapter=tmp_path / "adapter",
        file=tmp_path / "adapter" / "adapter_model.safetensors",
        logits=logits(model),
        tensors=tensors(model),
    )


gates_only = pytest.mark.parametrize("saved", ["disel", "disel with low-rank gates"], indirect=True)
gains_only = pytest.mark.parametrize("saved", ["gain"], indirect=True)
disel_only = pytest.mark.parametrize("saved", [name for name in CONFIGS if name != "gain"], indirect=True)


def test_the_file_holds_the_adapter_and_nothing_else(saved):
    stored = load_file(saved.file)
    assert same(named(stored), saved.tensors)
    modules, parts = PARTS[saved.name]
    assert set(saved.tensors) == {f"model.layers.{i}.{m}.{part}" for i in (0, 1) for m in modules for part in parts}
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    config = PeftConfig.from_pretrained(saved.adapter)
    if saved.name == "gain":
        assert isinstance(config, GainConfig) and config.ffn and config.target_modules == {"o_proj", "down_proj"}
    else:
        assert isinstance(config, DiselConfig) and config.peft_type == "DISEL"
        assert (config.gate_lr_ratio, config.lora_alpha) == (3.0, 8)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_one_load_restores_everything(saved, low_cpu_mem_usage):
    model = PeftModel.from_pretrained(saved.base(), saved.adapter, low_cpu_mem_usage=low_cpu_mem_usage)
    assert isinstance(model.base_model, GainModel if saved.name == "gain" else DiselModel)
    assert torch.equal(logits(model), saved.logits) and same(tensors(model), saved.tensors)
    assert not trainable(model)
    model.load_adapter(saved.adapter, "more", is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage)
    model.set_adapter("more")
    assert torch.equal(logits(model), saved.logits) and same(tensors(model, "more"), saved.tensors)
    assert trainable(model) == set(adapter_tensors(model, "more"))


@gains_only
def test_a_loaded_adapter_can_be_trained_on(saved):
    model = PeftModel.from_pretrained(saved.base(), saved.adapter, is_trainable=True)
    assert trainable(model) == set(adapter_tensors(model))
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(v.grad.abs().max() > 0 for v in adapter_tensors(model).values())


def test_auto_classes_of_peft_and_transformers_load_the_adapter_folder(saved):
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(saved.adapter)), saved.logits)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(saved.adapter)), saved.logits)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # two adapters on one model are the point
def test_transformers_integration(saved, tmp_path):
    model = saved.base()
    plain = logits(model)
    model.load_adapter(saved.adapter, **({} if saved.name == "gain" else {"adapter_name": "mine"}))
    mine = model.active_adapters()[0]
    assert torch.equal(logits(model), saved.logits) and same(tensors(model, mine), saved.tensors)
    model.add_adapter(GainConfig() if saved.name == "gain" else DiselConfig(r=2), "fresh")
    assert model.active_adapters() == ["fresh"] and torch.equal(logits(model), plain)
    randomise(model, "fresh")
    fresh = logits(model)
    assert not torch.allclose(fresh, plain)
    model.set_adapter(mine)
    assert torch.equal(logits(model), saved.logits)
    model.disable_adapters()
    assert torch.equal(logits(model), plain)
    model.enable_adapters()
    model.set_adapter("fresh")
    model.save_pretrained(tmp_path / "out")
    model.delete_adapter(mine)
    assert torch.equal(logits(model), fresh)
    again = saved.base()
    again.load_adapter(tmp_path / "out")
    assert torch.equal(logits(again), fresh)
    model.delete_adapter("fresh")
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gains_are_float32_whatever_dtype_is_given(dtype):
    base = llama().to(dtype)
    model = get_peft_model(base, GainConfig(), autocast_adapter_dtype=False)
    model.add_adapter("other", GainConfig(), autocast_adapter_dtype=False)
    before = copies(randomise(model))
    model(input_ids=IDS, labels=IDS).loss.backward()
    gradients = {name: v.grad.clone() for name, v in adapter_tensors(model).items()}
    for cast in (lambda m: m, lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.bfloat16().float()):
        cast(model)
        assert same(before, adapter_tensors(model)) and {t.dtype for t in before.values()} == {torch.float32}
        assert {v.dtype for v in adapter_tensors(model, "other").values()} == {torch.float32}
        assert same(gradients, {name: v.grad for name, v in adapter_tensors(model).items()})
    assert torch.equal(base.lm_head.weight, base.lm_head.weight.bfloat16().float())


def gates_of(values):
    return {name: tensor for name, tensor in values.items() if ".lora_G." in name}


def test_gates_stay_in_fp32_whatever_the_model_is_cast_to():
    model = adapted()
    gates = gates_of(copies(model))
    for cast in (lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double().float()):
        cast(model)
        assert same(gates_of(adapter_tensors(model)), gates)
    assert model.half().lm_head.weight.dtype == torch.float16


@gains_only
@pytest.mark.parametrize("how", ["peft", "low_cpu_mem_usage", "transformers", "assign"])
def test_a_half_precision_file_of_gains_is_widened(saved, how):
    narrow = {name: tensor.bfloat16() for name, tensor in load_file(saved.file).items()}
    save_file(narrow, saved.file, metadata={"format": "pt"})
    model = saved.base(dtype=torch.bfloat16)
    if how == "transformers":
        model.load_adapter(saved.adapter)
    elif how == "assign":
        model = get_peft_model(model, GainConfig(ffn=True))
        model.load_state_dict({f"{name}.default": t for name, t in narrow.items()}, strict=False, assign=True)
    else:
        low = how == "low_cpu_mem_usage"
        model = PeftModel.from_pretrained(model, saved.adapter, low_cpu_mem_usage=low, autocast_adapter_dtype=False)
    assert same(tensors(model), {name: tensor.float() for name, tensor in named(narrow).items()})


@disel_only
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_gates_are_loaded_bit_for_bit_on_a_bf16_base(saved, low_cpu_mem_usage):
    model = saved.base(dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(model, saved.adapter, low_cpu_mem_usage=low_cpu_mem_usage)
    assert same(gates_of(tensors(model)), gates_of(saved.tensors))
    model = saved.base(dtype=torch.bfloat16)
    model.load_adapter(saved.adapter, adapter_name="mine", low_cpu_mem_usage=low_cpu_mem_usage)
    rounded = {name: t if ".lora_G." in name else t.bfloat16() for name, t in saved.tensors.items()}
    assert same(tensors(model, "mine"), rounded)  # A and B as of plain LoRA


def test_transformers_trains_gates_in_fp32_on_a_bf16_base():
    model = llama().bfloat16()
    model.add_adapter(DiselConfig(r=2))
    gates = gates_of(adapter_tensors(model))
    assert gates and {gate.dtype for gate in gates.values()} == {torch.float32}
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1.0)
    randomise(model)
    biases = [gate for name, gate in gates.items() if name.endswith("lora_G.default.bias")]
    with torch.no_grad():
        for bias in biases:
            bias.fill_(-3.0)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert any(0 < (bias + 3).abs().max() < 2**-7 for bias in biases)  # less than half a step of bf16 there


def without_gates(adapter):
    """Take the gates out of a saved adapter."""
    file = adapter / "adapter_model.safetensors"
    save_file({name: t for name, t in load_file(file).items() if "lora_G" not in name}, file, metadata={"format": "pt"})


def test_transformers_own_loader_reports_missing_gates_and_goes_on(tmp_path):
    """It never calls a tuner with the file's keys, so nothing of ours can refuse there; `DiselConfig` says so."""
    adapted().save_pretrained(tmp_path)
    without_gates(tmp_path)
    missing = llama().load_adapter(tmp_path).missing_keys
    assert len(missing) == 2 * 14 and all(".lora_G." in key for key in missing)


@gates_only
def test_an_adapter_without_its_gates_is_not_loaded_silently(saved):
    without_gates(saved.adapter)
    with pytest.raises(AdapterError, match=r"14 modules \(first: .*down_proj\) without their gates"):
        PeftModel.from_pretrained(saved.base(), saved.adapter)


@pytest.mark.parametrize("name", ["gain", "disel"])
def test_modules_to_save_travel_with_the_adapter(tmp_path, name):
    model = adapted(name, modules_to_save=["lm_head"])
    head = model.lm_head.modules_to_save["default"].weight
    with torch.no_grad():
        head.mul_(2)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), logits(model))
    assert head.requires_grad


def test_gains_can_start_at_random():
    model = get_peft_model(llama(), GainConfig(init_weights=False))
    assert all(v.std() > 0.1 for v in adapter_tensors(model).values())
