"""L2 and EWC: the Fisher estimate and both gradients against references, and strength 0 against plain training."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from gaintune.config import MethodConfig, ModelConfig, TrainConfig
from gaintune.data import IGNORED, Examples
from gaintune.errors import AdapterError, ConfigError
from gaintune.methods import StageData, StagePosition, attach, prepare_method
from gaintune.methods.penalties import FISHER, STRENGTHS, fisher_information, penalty_of, strength_of
from gaintune.models import NextTokenLoss
from gaintune.storage import damage, read_json
from gaintune.training import train_stage
from gaintune.workflows import adapt, run_sequence
from support import refused, tiny_base, tiny_domains

LORA = {"name": "lora", "rank": 2, "lr": 0.05}
HALF = {"train_tokens": 512}  # four updates a domain


def method(**more) -> MethodConfig:
    return MethodConfig.model_validate({**LORA, **more})


def trained(model):
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def adapted(config=None, dtype=torch.float32):
    """A tiny model whose adapter is not at its start any more."""
    model = attach(tiny_base.model().to(dtype), config or method(), seed=0)
    torch.manual_seed(1)
    with torch.no_grad():
        for value in trained(model).values():
            value.add_(0.05 * torch.randn_like(value))
    return model.to(dtype)


def stage_data_of(model, examples) -> StageData:
    return StageData(examples, NextTokenLoss(model), "looking")


@pytest.mark.parametrize("name", ["lora", "gain-ffn", "full"])
def test_the_fisher_estimate_is_the_mean_of_squared_gradients_of_single_rows(name):
    config = method() if name == "lora" else MethodConfig(name=name)
    blocks = tiny_base.blocks(5, 12)
    labels = blocks.clone()
    labels[0, :7] = IGNORED  # rows of unequal weight
    model = adapted(config)
    found = fisher_information(model, stage_data_of(model, Examples(blocks, labels)))
    twin = adapted(config).double().eval()
    weights = trained(twin)
    expected = {key: torch.zeros_like(value) for key, value in weights.items()}
    for row, target in zip(blocks, labels, strict=True):
        logs = twin(row.unsqueeze(0)).logits[0, :-1].log_softmax(-1)
        scored = [position for position in range(11) if target[position + 1] != IGNORED]
        log_p = sum(logs[position, row[position + 1]] for position in scored)
        for key, gradient in zip(weights, torch.autograd.grad(log_p, weights.values()), strict=True):
            expected[key] += gradient**2 / len(scored) / 5
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key].double(), value.double(), rtol=2e-3, atol=1e-5 * value.max().item())


def test_the_fisher_estimate_is_without_dropout_repeatable_and_leaves_the_model_alone():
    model = adapted(MethodConfig(name="full"))
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    stage_data = stage_data_of(model, Examples.of_blocks(tiny_base.blocks(4, 12)))
    model.train()
    weights = trained(model)
    first, again = fisher_information(model, stage_data), fisher_information(model, stage_data)
    assert all(torch.equal(first[name], again[name]) for name in first) and model.training
    assert all(value.grad is None for value in weights.values())
    some, same, others = (fisher_information(model, stage_data, rows=2, seed=seed) for seed in (0, 0, 3))
    assert all(torch.equal(some[name], same[name]) for name in some)
    assert any(not torch.equal(some[name], others[name]) for name in some)


@pytest.mark.parametrize("penalty", ["l2", "ewc"])
def test_the_pull_is_the_gradient_of_the_penalty(tmp_path, penalty):
    strength = 0.7
    config = method(penalty=penalty, penalty_strength=strength)
    model = adapted()
    first = penalty_of(config, StagePosition(), seed=0)
    first.start(model, 1)
    first.before_update(model, 0)
    assert all(value.grad is None for value in trained(model).values())  # nothing to stay near to yet
    rows = [Examples.of_blocks(tiny_base.blocks(4, 12, seed=seed)) for seed in (0, 1)]
    first.finish(model, stage_data_of(model, rows[0]))
    first.keep(tmp_path)
    second = penalty_of(config, StagePosition(previous=tmp_path), seed=0)
    second.start(model, 1)
    anchor = {name: value.detach().clone() for name, value in trained(model).items()}
    fisher = fisher_information(model, stage_data_of(model, rows[0])) if penalty == "ewc" else None
    with torch.no_grad():
        for value in trained(model).values():
            value.add_(0.1 * torch.randn_like(value))
    for value in trained(model).values():
        value.grad = torch.ones_like(value)
    second.before_update(model, 0)
    weight = {name: torch.ones_like(value) if fisher is None else fisher[name] for name, value in anchor.items()}
    loose = {name: value.detach().clone().requires_grad_() for name, value in trained(model).items()}
    term = sum((0.5 * strength * weight[name] * (loose[name] - anchor[name]) ** 2).sum() for name in anchor)
    gradients = torch.autograd.grad(term, list(loose.values()))
    for (name, value), gradient in zip(trained(model).items(), gradients, strict=True):
        torch.testing.assert_close(value.grad, 1 + gradient, rtol=1e-5, atol=1e-7, msg=name)
    if fisher is None:
        return
    second.finish(model, stage_data_of(model, rows[1]))  # the information of both domains goes on
    (tmp_path / "second").mkdir()
    second.keep(tmp_path / "second")
    new = fisher_information(model, stage_data_of(model, rows[1]))
    for name, value in load_file(tmp_path / "second" / FISHER).items():
        torch.testing.assert_close(value, fisher[name] + new[name], rtol=1e-6, atol=0, msg=name)


@pytest.mark.parametrize("penalty", ["l2", "ewc"])
def test_a_strong_pull_holds_the_weights_and_a_weak_one_lets_them_go(tmp_path, penalty):
    rows, moved = Examples.of_blocks(tiny_base.blocks(8, 16)), []
    for strength in (0.0, 1e6):
        config = method(penalty=penalty, penalty_strength=strength)
        model = adapted()
        folder = tmp_path / str(strength)
        folder.mkdir()
        before = {name: value.detach().clone() for name, value in trained(model).items()}
        if strength:
            rule = penalty_of(config, StagePosition(), seed=0)
            rule.start(model, 1)
            rule.finish(model, stage_data_of(model, rows))
            rule.keep(folder)
        plan = TrainConfig(epochs=20, schedule="cosine", batch_size=8)
        prepared = prepare_method(config, ModelConfig(dtype="fp32", device="cpu"), plan)
        train_stage(model, prepared, rows, plan, StagePosition(previous=folder), checkpoints=folder / "checkpoints")
        with torch.no_grad():
            moved.append(sum(float((value - before[name]).norm()) for name, value in trained(model).items()))
    assert moved[1] < 0.6 * moved[0]


def test_strengths_and_what_is_not_a_penalty():
    assert strength_of(method()) == 0 and strength_of(method(penalty="ewc")) == STRENGTHS["ewc"] == 1.0
    assert penalty_of(method(penalty="ewc", penalty_strength=0), StagePosition(), seed=0) is None
    for wrong in ({"penalty": "l1"}, {"penalty_strength": 1.0}, {"penalty": "l2", "ewc_rows": 4}, {"replay": -1}):
        with pytest.raises(ValueError):
            method(**wrong)
    labels = [method(**more).label for more in ({}, {"penalty": "ewc"}, {"penalty": "l2", "replay": 0.5})]
    assert labels == ["lora", "lora-ewc", "lora-l2-replay"]


def test_the_earlier_information_lies_where_each_weight_does(tmp_path):
    model = torch.nn.Module()
    model.near = torch.nn.Parameter(torch.zeros(2))
    model.far = torch.nn.Parameter(torch.zeros(3, device="meta"))  # any other device
    save_file({"near": torch.ones(2), "far": torch.ones(3)}, tmp_path / FISHER)
    rule = penalty_of(method(penalty="ewc"), StagePosition(previous=tmp_path), seed=0)
    rule.start(model, steps=1)
    rule.before_update(model, 0)
    assert (model.near.grad.device.type, model.far.grad.device.type) == ("cpu", "meta")


def test_strength_0_and_replay_0_give_the_bytes_of_plain_training(tiny, tmp_path):
    train = {"weight_decay": 0.1}
    methods = [
        LORA,
        {**LORA, "label": "l2", "penalty": "l2", "penalty_strength": 0},
        {**LORA, "label": "ewc", "penalty": "ewc", "penalty_strength": 0},
        {**LORA, "label": "replay", "replay": 0},
        {**LORA, "label": "pulled", "penalty": "l2", "penalty_strength": 0.5},
    ]
    run_sequence(tiny_domains.plan(tiny, tmp_path, methods=methods, train=train, data=HALF), tmp_path / "run")

    def results(label):
        folder = tmp_path / "run" / "stages" / label
        files = [*folder.rglob("*.safetensors"), *folder.rglob("evaluations/*.json"), *folder.rglob("training.json")]
        return {str(file.relative_to(folder)): file.read_bytes() for file in files}

    plain = results("lora")
    assert len(plain) == 2 + 4 + 2
    for label in ("l2", "ewc", "replay"):
        assert results(label) == plain
    pulled = results("pulled")
    adapter = "adapter/adapter_model.safetensors"
    assert pulled[f"01-prose/{adapter}"] == plain[f"01-prose/{adapter}"]  # the first domain has nothing to stay near to
    assert pulled[f"02-code/{adapter}"] != plain[f"02-code/{adapter}"]


def test_a_single_adaptation_finds_the_earlier_information_beside_its_start(tiny, tmp_path):
    both = tiny_domains.plan(tiny, tmp_path, methods=[{**LORA, "penalty": "ewc", "penalty_strength": 1e4}], data=HALF)
    prose, code = (tiny_domains.of(both, name) for name in ("prose", "code"))
    run_sequence(both, tmp_path / "run")
    adapt(prose, tmp_path / "first")
    assert damage(tmp_path / "first") is None
    adapt(code, tmp_path / "second", start=tmp_path / "first")
    stages = tmp_path / "run" / "stages" / "lora-ewc"
    for own, theirs in (("first", "01-prose"), ("second", "02-code")):
        for file in (FISHER, "adapter_model.safetensors"):
            assert (tmp_path / own / file).read_bytes() == (stages / theirs / "adapter" / file).read_bytes(), file
    settings = read_json(tmp_path / "second" / "gaintune.json")["settings"]["method"]
    assert (settings["penalty"], settings["penalty_strength"]) == ("ewc", 1e4)
    adapt({**prose, "methods": [LORA]}, tmp_path / "plain")
    with pytest.raises(ConfigError, match=r"plain has no penalty\.safetensors: it was not trained with penalty=ewc"):
        adapt(code, tmp_path / "third", start=tmp_path / "plain")
    (tmp_path / "first" / FISHER).write_bytes(b"")
    refused(AdapterError, "cut short or changed", adapt, code, tmp_path / "third", start=tmp_path / "first")


def test_a_single_adaptation_replays_the_domains_it_is_given(tiny, tmp_path):
    both = tiny_domains.plan(tiny, tmp_path, methods=[{**LORA, "replay": 0.5}], data=HALF)
    prose, code = (tiny_domains.of(both, name) for name in ("prose", "code"))
    run_sequence(both, tmp_path / "run")
    stages = tmp_path / "run" / "stages" / "lora-replay"
    tokens = [read_json(stages / stage / "metrics.json")["tokens"] for stage in ("01-prose", "02-code")]
    assert tokens == [16 * 32, 24 * 32]
    adapt({**prose, "methods": [LORA]}, tmp_path / "first")
    adapt(both, tmp_path / "second", start=tmp_path / "first")
    ours = (tmp_path / "second" / "adapter_model.safetensors").read_bytes()
    assert ours == (stages / "02-code" / "adapter" / "adapter_model.safetensors").read_bytes()
    assert read_json(tmp_path / "second" / "gaintune.json")["domains"] == ["prose", "code"]
    with pytest.raises(ConfigError, match=r"which .*first was trained: give those.*\(--domain prose --domain code\)"):
        adapt(code, tmp_path / "third", start=tmp_path / "first")
    refused(ConfigError, "replay mixes in rows of earlier domains: give --start", adapt, code, tmp_path / "third")
    turned = {**both, "data": {**both["data"], "domains": both["data"]["domains"][::-1]}}
    with pytest.raises(ConfigError, match="first was trained on prose, not on code"):
        adapt(turned, tmp_path / "third", start=tmp_path / "first")
