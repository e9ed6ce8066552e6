"""Optimizer groups: decay for matrices only, gates at a rate of their own, in the ready optimizer and in Trainers."""

import pytest
import torch
from datasets import Dataset
from peft import AdaLoraConfig, IA3Config, PeftModel, get_peft_model
from torch import distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import Trainer, TrainingArguments

from gaintune.errors import ConfigError
from gaintune.tuners import AdapterOptimizerMixin, create_disel_optimizer, parameter_groups
from gaintune.tuners.disel import DiselConfig
from gaintune.tuners.gain import GainConfig
from support import refused, tiny_base
from support.tiny_models import adapter_tensors, copies, llama, randomise, tokens

ROWS = [{"input_ids": row, "labels": row} for row in tokens(rows=4)]


class GroupedTrainer(AdapterOptimizerMixin, Trainer):
    pass


def adapted(config):
    return get_peft_model(llama(), config)


def settings(model, groups):
    """Of every trainable parameter by name: its rate and decay."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}


def expected(model, gates, rest):
    return {name: gates if ".lora_G." in name else rest for name, p in model.named_parameters() if p.requires_grad}


def names_of(model, group):
    members = {id(p) for p in group["params"]}
    return {name for name, p in model.named_parameters() if id(p) in members}


def test_biases_and_norms_are_not_decayed_and_matrices_are():
    class Matrixnorm(nn.Module):  # a norm whose weight is no vector
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 2))

    parts = {"lin": nn.Linear(4, 4), "ln": nn.LayerNorm(4), "mn": Matrixnorm(), "frozen": nn.Linear(4, 4)}
    model = nn.ModuleDict(parts)
    model["frozen"].requires_grad_(False)
    groups = {group["name"]: group for group in parameter_groups(model, lr=0.5, weight_decay=0.1)}
    assert names_of(model, groups["decay"]) == {"lin.weight"}
    assert names_of(model, groups["no_decay"]) == {"lin.bias", "ln.weight", "ln.bias", "mn.weight"}
    assert groups["decay"]["weight_decay"] == 0.1 and groups["no_decay"]["weight_decay"] == 0.0


@pytest.mark.parametrize(("config", "part"), [
    (GainConfig(ffn=True), ".gain_v."),
    (IA3Config(task_type="CAUSAL_LM"), ".ia3_l."),  # which PEFT keeps as a matrix, as this one
    (AdaLoraConfig(total_step=9, target_modules=["q_proj"]), ".lora_E."),
], ids=["gain", "ia3", "adalora"])  # fmt: skip
def test_gains_and_factors_are_never_decayed(config, part):
    model = adapted(config)
    found = settings(model, parameter_groups(model, lr=0.01, weight_decay=0.5))
    assert {values for name, values in found.items() if part in name} == {(0.01, 0.0)}


def test_parameters_can_have_a_rate_of_their_own_by_name():
    model = adapted(GainConfig(modules_to_save=["lm_head"]))
    groups = {g["name"]: g for g in parameter_groups(model, 0.01, 0.1, rate_multipliers={"gain_": 5.0})}
    assert names_of(model, groups["no_decay:gain_"]) == set(adapter_tensors(model))
    assert groups["no_decay:gain_"]["lr"] == pytest.approx(0.05) and groups["decay"]["lr"] == 0.01
    with pytest.raises(ValueError, match="no trainable parameter is called so"):
        parameter_groups(model, 0.01, 0.1, rate_multipliers={"gate_": 5.0})


@pytest.mark.parametrize("options", [{}, {"gate_rank": 2, "gate_lr_ratio": 3.0}], ids=str)
def test_the_ratio_of_the_configuration_is_read(options):
    model = adapted(DiselConfig(**options))
    ratio = options.get("gate_lr_ratio", 5.0)
    wanted = expected(model, (pytest.approx(0.01 * ratio), 0.0), (0.01, 0.1))
    assert settings(model, parameter_groups(model, lr=0.01, weight_decay=0.1)) == wanted
    assert settings(model, create_disel_optimizer(model, lr=0.01, weight_decay=0.1).param_groups) == wanted
    wrapped = nn.ModuleDict({"module": model})  # as a data-parallel wrapper holds it
    assert settings(model, parameter_groups(wrapped, lr=0.01, weight_decay=0.1)) == wanted
    model.peft_config["default"].gate_lr_ratio = 2.0
    changed = expected(model, (pytest.approx(0.02), 0.0), (0.01, 0.1))
    assert settings(model, parameter_groups(model, lr=0.01, weight_decay=0.1)) == changed


def rates_of(model, groups, part):
    return {rate for name, (rate, _) in settings(model, groups).items() if part in name}


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # two adapters on one model are the point
def test_every_adapter_has_its_own_ratio():
    model = llama()
    model.add_adapter(DiselConfig(gate_lr_ratio=2.0), "slow")
    model.add_adapter(DiselConfig(gate_lr_ratio=8.0), "fast")
    model.set_adapter(["slow", "fast"])
    groups = parameter_groups(model, lr=1.0, weight_decay=0.0)
    assert [rates_of(model, groups, f".lora_G.{name}.") for name in ("slow", "fast")] == [{2.0}, {8.0}]
    assert rates_of(model, groups, ".lora_A.") == rates_of(model, groups, ".lora_B.") == {1.0}
    model.set_adapter("slow")
    assert not rates_of(model, parameter_groups(model, 1.0, 0.0), ".fast.")


def test_an_explicit_ratio_wins():
    model = adapted(DiselConfig())
    wanted = expected(model, (pytest.approx(0.07), 0.0), (0.01, 0.0))
    assert settings(model, create_disel_optimizer(model, lr=0.01, gate_lr_ratio=7.0).param_groups) == wanted
    groups = parameter_groups(model, 0.01, 0.0, rate_multipliers={"lora_G": 7.0, "lora_B": 2.0})
    assert [rates_of(model, groups, part) for part in (".lora_G.", ".lora_B.")] == [{0.01 * 7.0}, {0.02}]


def test_the_optimizer_takes_another_class_and_its_options():
    optimizer = create_disel_optimizer(adapted(DiselConfig()), lr=0.01, optimizer_cls=torch.optim.SGD, momentum=0.5)
    assert isinstance(optimizer, torch.optim.SGD) and {g["momentum"] for g in optimizer.param_groups} == {0.5}


@pytest.mark.parametrize("config", [GainConfig(), DiselConfig(gate_kind="relu"), DiselConfig(inference_mode=True)])
def test_without_gates_to_train_there_is_no_such_optimizer(config):
    refused(ConfigError, "no gate of a DISeL adapter trains", create_disel_optimizer, adapted(config), lr=0.01)


@pytest.mark.parametrize("config", [GainConfig(), DiselConfig()], ids=["gain", "disel"])
def test_a_step_with_decay_leaves_gains_and_gates_without_gradient_alone(config):
    model = randomise(adapted(config))
    before = copies(model)
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=0.1, weight_decay=0.5))
    for parameter in adapter_tensors(model).values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in adapter_tensors(model).items():
        assert torch.equal(parameter, before[name]) == (".lora_G." in name or ".gain_v." in name)


def arguments(folder, **options):
    options = {"learning_rate": 0.01, "weight_decay": 0.1, "max_steps": 3, "save_strategy": "no", **options}
    common = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "lr_scheduler_type": "linear"}
    return TrainingArguments(folder, **common, **options)


def test_the_plain_trainer_with_the_mixin(tmp_path):
    model = adapted(DiselConfig(r=2))
    before = copies(model)
    trainer = GroupedTrainer(model, arguments(tmp_path), train_dataset=ROWS)
    trainer.train()
    groups = trainer.optimizer.param_groups
    initial = [{**group, "lr": group["initial_lr"]} for group in groups]
    assert settings(model, initial) == expected(model, (pytest.approx(0.05), 0.0), (0.01, 0.1))
    rates = {group["name"]: group["lr"] for group in groups}  # the schedule keeps the ratio
    assert rates["no_decay:lora_G.default"] == pytest.approx(5 * rates["decay"])
    assert all(not torch.equal(p, before[name]) for name, p in adapter_tensors(model).items())


@pytest.mark.parametrize(("config", "part"), [(GainConfig(ffn=True), "gain_v"), (DiselConfig(r=2), ".lora_B.")])
def test_the_plain_trainer_takes_our_groups_and_the_ready_optimizer(tmp_path, config, part):
    model = adapted(config)
    if part == "gain_v":
        optimizer = torch.optim.AdamW(parameter_groups(model, lr=0.05, weight_decay=0.1))
    else:
        optimizer = create_disel_optimizer(model, lr=0.05, weight_decay=0.1)
    options = arguments(tmp_path, save_strategy="steps", save_steps=3)
    Trainer(model, options, train_dataset=ROWS, optimizers=(optimizer, None)).train()
    assert all(p.abs().max() > 0.01 for name, p in adapter_tensors(model).items() if part in name)
    assert (tmp_path / "checkpoint-3" / "adapter_model.safetensors").exists()


def test_the_mixin_takes_the_trainers_optimizer_and_keeps_gains_out_of_decay(tmp_path):
    model = adapted(GainConfig(modules_to_save=["lm_head"]))
    trainer = GroupedTrainer(model, arguments(tmp_path, optim="adagrad"), train_dataset=ROWS)
    assert isinstance(trainer.create_optimizer(), torch.optim.Adagrad)
    assert trainer.create_optimizer() is trainer.optimizer
    head = "base_model.model.lm_head.modules_to_save.default.weight"
    wanted = {**dict.fromkeys(adapter_tensors(model), (0.01, 0)), head: (0.01, 0.1)}
    assert settings(model, trainer.optimizer.param_groups) == wanted


@pytest.mark.filterwarnings("ignore:FSDP is switching")
def test_an_optimizer_with_groups_of_its_own_and_fsdp_1_are_refused(tmp_path):
    model = adapted(DiselConfig(r=2))
    trainer = GroupedTrainer(model, arguments(tmp_path), train_dataset=ROWS)
    trainer.optimizer_cls_and_kwargs = (torch.optim.AdamW, {"params": []})
    refused(ConfigError, "makes parameter groups of its own", trainer.create_optimizer)
    trainer = GroupedTrainer(model, arguments(tmp_path), train_dataset=ROWS)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
        refused(ConfigError, r"FSDP 1 flattens parameters .*fsdp_version: 2", trainer.create_optimizer, wrapped)
    finally:
        distributed.destroy_process_group()


def trl_trainer_of(folder, config, *mixins, **options):
    """TRL's SFTTrainer with a configuration of ours, as it takes a LoraConfig."""
    trl = pytest.importorskip("trl", reason="trl is not installed")
    common = {"bf16": False, "use_cpu": True, "report_to": "none", "save_strategy": "no", "max_length": 16}
    return type("SFTTrainer", (*mixins, trl.SFTTrainer), {})(
        model=tiny_base.model(),
        args=trl.SFTConfig(output_dir=str(folder), max_steps=3, per_device_train_batch_size=2, **common, **options),
        train_dataset=Dataset.from_dict({"input_ids": tiny_base.blocks(8, 16).tolist()}),
        processing_class=tiny_base.tokenizer(),
        peft_config=config,
    )


@torch.no_grad()
def check_saved(trainer, folder):
    """The trained model is not the base any more, and is what it saves."""
    trainer.save_model(str(folder))
    tokens = tiny_base.blocks(2, 16, seed=1)
    trained = trainer.model.eval()(tokens).logits
    fresh = tiny_base.model().eval()
    assert not torch.allclose(trained, fresh(tokens).logits)
    assert torch.equal(PeftModel.from_pretrained(fresh, str(folder)).eval()(tokens).logits, trained)


def test_sft_trainer_trains_and_saves_gains(tmp_path):
    config = GainConfig(ffn=True, task_type="CAUSAL_LM")
    options = {"learning_rate": 0.05, "gradient_checkpointing": False}
    trainer = trl_trainer_of(tmp_path / "out", config, **options)
    trainer.train()
    check_saved(trainer, tmp_path / "adapter")


def test_sft_trainer_trains_gates_at_their_own_rate(tmp_path):
    config = DiselConfig(r=4, gate_lr_ratio=3.0, task_type="CAUSAL_LM")
    options = {"learning_rate": 0.01, "weight_decay": 0.1, "gradient_checkpointing": True}
    trainer = trl_trainer_of(tmp_path / "out", config, AdapterOptimizerMixin, **options)
    gates = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if ".lora_G." in name}
    assert len(gates) == 2 * 14
    trainer.train()
    groups = {group["name"]: group for group in trainer.optimizer.param_groups}
    gated = groups["no_decay:lora_G.default"]
    assert (gated["initial_lr"], gated["weight_decay"], len(gated["params"])) == (pytest.approx(0.03), 0.0, len(gates))
    assert (groups["decay"]["initial_lr"], groups["decay"]["weight_decay"]) == (0.01, 0.1)
    after = dict(trainer.model.named_parameters())
    assert all(not torch.equal(after[name], value) for name, value in gates.items())
    check_saved(trainer, tmp_path / "adapter")
