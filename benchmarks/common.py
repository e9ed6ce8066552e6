"""What the benchmarks share: inputs, statistics, and tables in Markdown."""

from __future__ import annotations

import datetime
import resource
import statistics
from collections.abc import Sequence

import torch

from gaintune.config import MethodConfig, build_plan
from gaintune.data.blocks import load_domain
from gaintune.environment import describe_environment
from gaintune.models import Base, load_base

BATCH, BLOCK = 4, 256
DOMAIN = "law"

VARIANTS = {
    "GAIN": MethodConfig(name="gain", label="gain"),
    "GAIN-FFN": MethodConfig(name="gain-ffn", label="gain-ffn"),
    "PEFT LoRA r=1, o_proj": MethodConfig(name="lora", label="lora-1", rank=1),
    "PEFT LoRA r=16, all linear": MethodConfig(name="lora", label="lora-16", rank=16, targets="all-linear"),
    "PEFT (IA)3, its modules": MethodConfig(name="ia3", label="ia3"),
    "PEFT (IA)3, GAIN-FFN's modules": MethodConfig(name="ia3", label="ia3-same", targets=("o_proj", "down_proj")),
    "full, fp32 under autocast": MethodConfig(name="full", label="full"),
}


def demo_base(dtype: torch.dtype | None = None) -> Base:
    """The embedded model; in the machine's own numbers unless a dtype is given."""
    return load_base(build_plan({}).model, dtype=dtype)


def demo_blocks(base: Base, blocks: int) -> torch.Tensor:
    """Real text of one domain, `(blocks, BLOCK)`."""
    plan = build_plan({"data": {"domains": [DOMAIN], "train_tokens": blocks * BLOCK, "block_size": BLOCK}})
    return load_domain(plan.data.domains[0], plan.data, base.tokenizer).train


def peak_gib() -> float:
    """Peak resident memory of this process so far, GiB (peak allocated memory of the device on CUDA)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def spread(values: Sequence[float]) -> str:
    """Median with the smallest and largest value."""
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def provenance(base: Base) -> str:
    """Date, processor, versions: what stands beside every figure."""
    told = describe_environment(base.model.device)
    packages = ", ".join(f"{name} {version}" for name, version in told["packages"].items())
    today = datetime.date.today().isoformat()
    return (
        f"{today}; {told['processor']}, {told['threads']} threads, device {told['device']}; "
        f"base {base.name} in {str(base.model.dtype).removeprefix('torch.')}; Python {told['python']}, {packages}"
    )
