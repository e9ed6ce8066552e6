"""What recording gates costs: forward passes of the demo model with and without, interleaved in one process.

python benchmarks/gates.py [--rounds 15] [--rank 8] [--batch 4] [--tokens 256]
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable

import torch
from common import demo_base, demo_blocks, markdown, provenance, spread
from peft import get_peft_model

from gaintune.analysis.gates import record_gates
from gaintune.tuners.disel import DiselConfig

LARGEST_SHARE = 0.10


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

    def plain() -> None:
        backbone(input_ids=batch, use_cache=False)

    def recording(mask: torch.Tensor) -> Callable[[], None]:
        def forward() -> None:
            with record_gates(model) as recorder, recorder.counting("text", mask):
                backbone(input_ids=batch, use_cache=False)

        return forward

    variants = {
        "plain forward pass": plain,
        "recording all tokens": recording(torch.ones_like(half)),
        "recording half of the tokens": recording(half),
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    shuffled = random.Random(0)
    with torch.inference_mode():
        for round_ in range(arguments.rounds + 2):
            for name in shuffled.sample(list(variants), len(variants)):
                start = time.perf_counter()
                variants[name]()
                if batch.is_cuda:
                    torch.cuda.synchronize()
                if round_ >= 2:  # the first two rounds warm up
                    seconds[name].append(time.perf_counter() - start)
    floor = seconds["plain forward pass"]
    rows = []
    for name, taken in seconds.items():
        ratios = [mine / plain_ for mine, plain_ in zip(taken, floor, strict=True)]
        ratio = statistics.median(taken) / statistics.median(floor)
        rows.append([name, f"{statistics.median(taken):.3f}", f"{ratio:.3f}", spread(ratios)])
    shape = f"batch {arguments.batch} x {arguments.tokens}, r={arguments.rank} on all linear layers"
    print(f"Gates, {shape}, {arguments.rounds} interleaved rounds, no vocabulary product; {provenance(base)}\n")
    print(markdown(["forward pass", "s", "ratio of medians", "ratio in a round (min-max)"], rows))
    worst = max(statistics.median(seconds[name]) for name in list(variants)[1:]) / statistics.median(floor)
    print(f"\nRecording costs at most {100 * (worst - 1):.1f} % (goal: under {100 * LARGEST_SHARE:.0f} %).")


if __name__ == "__main__":
    main()
