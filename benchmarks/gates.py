"""What recording gates costs: forward passes of the demo model with and without, interleaved in one process.

python benchmarks/gates.py [--rounds 15] [--rank 8] [--batch 4] [--tokens 256]
"""

from __future__ import annotations

import argparse
import contextlib
import random
import statistics
import time

import torch
from common import demo_base, demo_blocks, markdown, provenance, spread
from peft import get_peft_model

from gaintune.analysis import record_gates
from gaintune.tuners.disel import DiselConfig

LARGEST_SHARE = 0.10
PLAIN = "plain forward pass"
WALL, PROCESSOR = 0, 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="timed forward passes of each kind (default 15)")
    parser.add_argument("--rank", type=int, default=8, help="rank of the adapter, on all linear layers (default 8)")
    parser.add_argument("--batch", type=int, default=4, help="rows of a forward pass (default 4)")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a row, at most 256 (default 256)")
    arguments = parser.parse_args()
    base = demo_base()
    batch = demo_blocks(base, arguments.batch)[:, : arguments.tokens].to(base.model.device)
    model = get_peft_model(base.model, DiselConfig(r=arguments.rank, target_modules="all-linear")).eval()
    half = torch.zeros_like(batch, dtype=torch.bool)
    half[:, batch.shape[1] // 2 :] = True
    backbone = base.model.base_model

    masks = {PLAIN: None, "recording all tokens": torch.ones_like(half), "recording half of the tokens": half}

    def timed(mask: torch.Tensor | None) -> tuple[float, float]:
        """Wall and processor time of one forward pass, seconds."""
        with contextlib.ExitStack() as stack:
            recorder = stack.enter_context(record_gates(model)) if mask is not None else None
            wall, processor = time.perf_counter(), time.process_time()
            if recorder is not None and mask is not None:
                stack.enter_context(recorder.counting("text", mask))
            backbone(input_ids=batch, use_cache=False)
            if batch.is_cuda:
                torch.cuda.synchronize()
            return time.perf_counter() - wall, time.process_time() - processor

    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in masks}
    shuffled = random.Random(0)
    with torch.inference_mode():
        for round_ in range(arguments.rounds + 2):
            for name in shuffled.sample(list(masks), len(masks)):
                taken = timed(masks[name])
                if round_ >= 2:  # the first two rounds warm up
                    seconds[name].append(taken)
    rows, worst = [], 0.0
    for name, taken in seconds.items():
        medians = [statistics.median(each[kind] for each in taken) for kind in (WALL, PROCESSOR)]
        floors = [statistics.median(each[kind] for each in seconds[PLAIN]) for kind in (WALL, PROCESSOR)]
        ratios = [mine / floor for mine, floor in zip(medians, floors, strict=True)]
        in_a_round = [mine[WALL] / floor[WALL] for mine, floor in zip(taken, seconds[PLAIN], strict=True)]
        rows.append([name, f"{medians[WALL]:.3f}", *(f"{ratio:.3f}" for ratio in ratios), spread(in_a_round)])
        worst = max(worst, ratios[WALL] - 1)
    shape = f"batch {arguments.batch} x {arguments.tokens}, r={arguments.rank} on all linear layers"
    print(f"Gates, {shape}, {arguments.rounds} interleaved rounds, no vocabulary product; {provenance(base)}\n")
    heads = ["forward pass", "s", "ratio of medians", "of processor time", "ratio in a round (min-max)"]
    print(markdown(heads, rows))
    print(f"\nRecording costs {100 * worst:.1f} % at most (goal: under {100 * LARGEST_SHARE:.0f} %).")


if __name__ == "__main__":
    main()
