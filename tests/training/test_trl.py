"""TRL's SFTTrainer takes a GainConfig or a DiselConfig as it takes a LoraConfig."""

import pytest
import torch
from datasets import Dataset
from peft import PeftModel

import gaintune
from support import tiny_base

trl = pytest.importorskip("trl", reason="trl is not installed")


class GatedTrainer(gaintune.AdapterOptimizerMixin, trl.SFTTrainer):
    """What a user writes to train DISeL with TRL."""


def trainer_of(kind, folder, config, **options):
    common = {"bf16": False, "use_cpu": True, "report_to": "none", "save_strategy": "no", "max_length": 16}
    return kind(
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
    config = gaintune.GainConfig(ffn=True, task_type="CAUSAL_LM")
    options = {"learning_rate": 0.05, "gradient_checkpointing": False}
    trainer = trainer_of(trl.SFTTrainer, tmp_path / "out", config, **options)
    trainer.train()
    check_saved(trainer, tmp_path / "adapter")


def test_sft_trainer_trains_gates_at_their_own_rate(tmp_path):
    config = gaintune.DiselConfig(r=4, gate_lr_ratio=3.0, task_type="CAUSAL_LM")
    options = {"learning_rate": 0.01, "weight_decay": 0.1, "gradient_checkpointing": True}
    trainer = trainer_of(GatedTrainer, tmp_path / "out", config, **options)
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
