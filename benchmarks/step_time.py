"""Time of one training step, variants interleaved in one process, as ratios to a frozen floor.

    python benchmarks/step_time.py [--rounds 12]

The floor is the same frozen model with the same loss, gradients flowing to the input embeddings only: what any adapter
that reaches every layer has to pay. Peak memory is measured in a process of its own for each variant.
"""

from __future__ import annotations

import argparse
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from common import BATCH, BLOCK, FULL, VARIANTS, demo_base, demo_blocks, markdown, peak_gib, provenance, spread

from gaintune.methods import trainable_parameters
from gaintune.models import NextTokenLoss, autocast
from gaintune.tuners import parameter_groups

FLOOR = "frozen floor"
RATE = 1e-4  # the time of a step does not depend on it
Step = Callable[[torch.Tensor], None]


def build(variant: str) -> tuple[Step, int]:
    """One step of a variant as a function of a batch, and its number of trainable parameters."""
    if variant == FLOOR:
        model = demo_base().model.requires_grad_(False)
        model.enable_input_require_grads()
        loss = NextTokenLoss(model)

        def floor(batch: torch.Tensor) -> None:
            (loss.sum(model, {"input_ids": batch, "labels": batch}) / batch[:, 1:].numel()).backward()

        model.train()
        return floor, 0
    own = demo_base()
    mixed = own.model.dtype if variant == FULL and own.model.dtype != torch.float32 else None
    model = VARIANTS[variant](demo_base(torch.float32) if variant == FULL else own)
    loss = NextTokenLoss(model)
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=RATE, weight_decay=0.0), lr=RATE)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.train()

    def step(batch: torch.Tensor) -> None:
        with autocast(batch.device, mixed):
            value = loss.sum(model, {"input_ids": batch, "labels": batch}) / batch[:, 1:].numel()
        value.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, trainable_parameters(model)


def timed(step: Step, batch: torch.Tensor) -> float:
    if batch.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    step(batch)
    if batch.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def memory_of(variant: str) -> float:
    """Peak memory of three steps of one variant, measured in a fresh process."""
    command = [sys.executable, __file__, "--memory-of", variant]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12, help="timed steps of every variant (default 12)")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="variants beside the floor")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    base = demo_base()
    batches = demo_blocks(base, 8 * BATCH).to(base.model.device).split(BATCH)
    if arguments.memory_of:
        where = provenance(base)
        del base
        step, _ = build(arguments.memory_of)
        for batch in batches[:3]:
            step(batch)
        print(where, peak_gib())
        return
    names = [FLOOR, *arguments.only]
    steps = {name: build(name) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    shuffled = random.Random(0)
    for round_ in range(arguments.rounds + 2):
        for name in shuffled.sample(names, len(names)):
            taken = timed(steps[name][0], batches[round_ % len(batches)])
            if round_ >= 2:  # the first two rounds warm up
                seconds[name].append(taken)
    rows = []
    for name in names:
        ratios = [mine / floor for mine, floor in zip(seconds[name], seconds[FLOOR], strict=True)]
        median = statistics.median(seconds[name])
        rows.append(
            [
                name,
                f"{steps[name][1]:,}",
                f"{median:.2f}",
                f"{median / statistics.median(seconds[FLOOR]):.3f}",
                spread(ratios),
                f"{BATCH * BLOCK / median:,.0f}",
                f"{memory_of(name):.2f}",
            ]
        )
    heads = ["variant", "trained", "s / step", "ratio of medians", "ratio in a round (min-max)", "tokens/s", "peak GiB"]
    print(f"Step time, batch {BATCH} x {BLOCK}, {arguments.rounds} interleaved rounds; {provenance(base)}\n")
    print(markdown(heads, rows))


if __name__ == "__main__":
    main()
