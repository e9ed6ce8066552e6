"""Every method of the catalogue: starts at the base, learns, is saved and loaded exactly, has the size it should."""

import math

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from peft.tuners.osf.layer import OSFLayer
from transformers import GPT2Config, GPT2LMHeadModel, RobertaForSequenceClassification

from gaintune.adapters import absorb, load_adapter, save_adapter
from gaintune.config import MethodConfig, ModelConfig, TrainConfig
from gaintune.data import Examples
from gaintune.errors import ConfigError
from gaintune.methods import (
    METHODS,
    StageData,
    StagePosition,
    attach,
    check_method,
    prepare_method,
    trainable_parameters,
)
from gaintune.methods.branches import BranchGrowth, input_grams
from gaintune.methods.rules import STATE, BudgetSchedule
from gaintune.models import NextTokenLoss
from gaintune.training import train_stage
from gaintune.tuners import GATES, parameter_groups
from gaintune.tuners.gainlora import gainlora_layers
from support import tiny_base, tiny_encoders
from support.tiny_adapters import base_of, record_of

D, FFN, LAYERS, KV = 32, 48, 2, 16
LINEARS = [(D, D), (D, KV), (D, KV), (D, D), (D, FFN), (D, FFN), (FFN, D)]  # (in, out) of q k v o gate up down
SIDES = sum(sum(shape) for shape in LINEARS)
OUTS = sum(out for _, out in LINEARS)
HALVES = sum(min(shape) // 2 * (sum(shape) + 1) for shape in LINEARS)
GATE_INPUTS = sum(inputs for inputs, _ in LINEARS)
GATE = GATE_INPUTS + len(LINEARS)  # of one rank
METHOD = {  # the name, after which a case may say more -> options and the count of trained numbers
    "gain": ({}, LAYERS * D),
    "gain-ffn": ({}, LAYERS * (D + FFN)),
    "gain-ia3": ({}, LAYERS * (D + FFN + KV + KV)),
    "ia3": ({}, LAYERS * (KV + KV + FFN)),
    "lora": ({"rank": 2}, LAYERS * 2 * 2 * D),
    "lora+": ({"rank": 2}, LAYERS * 2 * 2 * D),
    "dora": ({"rank": 2}, LAYERS * (2 * 2 * D + D)),
    "pissa": ({"rank": 2}, LAYERS * 2 * 2 * D),
    "adalora": ({"rank": 2}, LAYERS * 3 * (SIDES + len(LINEARS))),
    "hira": ({"rank": 2, "lr": 0.02}, LAYERS * 2 * SIDES),
    "vera": ({"rank": 8}, LAYERS * (OUTS + 8 * len(LINEARS))),
    "osf": ({"lr": 0.005}, LAYERS * HALVES),
    "disel": ({}, LAYERS * 8 * (SIDES + GATE)),
    "disel of rank 2": ({"rank": 2}, LAYERS * 2 * (SIDES + GATE)),
    "disel with gates of rank 3":
        ({"gate_rank": 3}, LAYERS * (8 * SIDES + 3 * GATE_INPUTS + (8 * 3 + 8) * len(LINEARS))),
    "gated-lora": ({}, LAYERS * 8 * SIDES),
    "svft": ({"lr": 0.2}, LAYERS * D),
    "svft with a band": ({"lr": 0.2, "off_diagonals": 2}, LAYERS * (D + 2 * (D - 1) + 2 * (D - 2))),
    "gainlora": ({"lr": 0.02}, LAYERS * (8 * 2 * D + D)),
    "lora-ga": ({"rank": 2}, LAYERS * 2 * 2 * 2 * D),
    "corda": ({"rank": 2}, LAYERS * 2 * 2 * 2 * D),
    "eva": ({"rank": 2}, LAYERS * 2 * 2 * D),
}  # fmt: skip
REBUILT = {"pissa", "osf", "lora-ga", "corda"}  # these rebuild the weight from parts, within rounding
EXACT_AT_START = set(METHOD) - REBUILT


def method_of(case, **more) -> MethodConfig:
    return MethodConfig.model_validate({"name": case.partition(" ")[0], **METHOD[case][0], **more})


def attached(model, method):
    return attach(model, method, seed=0, rows=Examples.of_blocks(tiny_base.blocks(4, 16)))


def logits(model) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(tiny_base.blocks(2, 16, seed=9)).logits


def train(model, method, checkpoints, steps=6, position=None):
    plan = TrainConfig(batch_size=4, epochs=steps, lr=method.lr or 0.02, checkpoint_steps=100)
    rows = Examples.of_blocks(tiny_base.blocks(4, 16))
    prepared = prepare_method(method, ModelConfig(device="cpu", dtype="fp32"), plan)
    return train_stage(model, prepared, rows, plan, position or StagePosition(), checkpoints=checkpoints)


def test_the_table_above_holds_every_method():
    assert {method_of(case).name for case in METHOD} == set(METHODS) - {"full"}  # tested in test_train, test_sequence


@pytest.mark.parametrize("name", METHOD)
def test_a_method_starts_at_the_base_learns_and_is_loaded_as_it_was(tiny, tmp_path, name):
    method, base = method_of(name), base_of(tiny, "fp32")
    before, model = logits(base.model), attached(base.model, method)
    assert trainable_parameters(model) == METHOD[name][1]
    if name in EXACT_AT_START:
        assert torch.equal(logits(model), before)
    else:
        torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    trained = train(model, method, tmp_path / "checkpoints")
    losses = trained.losses
    assert losses[-1] < losses[0] - 0.01, losses
    record = record_of(base, method.name)
    save_adapter(model, tmp_path / "adapter", record, keep=trained.keep)
    expected = logits(model)
    assert not torch.allclose(expected, before, atol=1e-3)
    again = load_adapter(base_of(tiny, "fp32"), tmp_path / "adapter", trainable=True)
    assert torch.equal(logits(again), expected) and trainable_parameters(again) == METHOD[name][1]
    if METHODS[method.name].merges and not METHODS[method.name].gates:
        merged = absorb(base_of(tiny, "fp32"), tmp_path / "adapter", torch.float32)[0]
        torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    save_adapter(again, tmp_path / "again", record)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "adapter" / file).read_bytes(), file


@pytest.mark.parametrize("name", METHOD)
def test_a_bf16_base_keeps_its_numbers_and_the_adapter_trains_in_fp32(tiny, tmp_path, name):
    model = attached(base_of(tiny, "bf16").model, method_of(name))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert all(map(math.isfinite, train(model, method_of(name), tmp_path, steps=3).losses))


def test_the_seed_draws_vera_s_matrices(tiny):
    made = [attach(base_of(tiny, "fp32").model, method_of("vera"), seed=seed).base_model for seed in (0, 0, 1)]
    first, same, other = (model.vera_A["default"] for model in made)
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_lora_plus_trains_b_at_its_multiple_of_the_rate(tiny, tmp_path):
    assert METHODS["lora"].rates(method_of("lora")) == {}
    assert METHODS["lora+"].rates(method_of("lora+")) == {"lora_B": 16.0}
    slow, fast = 1e-3, 8.0
    moved = {}
    for name, more in (("lora", {}), ("lora+", {"lr_ratio": fast})):
        method = method_of(name, lr=slow, **more)
        model = attach(base_of(tiny, "fp32").model, method, seed=0)
        train(model, method, tmp_path / name, steps=1)
        moved[name] = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_B" in n}
    for name, value in moved["lora"].items():  # AdamW's first update is the rate times a sign, whatever the gradient
        torch.testing.assert_close(moved["lora+"][name], fast * value, rtol=1e-4, atol=1e-9)


def test_adalora_s_term_has_the_gradient_of_the_one_in_peft_s_loss(tiny):
    method = method_of("adalora", orthogonality=0.3)
    model = attach(base_of(tiny, "fp32").model, method, seed=0)
    blocks = tiny_base.blocks(2, 16)

    def gradients(weight, ours):
        model.zero_grad()
        model.peft_config["default"].orth_reg_weight = weight
        model(input_ids=blocks, labels=blocks).loss.backward()
        if ours:
            rule = BudgetSchedule(method, StagePosition())
            rule.start(model, steps=10)
            rule.before_update(model, 0)
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}

    theirs, without = gradients(0.3, ours=False), gradients(0.0, ours=False)
    ours = gradients(0.0, ours=True)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-7, msg=name)
    assert any(not torch.allclose(theirs[name], without[name], atol=1e-5) for name in theirs)


def test_adalora_s_budget_follows_the_schedule_over_two_stages(tiny, tmp_path):
    method = method_of("adalora")
    matrices, target, start = LAYERS * len(LINEARS), 2, 3
    model = attach(base_of(tiny, "fp32").model, method, seed=0)
    first = train(model, method, tmp_path / "a", steps=10, position=StagePosition(total=20))
    kept = [int((p != 0).sum()) for n, p in model.named_parameters() if "lora_E" in n]
    # budget at step 9 of 20: warm-up of 2, last 6 fixed, cubic in between
    expected = int((start - target) * matrices * (1 - (9 - 2) / 12) ** 3 + target * matrices)
    assert sum(kept) == expected < start * matrices
    base = base_of(tiny, "fp32")
    save_adapter(model, tmp_path / "first", record_of(base, "adalora"), keep=first.keep)
    assert (tmp_path / "first" / STATE).is_file()
    position = StagePosition(previous=tmp_path / "first", first=10, total=20)
    carried = BudgetSchedule(method, position)
    carried.start(model, steps=10)
    (tmp_path / "carried").mkdir()
    carried.save(tmp_path / "carried")
    assert (tmp_path / "carried" / STATE).read_bytes() == (tmp_path / "first" / STATE).read_bytes()
    train(model, method, tmp_path / "b", steps=10, position=position)
    kept = [int((p != 0).sum()) for n, p in model.named_parameters() if "lora_E" in n]
    assert sum(kept) == target * matrices
    assert len(set(kept)) > 1  # some matrices have more than others: that is what it is for
    again = load_adapter(base, tmp_path / "first", trainable=True)
    train(again, method, tmp_path / "c", steps=10, position=position)
    assert torch.equal(logits(again), logits(model))


def test_peft_s_own_schedule_prunes_the_same_directions(tiny, tmp_path):
    """The driver changes nothing about PEFT's allocation: a plain loop over PEFT's documented calls ends alike."""
    method = method_of("adalora", orthogonality=0.0)
    ours = attach(base_of(tiny, "fp32").model, method, seed=0)
    train(ours, method, tmp_path, steps=10)
    schedule = {"tinit": 1, "tfinal": 3, "total_step": 10, "orth_reg_weight": 0.0, "deltaT": 1}
    config = AdaLoraConfig(
        target_r=2, init_r=3, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM", **schedule
    )
    torch.manual_seed(0)
    theirs = get_peft_model(base_of(tiny, "fp32").model, config)
    with torch.no_grad():
        start = dict(attach(base_of(tiny, "fp32").model, method, seed=0).named_parameters())
        for name, parameter in theirs.named_parameters():
            parameter.copy_(start[name])
    trained = [p for p in theirs.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.02, weight_decay=0.0)
    blocks = tiny_base.blocks(4, 16)
    for step in range(10):
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * (0.5 if step == 0 else 1.0)  # our warm-up of one update
        theirs(input_ids=blocks, labels=blocks).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        theirs.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    found = dict(ours.named_parameters())
    for name, value in theirs.named_parameters():
        if "lora_E" in name:
            assert torch.equal(found[name] == 0, value == 0), name


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_osf_s_gradients_stay_out_of_the_preserved_directions(tiny, tmp_path, dtype):
    method, base = method_of("osf"), base_of(tiny, dtype)
    whole = {n: m.weight.float() for n, m in base.model.named_modules() if isinstance(m, torch.nn.Linear)}
    model = attach(base.model, method, seed=0)
    train(model, method, tmp_path, steps=1)  # hangs the hooks
    model.train()
    model.zero_grad()
    blocks = tiny_base.blocks(2, 16)
    model(input_ids=blocks, labels=blocks).loss.backward()
    layers = [(n, m) for n, m in model.base_model.model.named_modules() if isinstance(m, OSFLayer)]
    assert len(layers) == LAYERS * len(LINEARS)
    for name, layer in layers:
        left, _, right = torch.linalg.svd(whole[name], full_matrices=False)
        half = min(whole[name].shape) // 2
        for part, high in (("U_low", left[:, :half].T), ("V_low", right[:half].T)):
            gradient = layer.osf_svd_params["default"][part].grad
            leaked = (high @ gradient) if part == "U_low" else (gradient @ high)
            assert leaked.norm() < (1e-4 if dtype == "fp32" else 0.05) * gradient.norm(), (name, part)


def test_intruder_dimensions_are_shrunk_after_training_as_in_float64(tiny, tmp_path):
    share, rank, trained = 0.25, 4, {}
    base = base_of(tiny, "fp32").model
    for kept in (None, share):
        method = MethodConfig(name="lora", rank=rank, lr=0.2, intruders=kept)
        model = attach(base_of(tiny, "fp32").model, method, seed=0)
        train(model, method, tmp_path / str(kept), steps=20)
        assert set(model.peft_config) == {"default"} and trainable_parameters(model) == LAYERS * 2 * rank * D
        layers = [layer.self_attn.o_proj for layer in model.base_model.model.model.layers]
        trained[kept] = [layer.get_delta_weight("default").detach().double() for layer in layers]
    intruders = 0
    for layer, (plain, reduced) in enumerate(zip(trained[None], trained[share], strict=True)):
        weight = base.model.layers[layer].self_attn.o_proj.weight.detach().double()
        u, s, vh = torch.linalg.svd(weight + plain)
        near = (u.T @ torch.linalg.svd(weight).U).abs().amax(dim=1)
        odd = [index for index in range(10) if near[index] < 0.5]
        intruders += len(odd)
        wanted = plain - (1 - share) * (u[:, odd] * s[odd]) @ vh[odd]
        u, s, vh = torch.linalg.svd(wanted)
        expected = (u[:, :rank] * s[:rank]) @ vh[:rank] if odd else plain  # what the adapter's rank can hold of it
        torch.testing.assert_close(reduced, expected, rtol=1e-3, atol=1e-3)
    assert intruders
    for other in ({"name": "dora"}, {"name": "lora", "config": {"use_dora": True}}):
        with pytest.raises(ConfigError, match="has no option 'intruders'"):
            check_method(MethodConfig(**other, intruders=0.5))


def test_options_of_gates_reach_the_adapter_and_the_optimizer():
    options = {"rank": 4, "alpha": 3, "gate_bias": -7, "gate_lr_ratio": 2, "gate_rank": 2, "targets": ("o_proj",)}
    method = MethodConfig(name="disel", **options)
    model = attach(tiny_base.model(), method, seed=0)
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.gate_bias_init, config.gate_rank) == (4, 3, -7, 2)
    assert config.target_modules == {"o_proj"}
    for multipliers in (METHODS[method.name].rates(method), None):
        groups = parameter_groups(model, 0.01, 0.1, multipliers)
        assert {(group["lr"], group["weight_decay"]) for group in groups if "lora_G" in group["name"]} == {(0.02, 0.0)}
    assert attach(tiny_base.model(), MethodConfig(name="disel"), seed=0).peft_config["default"].gate_lr_ratio == 5.0


def test_the_gates_rate_may_be_given_by_itself():
    method = MethodConfig(name="disel", lr=0.002, gate_lr=0.0005)
    prepared = prepare_method(method, ModelConfig(device="cpu"), TrainConfig())
    model = attach(tiny_base.model(), prepared.config, seed=0)
    groups = parameter_groups(model, prepared.lr, 0.0, prepared.rate_multipliers)
    rates = {group["lr"] for group in groups if "lora_G" in group["name"]}
    assert list(rates) == pytest.approx([0.0005])
    assert model.peft_config["default"].gate_lr_ratio == pytest.approx(0.25), "other trainers read the ratio"
    plans = prepare_method(method.model_copy(update={"lr": None}), ModelConfig(device="cpu"), TrainConfig(lr=0.001))
    assert plans.rate_multipliers == {GATES: pytest.approx(0.5)}, "of the rate that the plan gives"
    assert "gate_lr" not in MethodConfig(name="disel").model_dump()
    with pytest.raises(ValueError, match="gate_lr and gate_lr_ratio both set"):
        MethodConfig(name="disel", gate_lr=0.1, gate_lr_ratio=2)
    with pytest.raises(ConfigError, match="has no option 'gate_lr'"):
        check_method(MethodConfig(name="lora", gate_lr=0.1))


ALL, RANKED = "all-linear", ("lora", "pissa", "adalora", "disel")


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2))


@pytest.mark.parametrize(("name", "targets", "build", "message"), [
    *((name, ALL, tiny_base.model, r".* every .*\.[a-z_]+ \(32 x 32\): .* at most 32") for name in RANKED),
    ("hira", None, tiny_base.model, r".* every .*\.[a-z_]+ \(32 x 32\): .* at most 32"),
    ("lora", None, tiny_base.model, r".*o_proj \(32 x 32\)"),
    ("lora", None, gpt2, r".*c_proj \(16 x 16\)"),
])  # fmt: skip
def test_a_rank_that_no_weight_has_is_refused(name, targets, build, message):
    with pytest.raises(ConfigError, match=f"rank 10000 is more than{message}"):
        attach(build(), MethodConfig(name=name, rank=10_000, targets=targets), seed=0)


def test_a_rank_that_some_weights_lack_is_named(caplog):
    attach(tiny_base.model(), MethodConfig(name="lora", rank=20, targets=ALL), seed=0)
    warning = "method 'lora': rank 20 is more than the smaller side of 4 of 14 weights it adapts, such as"
    assert f"{warning} model.layers.0.self_attn.k_proj (16 x 32)" in caplog.text
    caplog.clear()
    attach(tiny_base.model(), MethodConfig(name="lora", rank=16, targets=ALL), seed=0)
    attach(tiny_base.model(), MethodConfig(name="vera", rank=64), seed=0)
    classifier = RobertaForSequenceClassification(tiny_encoders.CONFIGS["roberta"]())
    lora = MethodConfig(name="lora", rank=16, targets=ALL)
    attach(classifier, lora, seed=0, task_type="SEQ_CLS", head=["classifier"])  # (2 x 32), but not adapted
    assert not caplog.text


def test_what_a_method_cannot_do_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="at least two updates"):
        train(attach(tiny_base.model(), method_of("adalora"), seed=0), method_of("adalora"), tmp_path, steps=1)
    quantized = ModelConfig(quantization="4bit", dtype="bf16", device="cpu")
    for name in ("pissa", "osf", "svft", "full"):
        with pytest.raises(ConfigError, match=f"method '{name}' works on the base's own weights"):
            prepare_method(MethodConfig(name=name), quantized, TrainConfig())
    no_options = [("lora", "lr_ratio"), *(("gated-lora", key) for key in ("gate_bias", "gate_lr_ratio", "gate_rank"))]
    for name, option in no_options:
        with pytest.raises(ConfigError, match=f"method '{name}' has no option '{option}'"):
            check_method(MethodConfig.model_validate({"name": name, option: 1}))
    with pytest.raises(ConfigError, match=r"has no form for transformer\.h\.0\.attn\.c_attn \(Conv1D\)"):
        attach(gpt2(), MethodConfig(name="osf"), seed=0)


def test_a_branch_needs_the_directions_of_earlier_inputs_and_takes_no_penalty(tiny, tmp_path):
    with pytest.raises(ConfigError, match=r"has no gainlora\.safetensors, without which its next branch"):
        BranchGrowth(method_of("gainlora"), StagePosition(previous=tmp_path))
    with pytest.raises(ConfigError, match="a penalty has nothing to pull back: leave penalty=l2 out"):
        BranchGrowth(method_of("gainlora", penalty="l2"), StagePosition())


def test_directions_are_those_of_the_tokens_that_are_no_padding(tiny):
    """A padded row and the same row without its padding have the same second moments."""
    model = attach(tiny_base.model(), method_of("gainlora"), seed=0)
    layers = dict(gainlora_layers(model, "default"))
    ids = tiny_base.blocks(1, 12)[0]
    padded = torch.cat([ids, ids.new_zeros(5)])
    rows = [
        {"input_ids": ids, "labels": ids},
        {"input_ids": padded, "labels": padded, "attention_mask": (torch.arange(17) < 12).long()},
    ]
    grams = [input_grams(layers, model, StageData(Listed([row]), NextTokenLoss(model), "t")) for row in rows]
    for name, layer in layers.items():
        torch.testing.assert_close(grams[1][name], grams[0][name], rtol=1e-4, atol=1e-4)
        assert grams[0][name].trace().item() == pytest.approx(12 * layer.in_features, rel=0.01)


class Listed(list):
    """Rows in a list, counted in tokens."""

    @property
    def tokens(self):
        return sum(len(row["input_ids"]) for row in self)
