"""Starts that are computed from training rows: they are the papers', survive a kill, and leave the base alone."""

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch.nn import functional as F

from gaintune.adapters import load_adapter, save_adapter
from gaintune.config import MethodConfig, ModelConfig, TrainConfig
from gaintune.data import Examples
from gaintune.errors import ConfigError
from gaintune.methods import StagePosition, attach, prepare_method
from gaintune.training import train_stage
from gaintune.workflows import adapt, run_sequence
from support import refused, tiny_base, tiny_domains
from support.files import contents
from support.killing import killed
from support.tiny_adapters import base_of, record_of

NAMES, FROZEN = ("lora-ga", "corda", "eva"), ("lora-ga", "corda")
RANK = 3


def rows(count: int = 16, seed: int = 0) -> Examples:
    return Examples.of_blocks(tiny_base.blocks(count, 16, seed=seed))


def attached(model, name, seed=0, data=None, **more):
    return attach(model, MethodConfig(name=name, rank=RANK, **more), seed=seed, rows=data or rows())


def factors(model) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The start of every adapted output projection, in float64."""
    layers = [layer.self_attn.o_proj for layer in model.base_model.model.model.layers]
    pairs = [(layer.lora_A["default"].weight, layer.lora_B["default"].weight) for layer in layers]
    return [(a.detach()[:RANK].double(), b.detach()[:, :RANK].double()) for a, b in pairs]


def share_inside(vectors: torch.Tensor, directions: torch.Tensor) -> float:
    """The share of the vectors' squared length that lies in the span of orthonormal directions; both are rows."""
    return float((vectors @ directions.T).square().sum() / vectors.square().sum())


def inputs_of(model, blocks) -> list[torch.Tensor]:
    """What every output projection reads, `(tokens, features)`, in float64."""
    kept: list[torch.Tensor] = []
    hooks = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, given: kept.append(given[0].flatten(0, 1).double()))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(blocks)
    for hook in hooks:
        hook.remove()
    return kept


def test_eva_starts_at_the_main_directions_of_the_inputs():
    adapted = attached(tiny_base.model(), "eva", config={"eva_config": {"rho": 1.0}})
    for (a, b), states in zip(factors(adapted), inputs_of(tiny_base.model(), rows().input_ids), strict=True):
        directions = torch.linalg.svd(states - states.mean(0), full_matrices=False).Vh
        assert share_inside(a, directions[: 2 * RANK]) > 0.9 > 0.5 > share_inside(a, directions[-2 * RANK :])
        assert not b.any()


def test_eva_may_leave_modules_without_a_rank_and_the_adapter_loads_as_it_is(tmp_path):
    adapted = attach(tiny_base.model(), MethodConfig(name="eva", targets="all-linear"), seed=0, rows=rows())
    names = [name for name, module in adapted.named_modules() if isinstance(module, LoraLayer)]
    assert 0 < len(names) < 14, "two layers of seven linear modules"
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_base.model(), tmp_path)
    assert [name for name, module in loaded.named_modules() if isinstance(module, LoraLayer)] == names
    blocks = tiny_base.blocks(2, 16)
    assert torch.equal(loaded(blocks).logits, adapted.eval()(blocks).logits)


def test_corda_starts_at_the_parts_of_a_weight_that_act_most_on_its_inputs():
    base = tiny_base.model()
    weights = [layer.self_attn.o_proj.weight.detach().double() for layer in base.model.layers]
    states = [torch.stack([inputs_of(base, row[None])[layer] for row in rows().input_ids]) for layer in range(2)]
    for (a, b), weight, read in zip(factors(attached(tiny_base.model(), "corda")), weights, states, strict=True):
        scaled = read / read.amax(dim=(1, 2), keepdim=True).abs()  # a row of texts at a time, as PEFT has it
        covariance = torch.einsum("rti,rtj->ij", scaled, scaled) / len(scaled)
        covariance += 0.01 * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=torch.float64)
        u, s, vh = torch.linalg.svd(weight @ covariance, full_matrices=False)
        part = (u[:, :RANK] * s[:RANK]) @ vh[:RANK] @ torch.linalg.inv(covariance)
        torch.testing.assert_close(2.0 * b @ a, part, rtol=1e-3, atol=1e-3)  # alpha is twice the rank


def test_lora_ga_starts_along_the_gradient():
    base, blocks = tiny_base.model(), rows().input_ids
    weights = [layer.self_attn.o_proj.weight for layer in base.model.layers]
    scores = base(blocks).logits[:, :-1].double()
    gradients = torch.autograd.grad(F.cross_entropy(scores.flatten(0, 1), blocks[:, 1:].flatten()), weights)
    for (a, b), gradient in zip(factors(attached(tiny_base.model(), "lora-ga")), gradients, strict=True):
        u, _, vh = torch.linalg.svd(gradient.double(), full_matrices=False)
        assert share_inside(a, vh[: 2 * RANK]) > 0.999 and share_inside(b.T, u[:, : 2 * RANK].T) > 0.999
        assert share_inside(a, vh[:RANK]) + share_inside(b.T, u[:, :RANK].T) < 1.01  # one takes the larger half


@pytest.mark.parametrize("name", NAMES)
def test_the_start_is_drawn_by_the_seed_from_the_rows_it_gets(name):
    def start(**given):
        return torch.cat([a for a, _ in factors(attached(tiny_base.model(), name, **given))])

    assert torch.equal(start(), start())
    assert not torch.equal(start(), start(data=rows(seed=5)))
    few = start(start_rows=8)
    assert not torch.equal(few, start()) and not torch.equal(few, start(start_rows=8, seed=3))


@pytest.mark.parametrize("name", FROZEN)
def test_the_base_stays_whole_and_the_second_half_never_moves(tiny, tmp_path, name):
    base, untouched = base_of(tiny, "fp32"), base_of(tiny, "fp32")
    model = attached(base.model, name)
    named = dict(untouched.model.named_parameters())
    for key, weight in model.named_parameters():
        if "lora_" not in key:
            plain = key.removeprefix("base_model.model.").replace(".base_layer", "")
            assert torch.equal(weight, named[plain]), key
    before = {key: weight.detach().clone() for key, weight in model.named_parameters() if weight.requires_grad}
    plan = TrainConfig(batch_size=4, lr=0.01, weight_decay=0.1)
    prepared = prepare_method(MethodConfig(name=name, rank=RANK), ModelConfig(device="cpu", dtype="fp32"), plan)
    train_stage(model, prepared, rows(), plan, StagePosition(), checkpoints=tmp_path / "checkpoints")
    for key, weight in model.named_parameters():
        if weight.requires_grad:
            axis = 0 if "lora_A" in key else 1
            (moved, held), (was, start) = weight.chunk(2, axis), before[key].chunk(2, axis)
            assert torch.equal(held, start) and not torch.equal(moved, was), key
    save_adapter(model, tmp_path / "adapter", record_of(base, name))
    with torch.no_grad():
        blocks = tiny_base.blocks(2, 16, seed=9)
        ours = load_adapter(base_of(tiny, "fp32"), tmp_path / "adapter").eval()(blocks).logits
        plain = PeftModel.from_pretrained(untouched.model, tmp_path / "adapter").eval()(blocks).logits
        assert torch.equal(ours, model.eval()(blocks).logits) and torch.equal(plain, ours)


@pytest.mark.parametrize("name", NAMES)
def test_a_killed_sequence_ends_with_the_same_bytes_and_has_one_start(tiny, tmp_path, name):
    plan = tiny_domains.plan(tiny, tmp_path, methods=[{"name": name, "rank": 2}])
    run_sequence(plan, tmp_path / "whole")
    killed(run_sequence, (plan, tmp_path / "killed"), f"{name}: learning prose", 3)
    killed(run_sequence, (plan, tmp_path / "killed"), f"{name}: learning code", 3)
    run_sequence(plan, tmp_path / "killed")
    stages = [sorted((tmp_path / run / "stages" / name).glob("*/adapter")) for run in ("whole", "killed")]
    for whole, again in zip(*stages, strict=True):
        assert contents(whole) == contents(again)
    alone = tiny_domains.of(plan, "prose")
    adapt(alone, tmp_path / "alone")
    assert (
        contents(tmp_path / "alone")["adapter_model.safetensors"] == contents(stages[0][0])["adapter_model.safetensors"]
    )


def test_a_start_that_cannot_be_is_one_message():
    def attach_it(**method):
        attach(tiny_base.model(), MethodConfig(**method), seed=0, rows=rows(2))

    refused(
        ConfigError,
        "computes its start from training rows",
        attach,
        tiny_base.model(),
        MethodConfig(name="eva"),
        seed=0,
    )
    refused(ConfigError, "o_proj has 32: choose a rank of at most 16", attach_it, name="lora-ga", rank=20)
    refused(ConfigError, "EVA compares 64 directions of rank 32, and .* 32 tokens", attach_it, name="eva", rank=32)
    quantized = ModelConfig(quantization="4bit", dtype="bf16", device="cpu")
    for name in FROZEN:
        refused(
            ConfigError,
            "works on the base's own weights",
            prepare_method,
            MethodConfig(name=name),
            quantized,
            TrainConfig(),
        )


def test_lora_s_own_field_takes_the_same_start():
    field = MethodConfig(name="lora", rank=RANK, config={"init_lora_weights": "eva"})
    by_field = attach(tiny_base.model(), field, seed=0, rows=rows())
    for (one, _), (other, _) in zip(factors(by_field), factors(attached(tiny_base.model(), "eva")), strict=True):
        assert torch.equal(one, other)
