"""Estimated and measured memory of training, each case in a process of its own (Linux, CPU).

    python benchmarks/memory.py [--only "demo, lora"]

"Measured" is the peak of resident memory until `gaintune.adapt` ends, less what was resident before the model was
loaded. A run on a tiny model first loads everything that training imports. The estimate leaves out the peak while
weights are read, so the count starts again when they are there. Each case runs with MALLOC_ARENA_MAX=1 and
MALLOC_TRIM_THRESHOLD_=0, so that freed memory is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import transformers
from common import demo_base, markdown, provenance

import gaintune.workflows.adaptation as adaptation
from gaintune import adapt
from gaintune.recipes import smoke
from gaintune.workflows import estimate_plan

STEPS = 3
ALL_LINEAR = {"name": "lora", "rank": 8, "targets": "all-linear"}
CASES: dict[str, tuple[str, dict[str, Any], int, bool]] = {  # base, method, rows, gradient checkpointing
    "demo, lora r=8 on all linear layers, 4 x 256": ("demo", ALL_LINEAR, 4, False),
    "demo, gain-ffn, 16 x 256": ("demo", {"name": "gain-ffn"}, 16, False),
    "demo, disel r=8, 8 x 256": ("demo", {"name": "disel", "rank": 8}, 8, False),
    "demo, lora r=8 on all linear layers, 16 x 256, checkpointing": ("demo", ALL_LINEAR, 16, True),
    "demo, full, 4 x 256": ("demo", {"name": "full"}, 4, False),
    "four layers of a 7B, lora r=8 on all linear layers, 1 x 256": ("wide", ALL_LINEAR, 1, False),
}
ENVIRONMENT = {"MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}


def wide(folder: Path) -> Path:
    """Write four layers as wide as a 7B, with random weights in bf16."""
    config = transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=4, num_attention_heads=32, vocab_size=32000,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config, dtype="bfloat16").save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(smoke.base(folder.parent / "tiny")).save_pretrained(folder)
    return folder


def plan_of(case: str, model: str) -> dict[str, Any]:
    """Return the plan of a case."""
    _, method, rows, checkpointing = CASES[case]
    return {
        "model": {"name": model, "dtype": "bf16", "device": "cpu"},
        "methods": [method],
        "data": {"domains": ["manual"], "train_tokens": STEPS * rows * 256, "validation_tokens": 1024},
        "train": {"batch_size": rows, "gradient_checkpointing": checkpointing},
    }


def resident(key: str) -> int:
    """Return a figure of this process in bytes: VmRSS (now) or VmHWM (the most)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(re.findall(rf"{key}:\s+(\d+) kB", status)[0])


def measure(case: str, model: str, folder: Path) -> dict[str, float]:
    """Train a case in this process, and return its estimate and its peak, in bytes."""
    plan = plan_of(case, model)
    memory = estimate_plan(plan).methods[0].memory
    tiny = {**plan, "model": {**plan["model"], "name": str(smoke.base(folder / "tiny"))}}
    tiny["data"] = {**plan["data"], "train_tokens": 512, "block_size": 256}
    adapt(tiny, folder / "warm-up")
    load, before = adaptation.load_base, []

    def watched(*arguments: Any, **options: Any) -> Any:
        before.append(resident("VmRSS"))
        base = load(*arguments, **options)
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # VmHWM starts again
        return base

    adaptation.load_base = watched  # type: ignore[assignment]
    adapt(plan, folder / "measured")
    return {"estimate": memory.peak, "measured": resident("VmHWM") - before[0]}


def main() -> None:
    """Measure every case, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="part of the names of the cases to measure")
    parser.add_argument("--case", nargs=2, metavar=("CASE", "MODEL"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if arguments.case:
            case, model = arguments.case
            print(json.dumps(measure(case, model, folder)))
            return
        rows = []
        for case, (base, *_) in CASES.items():
            if arguments.only not in case:
                continue
            model = str(wide(folder / "wide")) if base == "wide" else base
            command = [sys.executable, __file__, "--case", case, model]
            done = subprocess.run(
                command, check=True, capture_output=True, text=True, env={**os.environ, **ENVIRONMENT}
            )
            size = json.loads(done.stdout.splitlines()[-1])
            ratio = size["estimate"] / size["measured"] - 1
            rows.append([case, f"{size['estimate'] / 1e9:.2f}", f"{size['measured'] / 1e9:.2f}", f"{ratio:+.0%}"])
            print(rows[-1], file=sys.stderr)
    print(markdown(["case", "estimate, GB", "measured, GB", "difference"], rows))
    print(provenance(demo_base()))


if __name__ == "__main__":
    main()
