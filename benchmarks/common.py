"""Shared by the benchmarks: inputs, statistics, and tables in Markdown."""

from __future__ import annotations

import datetime
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import IA3Config, get_peft_model

from gaintune.config import MethodConfig, build_plan
from gaintune.data import load_domain
from gaintune.methods import attach
from gaintune.models import Base, load_base
from gaintune.storage import describe_environment
from gaintune.tuners.disel.layer import DiselVariant, disel_layers, stacked_product, widened

BATCH, BLOCK = 4, 256
DOMAIN = "law"

Attach = Callable[[Base], torch.nn.Module]


def _method(**fields: object) -> Attach:
    config = MethodConfig.model_validate(fields)
    return lambda base: attach(base.model, config, seed=0)


def _ia3_where_gain_ffn_acts(base: Base) -> torch.nn.Module:
    modules = ["o_proj", "down_proj"]
    config = IA3Config(target_modules=modules, feedforward_modules=modules, task_type="CAUSAL_LM")
    return get_peft_model(base.model, config)


def _disel_in_two_products(base: Base) -> torch.nn.Module:
    """DISeL with `A x` and `G x` each for itself, all else as it is."""
    model = _method(name="disel", rank=8)(base)
    for _, layer in disel_layers(model):
        layer.lora_variant["default"] = TwoProducts()
    return model


class TwoProducts(DiselVariant):
    """The gate and A read the input one after the other."""

    def hidden_and_gates(
        self, module: Any, adapter_name: str, x: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        gate = module.lora_G[adapter_name]
        hidden = widened(stacked_product(x, (module.lora_A[adapter_name].weight,), dtype))
        return hidden, torch.sigmoid(gate(widened(stacked_product(x, (gate.reads,), dtype))))


VARIANTS: dict[str, Attach] = {
    "GAIN": _method(name="gain"),
    "GAIN-FFN": _method(name="gain-ffn"),
    "PEFT LoRA r=1, o_proj": _method(name="lora", rank=1),
    "PEFT LoRA r=8, all linear": _method(name="lora", rank=8, targets="all-linear"),
    "DISeL r=8, all linear": _method(name="disel", rank=8),
    "DISeL r=8, two products": _disel_in_two_products,
    "PEFT LoRA r=16, all linear": _method(name="lora", rank=16, targets="all-linear"),
    "PEFT (IA)3, its modules": _method(name="ia3"),
    "PEFT (IA)3, GAIN-FFN's modules": _ia3_where_gain_ffn_acts,
    "full, fp32 under autocast": _method(name="full"),
}
FULL = "full, fp32 under autocast"


def demo_base(dtype: torch.dtype | None = None) -> Base:
    """Load the embedded model, in the machine's own precision unless a dtype is given."""
    return load_base(build_plan({}).model, dtype=dtype)


def demo_blocks(base: Base, blocks: int) -> torch.Tensor:
    """Real text of one domain, `(blocks, BLOCK)`."""
    plan = build_plan({"data": {"domains": [DOMAIN], "train_tokens": blocks * BLOCK, "block_size": BLOCK}})
    return load_domain(plan.data.domains[0], plan.data, base.tokenizer).train.input_ids


def peak_gib() -> float:
    """Peak resident memory of this process so far, GiB (peak allocated memory of the device on CUDA).

    Linux's own high-water mark: `getrusage` would hand a child the peak of the process that started it.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 2**20


def spread(values: Sequence[float]) -> str:
    """Median with the smallest and largest value."""
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def provenance(base: Base) -> str:
    """Date, processor, versions: what stands beside every figure."""
    machine = describe_environment(base.model.device)
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    today = datetime.date.today().isoformat()
    return (
        f"{today}; {machine['processor']}, {machine['threads']} threads, device {machine['device']}; "
        f"base {base.name} in {str(base.model.dtype).removeprefix('torch.')}; Python {machine['python']}, {packages}"
    )
