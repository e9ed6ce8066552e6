"""TRL's SFTTrainer takes a GainConfig or a DiselConfig as it takes a LoraConfig."""

import pytest
import torch
from datasets import Dataset
from peft import PeftModel

import gaintune
from support import tiny_base

trl = pytest.importorskip("trl", reason="trl is not installed")


def test_sft_trainer_trains_and_saves_gains(tmp_path):
    model = tiny_base.model()
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            output_dir=str(tmp_path / "out"),
            max_steps=3,
            per_device_train_batch_size=2,
            learning_rate=0.05,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            max_length=16,
        ),
        train_dataset=Dataset.from_dict({"input_ids": tiny_base.blocks(8, 16).tolist()}),
        processing_class=tiny_base.tokenizer(),
        peft_config=gaintune.GainConfig(ffn=True, task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    tokens = tiny_base.blocks(2, 16, seed=1)
    with torch.no_grad():
        trained = trainer.model.eval()(tokens).logits
        fresh = tiny_base.model().eval()
        plain = fresh(tokens).logits
        loaded = PeftModel.from_pretrained(fresh, str(tmp_path / "adapter")).eval()(tokens).logits
    assert not torch.allclose(trained, plain)
    torch.testing.assert_close(loaded, trained)


class GatedTrainer(gaintune.AdapterOptimizerMixin, trl.SFTTrainer):
    """What a user writes to train DISeL with TRL."""


def test_sft_trainer_trains_gates_at_their_own_rate(tmp_path):
    trainer = GatedTrainer(
        model=tiny_base.model(),
        args=trl.SFTConfig(
            output_dir=str(tmp_path / "out"),
            max_steps=3,
            per_device_train_batch_size=2,
            learning_rate=0.01,
            weight_decay=0.1,
            gradient_checkpointing=True,
            bf16=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            max_length=16,
        ),
        train_dataset=Dataset.from_dict({"input_ids": tiny_base.blocks(8, 16).tolist()}),
        processing_class=tiny_base.tokenizer(),
        peft_config=gaintune.DiselConfig(r=4, gate_lr_ratio=3.0, task_type="CAUSAL_LM"),
    )
    gates = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if ".lora_G." in name}
    assert len(gates) == 2 * 14
    trainer.train()
    groups = {group["name"]: group for group in trainer.optimizer.param_groups}
    assert groups["no_decay:lora_G.default"]["initial_lr"] == pytest.approx(0.03)
    assert groups["no_decay:lora_G.default"]["weight_decay"] == 0.0
    assert len(groups["no_decay:lora_G.default"]["params"]) == len(gates)
    assert (groups["decay"]["initial_lr"], groups["decay"]["weight_decay"]) == (0.01, 0.1)
    after = dict(trainer.model.named_parameters())
    assert all(not torch.equal(after[name], value) for name, value in gates.items())
    trainer.save_model(str(tmp_path / "adapter"))
    tokens = tiny_base.blocks(2, 16, seed=1)
    with torch.no_grad():
        trained = trainer.model.eval()(tokens).logits
        loaded = PeftModel.from_pretrained(tiny_base.model().eval(), str(tmp_path / "adapter")).eval()(tokens).logits
    assert torch.equal(loaded, trained)
