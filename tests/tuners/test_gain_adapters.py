"""Several adapters in one model: active together, one a row, combined by weights, disabled, deleted, swapped."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter

from gaintune.errors import AdapterError
from gaintune.tuners.gain import GainConfig, GainLayer
from support import tiny_models

IDS = tiny_models.tokens(rows=3)


def two_adapters(build=tiny_models.llama, ffn=True):
    """Adapters "first" and "second", the first active."""
    model = get_peft_model(build(), GainConfig(ffn=ffn), "first")
    model.add_adapter("second", GainConfig(ffn=ffn))
    tiny_models.randomise(model, "first", seed=3)
    return tiny_models.randomise(model, "second", seed=4).eval()


@torch.no_grad()
def logits(model, **kwargs):
    return model(input_ids=IDS, **kwargs).logits


def with_adapter(model, name):
    if name == "__base__":
        with model.disable_adapter():
            return logits(model)
    model.set_adapter(name)
    return logits(model)


def test_gains_of_active_adapters_multiply():
    model = two_adapters()
    model.base_model.set_adapter(["first", "second"])
    both = logits(model)
    product = {}
    for name, v in tiny_models.gains(model, "first").items():
        w = tiny_models.gains(model, "second")[name.replace(".first", ".second")]
        product[name] = (1 + v.detach()) * (1 + w.detach()) - 1
    model.set_adapter("first")
    with torch.no_grad():
        for name, v in tiny_models.gains(model, "first").items():
            v.copy_(product[name])
    torch.testing.assert_close(logits(model), both, rtol=1e-4, atol=1e-5)


def test_both_active_adapters_get_gradients():
    model = two_adapters()
    model.base_model.set_adapter(["first", "second"])
    model(input_ids=IDS, labels=IDS).loss.backward()
    for adapter in ("first", "second"):
        assert all(v.grad.abs().max() > 0 for v in tiny_models.gains(model, adapter).values())


def test_only_the_active_adapter_is_trainable():
    model = two_adapters()
    assert all(v.requires_grad for v in tiny_models.gains(model, "first").values())
    assert not any(v.requires_grad for v in tiny_models.gains(model, "second").values())
    model.set_adapter("second")
    assert not any(v.requires_grad for v in tiny_models.gains(model, "first").values())
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == set(tiny_models.gains(model, "second"))


def test_disabling_gives_the_base_bit_for_bit():
    base = logits(tiny_models.llama())
    model = two_adapters()
    assert not torch.equal(logits(model), base)
    assert torch.equal(with_adapter(model, "__base__"), base)


@pytest.mark.parametrize("build", [tiny_models.llama, tiny_models.gpt2, tiny_models.opt])
def test_each_row_may_have_its_own_adapter(build):
    # OPT runs its feed-forward block on (batch * tokens, features)
    model = two_adapters(build)
    names = ["second", "__base__", "first"]
    mixed = logits(model, adapter_names=names)
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row], with_adapter(model, name)[row], rtol=1e-5, atol=1e-6)


def test_rows_may_use_adapters_of_different_layers():
    model = get_peft_model(tiny_models.llama(), GainConfig(), "first")
    model.add_adapter("second", GainConfig(target_modules=["down_proj"], layers_to_transform=[1]))
    tiny_models.randomise(model, "first")
    tiny_models.randomise(model, "second").eval()
    mixed = logits(model, adapter_names=["first", "second", "__base__"])
    for row, name in enumerate(["first", "second", "__base__"]):
        torch.testing.assert_close(mixed[row], with_adapter(model, name)[row], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("build", [tiny_models.llama, tiny_models.opt])
def test_generation_with_one_adapter_a_row(build, beams):
    model = two_adapters(build)
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "num_beams": beams, "do_sample": False, "pad_token_id": 0}
    names = ["first", "__base__", "second"]
    mixed = model.generate(input_ids=IDS, adapter_names=names, **settings)
    single = []
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                single.append(model.generate(input_ids=IDS[row : row + 1], **settings)[0])
        else:
            model.set_adapter(name)
            single.append(model.generate(input_ids=IDS[row : row + 1], **settings)[0])
    assert torch.equal(mixed, torch.stack(single))
    assert len({tuple(row.tolist()) for row in mixed[:, IDS.shape[1] :]}) > 1


def test_beam_search_asked_for_by_a_generation_config():
    from transformers import GenerationConfig

    model = two_adapters()
    settings = GenerationConfig(max_new_tokens=4, num_beams=2, pad_token_id=0)
    names = ["first", "second", "first"]
    mixed = model.generate(input_ids=IDS, adapter_names=names, generation_config=settings)
    model.set_adapter("second")
    assert torch.equal(mixed[1], model.generate(input_ids=IDS[1:2], generation_config=settings)[0])


def test_encoder_decoder_generation_with_one_adapter_a_row():
    from transformers import AutoModelForSeq2SeqLM, T5Config

    torch.manual_seed(1)
    base = AutoModelForSeq2SeqLM.from_config(
        T5Config(vocab_size=97, d_model=32, d_ff=48, d_kv=8, num_heads=4, num_layers=2, decoder_start_token_id=0)
    )
    model = get_peft_model(base, GainConfig(ffn=True, task_type="SEQ_2_SEQ_LM"), "first")
    model.add_adapter("second", GainConfig(ffn=True, task_type="SEQ_2_SEQ_LM"))
    tiny_models.randomise(model, "first", seed=5)
    tiny_models.randomise(model, "second", seed=6).eval()
    settings = {"max_new_tokens": 5, "num_beams": 2}
    mixed = model.generate(input_ids=IDS, adapter_names=["first", "second", "first"], **settings)
    model.set_adapter("second")
    assert torch.equal(mixed[1], model.generate(input_ids=IDS, **settings)[1])
    model.set_adapter("first")
    assert torch.equal(mixed[0], model.generate(input_ids=IDS, **settings)[0])


@pytest.mark.parametrize("names", [["first"], ["first"] * 2, ["first"] * 6])
@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_a_wrong_number_of_names_is_refused(names, task_type):
    # three rows take neither one name (which divides 3) nor six
    model = get_peft_model(tiny_models.llama(), GainConfig(task_type=task_type), "first").eval()
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        model(input_ids=IDS, adapter_names=names)
    model(input_ids=IDS)  # nothing is left behind


def test_rows_that_were_routed_elsewhere_are_refused():
    # an expert of a mixture sees some tokens of some rows, which may happen to be a multiple of the rows
    layer = two_adapters().base_model.model.model.layers[0].mlp.down_proj
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        layer(torch.randn(6, 48), adapter_names=["first", "second", "first"])


def test_unknown_names_and_training_are_refused():
    model = two_adapters()
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): absent"):
        model(input_ids=IDS, adapter_names=["first", "absent", "first"])
    with pytest.raises(ValueError, match="training mode"):
        model.train()(input_ids=IDS, adapter_names=["first"] * 3)


def test_weighted_adapters():
    model = two_adapters()
    weights = [0.3, -1.7]
    model.add_weighted_adapter(["first", "second"], weights, "mix")
    first, second = (list(tiny_models.gains(model, name).values()) for name in ("first", "second"))
    mix = list(tiny_models.gains(model, "mix").values())
    assert len(mix) == 4
    for g, a, b in zip(mix, first, second, strict=True):
        expected = 1 + weights[0] * ((1 + a.double()) - 1) + weights[1] * ((1 + b.double()) - 1)
        torch.testing.assert_close(1 + g.double(), expected, rtol=0, atol=1e-6)
    assert not any(g.requires_grad for g in mix)
    assert model.active_adapters == ["first"]
    assert all(v.requires_grad for v in first)


def test_weighted_adapters_over_different_layers_survive_saving(tmp_path):
    model = get_peft_model(tiny_models.llama(), GainConfig(), "first")
    model.add_adapter("second", GainConfig(target_modules=r".*layers\.1\.mlp\.down_proj"))
    tiny_models.randomise(model, "first")
    tiny_models.randomise(model, "second")
    model.add_weighted_adapter(["first", "second"], [1.0, 0.5], "mix")
    assert len(tiny_models.gains(model, "mix")) == 3
    mix, second = tiny_models.gains(model, "mix"), tiny_models.gains(model, "second")
    name = "base_model.model.model.layers.1.mlp.down_proj.gain_v"
    assert torch.equal(mix[f"{name}.mix"], 0.5 * second[f"{name}.second"])
    model.set_adapter("mix")
    expected = logits(model.eval())
    model.save_pretrained(tmp_path, selected_adapters=["mix"])
    again = PeftModel.from_pretrained(tiny_models.llama(), tmp_path / "mix")
    assert torch.equal(logits(again), expected)


def test_weighted_adapters_refuse_what_they_cannot_combine():
    model = two_adapters()
    with pytest.raises(ValueError, match="does not exist"):
        model.add_weighted_adapter(["first", "absent"], [1, 1], "mix")
    with pytest.raises(ValueError, match="already exists"):
        model.add_weighted_adapter(["first"], [1], "second")
    with pytest.raises(ValueError, match="2 adapters and 1 weights"):
        model.add_weighted_adapter(["first", "second"], [1], "mix")
    model.add_adapter("head", GainConfig(modules_to_save=["lm_head"]))
    with pytest.raises(ValueError, match="modules_to_save"):
        model.add_weighted_adapter(["first", "head"], [1, 1], "mix")
    assert set(model.peft_config) == {"first", "second", "head"}


def test_deleting_an_adapter_leaves_the_other():
    model = two_adapters()
    expected = with_adapter(model, "second")
    model.delete_adapter("first")
    assert torch.equal(logits(model), expected)
    assert not tiny_models.gains(model, "first")


@pytest.fixture
def saved(tmp_path):
    """Two adapters on disk, and what each computes."""
    outputs = []
    for seed in (5, 6):
        model = tiny_models.randomise(get_peft_model(tiny_models.llama(), GainConfig(ffn=True)), seed=seed).eval()
        outputs.append(logits(model))
        model.save_pretrained(tmp_path / str(seed))
    return tmp_path / "5", tmp_path / "6", *outputs


def test_hot_swap_replaces_the_values(saved):
    first, second, _, expected = saved
    model = PeftModel.from_pretrained(tiny_models.llama(), first)
    before = {name: id(p) for name, p in tiny_models.gains(model).items()}
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(input_ids=IDS)
    hotswap_adapter(compiled, second, adapter_name="default")
    assert torch.equal(logits(model), expected)
    assert {name: id(p) for name, p in tiny_models.gains(model).items()} == before


def test_hot_swap_of_a_smaller_adapter_resets_the_rest(saved, tmp_path):
    first, *_ = saved
    small = tiny_models.randomise(get_peft_model(tiny_models.llama(), GainConfig()), seed=7).eval()
    small.save_pretrained(tmp_path / "small")
    model = PeftModel.from_pretrained(tiny_models.llama(), first)
    hotswap_adapter(model, tmp_path / "small", adapter_name="default")
    assert torch.equal(logits(model), logits(small))


def test_hot_swap_refuses_other_layers_and_merged_adapters(saved, tmp_path):
    first, second, *_ = saved
    model = get_peft_model(tiny_models.llama(), GainConfig())
    before = logits(model)
    with pytest.raises(AdapterError, match=r"down_proj\.gain_v"):
        hotswap_adapter(model, first, adapter_name="default")
    assert torch.equal(logits(model), before)
    merged = PeftModel.from_pretrained(tiny_models.llama(), first)
    merged.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        hotswap_adapter(merged, second, adapter_name="default")


def test_hot_swap_of_lora_still_works(tmp_path):
    config = LoraConfig(target_modules=["o_proj"], init_lora_weights=False)
    other = get_peft_model(tiny_models.llama(), config).eval()
    other.save_pretrained(tmp_path)
    model = get_peft_model(tiny_models.llama(), config).eval()
    hotswap_adapter(model, tmp_path, adapter_name="default")
    torch.testing.assert_close(logits(model), logits(other))


def test_mixing_with_other_methods_in_one_mixed_model_is_refused():
    with pytest.raises(ValueError, match="not compatible"):
        get_peft_model(tiny_models.llama(), GainConfig(), mixed=True)


def test_layers_are_gain_layers():
    model = two_adapters()
    layers = [module for module in model.modules() if isinstance(module, GainLayer)]
    assert len(layers) == 4
    assert repr(layers[0]).startswith("gain.GainLinear")
