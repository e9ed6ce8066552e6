"""Optimizer groups: decay for matrices only, and rates of their own by name."""

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, get_peft_model
from torch import nn

from gaintune.tuners import parameter_groups
from gaintune.tuners.gain import GainConfig
from support import tiny_models


def names_of(model, group):
    members = {id(p) for p in group["params"]}
    return {name for name, p in model.named_parameters() if id(p) in members}


def test_gains_are_never_decayed():
    model = get_peft_model(tiny_models.llama(), GainConfig(ffn=True))
    (group,) = parameter_groups(model, lr=0.01, weight_decay=0.1)
    assert names_of(model, group) == set(tiny_models.gains(model))
    assert (group["lr"], group["weight_decay"]) == (0.01, 0.0)


def test_biases_and_norms_are_not_decayed_and_matrices_are():
    class Matrixnorm(nn.Module):  # a norm whose weight is no vector
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 2))

    model = nn.ModuleDict(
        {"lin": nn.Linear(4, 4), "ln": nn.LayerNorm(4), "mn": Matrixnorm(), "frozen": nn.Linear(4, 4)}
    )
    model["frozen"].requires_grad_(False)
    groups = {group["name"]: group for group in parameter_groups(model, lr=0.5, weight_decay=0.1)}
    assert names_of(model, groups["decay"]) == {"lin.weight"}
    assert names_of(model, groups["no_decay"]) == {"lin.bias", "ln.weight", "ln.bias", "mn.weight"}
    assert groups["decay"]["weight_decay"] == 0.1 and groups["no_decay"]["weight_decay"] == 0.0


def test_a_rate_of_its_own():
    model = get_peft_model(tiny_models.llama(), GainConfig(modules_to_save=["lm_head"]))
    groups = {g["name"]: g for g in parameter_groups(model, 0.01, 0.1, rate_multipliers={"gain_": 5.0})}
    assert names_of(model, groups["no_decay:gain_"]) == set(tiny_models.gains(model))
    assert groups["no_decay:gain_"]["lr"] == pytest.approx(0.05)
    assert groups["decay"]["lr"] == 0.01
    with pytest.raises(ValueError, match="no trainable parameter is called so"):
        parameter_groups(model, 0.01, 0.1, rate_multipliers={"gate_": 5.0})


@pytest.mark.parametrize(
    ("config", "part"),
    [(IA3Config(task_type="CAUSAL_LM"), "ia3_l"), (AdaLoraConfig(total_step=9, target_modules=["q_proj"]), "lora_E")],
    ids=["ia3", "adalora"],
)
def test_factors_that_peft_keeps_as_matrices_are_not_decayed(config, part):
    model = get_peft_model(tiny_models.llama(), config)
    factors = {id(value) for name, value in model.named_parameters() if part in name}
    assert factors
    for group in parameter_groups(model, lr=0.1, weight_decay=0.5):
        if group["weight_decay"]:
            assert not factors & {id(value) for value in group["params"]}


def test_a_step_with_decay_leaves_gains_without_gradient_alone():
    model = tiny_models.randomise(get_peft_model(tiny_models.llama(), GainConfig()))
    before = [v.detach().clone() for v in tiny_models.gains(model).values()]
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=0.1, weight_decay=0.5))
    for v in tiny_models.gains(model).values():
        v.grad = torch.zeros_like(v)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, tiny_models.gains(model).values(), strict=True))


def test_a_trainer_takes_the_optimizer(tmp_path):
    from transformers import Trainer, TrainingArguments

    model = get_peft_model(tiny_models.llama(), GainConfig(ffn=True))
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=0.05, weight_decay=0.1))
    rows = [{"input_ids": row, "labels": row} for row in tiny_models.tokens(rows=4)]
    arguments = TrainingArguments(tmp_path, max_steps=3, report_to=[], use_cpu=True, disable_tqdm=True, save_steps=3)
    trainer = Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None))
    trainer.train()
    assert all(v.detach().abs().max() > 0.01 for v in tiny_models.gains(model).values())
    assert (tmp_path / "checkpoint-3" / "adapter_model.safetensors").exists()
