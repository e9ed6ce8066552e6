"""Gates learn at their own rate and are never decayed, in our groups, the ready optimizer and any Trainer."""

import pytest
import torch
from peft import get_peft_model
from torch import distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import Trainer, TrainingArguments

from gaintune.errors import ConfigError
from gaintune.tuners import AdapterOptimizerMixin, create_disel_optimizer, parameter_groups
from gaintune.tuners.disel import DiselConfig
from gaintune.tuners.gain import GainConfig
from support import tiny_models

ROWS = [{"input_ids": row, "labels": row} for row in tiny_models.tokens(rows=4)]


class GroupedTrainer(AdapterOptimizerMixin, Trainer):
    pass


def settings(model, groups):
    """Of every trainable parameter by name: its rate and decay."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}


def expected(model, gates, rest):
    return {name: gates if ".lora_G." in name else rest for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("options", [{}, {"gate_rank": 2, "gate_lr_ratio": 3.0}], ids=str)
def test_the_ratio_of_the_configuration_is_read(options):
    model = get_peft_model(tiny_models.llama(), DiselConfig(**options))
    ratio = options.get("gate_lr_ratio", 5.0)
    wanted = expected(model, (pytest.approx(0.01 * ratio), 0.0), (0.01, 0.1))
    assert settings(model, parameter_groups(model, lr=0.01, weight_decay=0.1)) == wanted
    assert settings(model, create_disel_optimizer(model, lr=0.01, weight_decay=0.1).param_groups) == wanted
    wrapped = nn.ModuleDict({"module": model})  # as a data-parallel wrapper holds it
    assert settings(model, parameter_groups(wrapped, lr=0.01, weight_decay=0.1)) == wanted
    model.peft_config["default"].gate_lr_ratio = 2.0
    changed = expected(model, (pytest.approx(0.02), 0.0), (0.01, 0.1))
    assert settings(model, parameter_groups(model, lr=0.01, weight_decay=0.1)) == changed


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # two adapters on one model are the point
def test_every_adapter_has_its_own_ratio():
    model = tiny_models.llama()
    model.add_adapter(DiselConfig(gate_lr_ratio=2.0), "slow")
    model.add_adapter(DiselConfig(gate_lr_ratio=8.0), "fast")
    model.set_adapter(["slow", "fast"])
    found = settings(model, parameter_groups(model, lr=1.0, weight_decay=0.0))
    assert {rate for name, (rate, _) in found.items() if ".lora_G.slow." in name} == {2.0}
    assert {rate for name, (rate, _) in found.items() if ".lora_G.fast." in name} == {8.0}
    assert {rate for name, (rate, _) in found.items() if ".lora_G." not in name} == {1.0}
    model.set_adapter("slow")
    assert not any(".fast." in name for name in settings(model, parameter_groups(model, 1.0, 0.0)))


def test_an_explicit_ratio_wins():
    model = get_peft_model(tiny_models.llama(), DiselConfig())
    wanted = expected(model, (pytest.approx(0.07), 0.0), (0.01, 0.0))
    assert settings(model, create_disel_optimizer(model, lr=0.01, gate_lr_ratio=7.0).param_groups) == wanted
    groups = parameter_groups(model, 0.01, 0.0, rate_multipliers={"lora_G": 7.0, "lora_B": 2.0})
    found = settings(model, groups)
    assert {rate for name, (rate, _) in found.items() if ".lora_G." in name} == {0.01 * 7.0}
    assert {rate for name, (rate, _) in found.items() if ".lora_B." in name} == {0.02}


def test_the_optimizer_takes_another_class_and_its_options():
    model = get_peft_model(tiny_models.llama(), DiselConfig())
    optimizer = create_disel_optimizer(model, lr=0.01, optimizer_cls=torch.optim.SGD, momentum=0.5)
    assert isinstance(optimizer, torch.optim.SGD) and {g["momentum"] for g in optimizer.param_groups} == {0.5}


@pytest.mark.parametrize("config", [GainConfig(), DiselConfig(gate_kind="relu"), DiselConfig(inference_mode=True)])
def test_without_gates_to_train_there_is_no_such_optimizer(config):
    with pytest.raises(ConfigError, match="no gate of a DISeL adapter trains"):
        create_disel_optimizer(get_peft_model(tiny_models.llama(), config), lr=0.01)


def test_decay_leaves_gates_without_gradient_alone():
    model = tiny_models.randomise_disel(get_peft_model(tiny_models.llama(), DiselConfig()))
    before = {name: p.detach().clone() for name, p in tiny_models.adapter_tensors(model).items()}
    optimizer = create_disel_optimizer(model, lr=0.1, weight_decay=0.5)
    for parameter in tiny_models.adapter_tensors(model).values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in tiny_models.adapter_tensors(model).items():
        assert torch.equal(parameter, before[name]) == (".lora_G." in name)


def arguments(folder, **options):
    options = {"learning_rate": 0.01, "weight_decay": 0.1, "max_steps": 3, "save_strategy": "no", **options}
    return TrainingArguments(
        folder, report_to=[], use_cpu=True, disable_tqdm=True, lr_scheduler_type="linear", **options
    )


def test_the_plain_trainer_with_the_mixin(tmp_path):
    model = get_peft_model(tiny_models.llama(), DiselConfig(r=2))
    before = {name: p.detach().clone() for name, p in tiny_models.adapter_tensors(model).items()}
    trainer = GroupedTrainer(model, arguments(tmp_path), train_dataset=ROWS)
    trainer.train()
    groups = trainer.optimizer.param_groups
    initial = [{**group, "lr": group["initial_lr"]} for group in groups]
    assert settings(model, initial) == expected(model, (pytest.approx(0.05), 0.0), (0.01, 0.1))
    rates = {group["name"]: group["lr"] for group in groups}  # the schedule keeps the ratio
    assert rates["no_decay:lora_G.default"] == pytest.approx(5 * rates["decay"])
    assert all(not torch.equal(p, before[name]) for name, p in tiny_models.adapter_tensors(model).items())


def test_the_plain_trainer_with_the_ready_optimizer(tmp_path):
    model = get_peft_model(tiny_models.llama(), DiselConfig(r=2))
    optimizer = create_disel_optimizer(model, lr=0.01, weight_decay=0.1)
    trainer = Trainer(model, arguments(tmp_path), train_dataset=ROWS, optimizers=(optimizer, None))
    trainer.train()
    assert any(p.abs().max() > 0 for name, p in tiny_models.adapter_tensors(model).items() if ".lora_B." in name)


def test_the_mixin_takes_the_trainers_optimizer_and_keeps_gains_out_of_decay(tmp_path):
    model = get_peft_model(tiny_models.llama(), GainConfig(modules_to_save=["lm_head"]))
    trainer = GroupedTrainer(model, arguments(tmp_path, optim="adagrad"), train_dataset=ROWS)
    assert isinstance(trainer.create_optimizer(), torch.optim.Adagrad)
    assert trainer.create_optimizer() is trainer.optimizer
    found = settings(model, trainer.optimizer.param_groups)
    assert {name: found[name] for name in tiny_models.gains(model)} == dict.fromkeys(
        tiny_models.gains(model), (0.01, 0)
    )
    assert found["base_model.model.lm_head.modules_to_save.default.weight"] == (0.01, 0.1)


def test_an_optimizer_with_groups_of_its_own_is_refused(tmp_path):
    model = get_peft_model(tiny_models.llama(), DiselConfig())
    trainer = GroupedTrainer(model, arguments(tmp_path), train_dataset=ROWS)
    trainer.optimizer_cls_and_kwargs = (torch.optim.AdamW, {"params": []})
    with pytest.raises(ConfigError, match="makes parameter groups of its own"):
        trainer.create_optimizer()


@pytest.mark.filterwarnings("ignore:FSDP is switching")
def test_fsdp_1_is_refused(tmp_path):
    model = get_peft_model(tiny_models.llama(), DiselConfig(r=2))
    trainer = GroupedTrainer(model, arguments(tmp_path), train_dataset=ROWS)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
        with pytest.raises(ConfigError, match=r"FSDP 1 flattens parameters .*fsdp_version: 2"):
            trainer.create_optimizer(wrapped)
    finally:
        distributed.destroy_process_group()
