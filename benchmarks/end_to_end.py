"""`gaintune adapt` against TRL's `SFTTrainer` with PEFT LoRA r=16 on all linear layers: tokens per second, peak memory.

    python benchmarks/end_to_end.py [--repeats 3] [--blocks 32]

Every run is a process of its own (so that its peak memory is its own), on the same blocks; contenders take turns.
`SFTTrainer` runs as it comes and in every CPU setting that could make it faster; the fastest is the reference.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import BATCH, BLOCK, DOMAIN, demo_base, demo_blocks, markdown, peak_gib, provenance, spread

OURS = "gaintune adapt, GAIN-FFN"
SFT = {
    "SFTTrainer LoRA r=16, as it comes": {"dtype": "float32", "bf16": False},
    "SFTTrainer LoRA r=16, fp32 base, bf16 autocast": {"dtype": "float32", "bf16": True},
    "SFTTrainer LoRA r=16, bf16 base": {"dtype": "bfloat16", "bf16": False},
    "SFTTrainer LoRA r=16, bf16 base, bf16 autocast": {"dtype": "bfloat16", "bf16": True},
}


def run_ours(blocks: int, folder: Path) -> float:
    """Tokens per second of `gaintune.adapt`'s training."""
    import gaintune

    plan = {
        "data": {"domains": [DOMAIN], "train_tokens": blocks * BLOCK, "validation_tokens": BLOCK, "block_size": BLOCK},
        "methods": ["gain-ffn"],
        "train": {"batch_size": BATCH, "checkpoint_steps": 10**6},
    }
    return gaintune.adapt(plan, folder / "adapter").tokens_per_second


def run_sft(name: str, blocks: int, folder: Path) -> float:
    """Tokens per second of `SFTTrainer.train` on the same blocks."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    setting = SFT[name]
    base = demo_base(getattr(torch, str(setting["dtype"])))
    rows = demo_blocks(base, blocks).tolist()
    config = SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=BATCH,
        num_train_epochs=1,
        max_length=BLOCK,
        learning_rate=2e-4,
        gradient_checkpointing=False,
        bf16=bool(setting["bf16"]),
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model=base.model,
        args=config,
        train_dataset=Dataset.from_dict({"input_ids": rows}),
        processing_class=base.tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    start = time.perf_counter()
    trainer.train()
    return blocks * BLOCK / (time.perf_counter() - start)


def measured(name: str, blocks: int) -> tuple[float, float]:
    """Tokens per second and peak GiB of one contender in a fresh process."""
    command = [sys.executable, __file__, "--one", name, "--blocks", str(blocks)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr[-2000:]}")
    result = json.loads(done.stdout.strip().splitlines()[-1])
    return result["tokens_per_second"], result["peak_gib"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="runs of every contender (default 3)")
    parser.add_argument("--blocks", type=int, default=32, help=f"training blocks of {BLOCK} tokens (default 32)")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        with tempfile.TemporaryDirectory() as folder:
            if arguments.one == OURS:
                pace = run_ours(arguments.blocks, Path(folder))
            else:
                pace = run_sft(arguments.one, arguments.blocks, Path(folder))
        print(json.dumps({"tokens_per_second": pace, "peak_gib": peak_gib()}))
        return
    names = [OURS, *SFT]
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for _ in range(arguments.repeats):
        for name in names:
            found[name].append(measured(name, arguments.blocks))
    pace = {name: statistics.median(each[0] for each in found[name]) for name in names}
    memory = {name: statistics.median(each[1] for each in found[name]) for name in names}
    reference = max(SFT, key=lambda name: pace[name])
    rows = [
        [
            name + (" (reference)" if name == reference else ""),
            spread([each[0] for each in found[name]]),
            f"{pace[name] / pace[reference]:.2f}",
            f"{memory[name]:.2f}",
            f"{memory[name] / memory[reference]:.2f}",
        ]
        for name in names
    ]
    heads = ["run", "tokens/s, median (min-max)", "ratio", "peak GiB", "ratio"]
    what = f"{arguments.repeats} repeats taking turns, {arguments.blocks * BLOCK:,} tokens, batch {BATCH} x {BLOCK}"
    print(f"End to end, {what}; {provenance(demo_base())}\n")
    print(markdown(heads, rows))


if __name__ == "__main__":
    main()
