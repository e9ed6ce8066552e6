"""TRL's SFTTrainer takes a GainConfig as it takes a LoraConfig."""

import pytest
import torch
from datasets import Dataset
from peft import PeftModel

import gaintune
import tiny_base

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
