"""Time that a penalty adds to a training step, and that a row takes in EWC's Fisher pass, on the demo model.

    python benchmarks/penalties.py [--rounds 12]

The same step (`common`'s batch, our loss, AdamW) with and without the rule's `before_update`, taking turns in one
process; the Fisher pass is `fisher_information` over single rows, as a ratio to a training step of as many rows.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import BATCH, BLOCK, FULL, VARIANTS, demo_base, demo_blocks, markdown, provenance, spread

from gaintune.config import MethodConfig
from gaintune.data import Examples
from gaintune.methods import StageData, StagePosition, trainable_parameters
from gaintune.methods.penalties import penalty_of
from gaintune.models import NextTokenLoss, autocast
from gaintune.tuners import parameter_groups

RATE = 1e-4  # the time of a step does not depend on it
DEFAULT = ("GAIN-FFN", "PEFT LoRA r=16, all linear", FULL)
PENALTIES = (None, "l2", "ewc")


def timed(work: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def rows_of(variant: str, rounds: int, folder: Path) -> list[list[str]]:
    """Table rows of one variant: each penalty's step, and the Fisher pass."""
    own = demo_base()
    mixed = own.model.dtype if variant == FULL and own.model.dtype != torch.float32 else None
    model = VARIANTS[variant](demo_base(torch.float32) if variant == FULL else own)
    device = next(model.parameters()).device
    blocks = demo_blocks(own, 8 * BATCH)
    batches = blocks.to(device).split(BATCH)
    loss = NextTokenLoss(model)
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=RATE, weight_decay=0.0), lr=RATE)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    stage_data = StageData(Examples.of_blocks(blocks[:BATCH]), loss, "Fisher pass", mixed_precision=mixed)
    rules = {}
    for penalty in PENALTIES[1:]:
        config = MethodConfig.model_validate({"name": "lora", "penalty": penalty})
        first = penalty_of(config, StagePosition(), seed=0)
        assert first is not None
        first.start(model, 1)
        first.finish(model, stage_data)
        first.keep(folder)
        rules[penalty] = penalty_of(config, StagePosition(previous=folder), seed=0)
        rules[penalty].start(model, 1)

    def step(penalty: str | None, batch: torch.Tensor) -> None:
        model.train()
        with autocast(batch.device, mixed):
            value = loss.sum(model, {"input_ids": batch, "labels": batch}) / batch[:, 1:].numel()
        value.backward()
        if penalty:
            rules[penalty].before_update(model, 0)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    from gaintune.methods.penalties import fisher_information

    seconds: dict[str | None, list[float]] = {name: [] for name in (*PENALTIES, "Fisher pass")}
    shuffled = random.Random(0)
    for round_ in range(rounds + 2):
        batch = batches[round_ % len(batches)]
        for name in shuffled.sample(list(seconds), len(seconds)):
            if name == "Fisher pass":
                taken = timed(lambda: fisher_information(model, stage_data))
            else:
                taken = timed(lambda name=name, batch=batch: step(name, batch))
            if round_ >= 2:  # the first two rounds warm up
                seconds[name].append(taken)
    rows = []
    for name, found in seconds.items():
        ratios = [mine / plain for mine, plain in zip(found, seconds[None], strict=True)]
        titles = {None: "no penalty", "Fisher pass": f"ewc: Fisher pass at {BATCH} rows, once a domain"}
        median = statistics.median(found)
        rows.append(
            [
                variant,
                titles.get(name, f"step with {name}"),
                f"{trainable_parameters(model):,}",
                f"{median:.2f}",
                f"{median / statistics.median(seconds[None]):.3f}",
                spread(ratios),
            ]
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12, help="timed steps of every kind (default 12)")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(DEFAULT), help="variants")
    arguments = parser.parse_args()
    rows = []
    for variant in arguments.only:
        with tempfile.TemporaryDirectory() as folder:
            rows += rows_of(variant, arguments.rounds, Path(folder))
    where = provenance(demo_base())
    print(f"Penalties, batch {BATCH} x {BLOCK}, {arguments.rounds} interleaved rounds; {where}\n")
    heads = ["variant", "what", "trained", "s", "ratio of medians", "ratio in a round (min-max)"]
    print(markdown(heads, rows))


if __name__ == "__main__":
    main()
