"""The factors of saved GAIN and (IA)3 adapters, read from their folders without loading a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from gaintune.adapters import WEIGHTS, adapter_method, check_whole, read_config, read_record
from gaintune.config import Plan, build_plan, read_values
from gaintune.errors import AdapterError, RunDirectoryError
from gaintune.methods import Method
from gaintune.storage import Run

PREFIX = "base_model.model."


@dataclass(frozen=True)
class Factors:
    """What an adapter multiplies features by.

    Attributes:
        method: what made it.
        values: module name in the base, such as `model.layers.0.mlp.down_proj` -> factors, float64 `(features,)`: of
            the module's input for GAIN, of its input or output for (IA)3.
    """

    method: Method
    values: Mapping[str, np.ndarray]


def has_factors(folder: Path) -> bool:
    """Whether an adapter's method multiplies features; AdapterError for what is no adapter."""
    method = adapter_method(folder)
    return method is not None and method.factors is not None


def read_factors(folder: Path) -> Factors:
    """Read the factors of a GAIN or (IA)3 adapter, `1 + v` for GAIN.

    Raises:
        AdapterError: not an adapter, damaged, of a method without factors, or a factor that is not finite.
    """
    record = read_record(folder)
    check_whole(folder)
    method = adapter_method(folder)
    if method is None or method.factors is None:
        name = record.method if record is not None else read_config(folder).get("peft_type")
        raise AdapterError(
            f"{folder}: an adapter of method {name} has no gains; give one of method gain, gain-ffn or ia3"
        )
    parameter, start = method.factors
    path = folder / WEIGHTS
    values = {}
    try:
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (a safetensors file, not a mapping)
                module, _, last = name.rpartition(".")
                if last == parameter:
                    values[module.removeprefix(PREFIX)] = start + tensors.get_tensor(name).to(torch.float64).flatten()
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path}: not a safetensors file, or cut short ({error})") from None
    broken = [name for name, factors in values.items() if not bool(torch.isfinite(factors).all())]
    if broken or not values:
        raise AdapterError(f"{path}: {f'gains of {broken[0]} are not finite' if broken else 'no gains in it'}")
    return Factors(method, {name: factors.numpy() for name, factors in values.items()})


@dataclass(frozen=True)
class StageAdapter:
    """The adapter of one stage of one method of a run; `index` counts stages from 0."""

    label: str
    index: int
    domain: str
    adapter: Path


@dataclass(frozen=True)
class RunAdapters:
    """The adapters a run has so far, in the order of its plan, and how many stages it is to have."""

    adapters: tuple[StageAdapter, ...]
    planned: int


def adapters_of_run(run: Path) -> RunAdapters:
    """Find the adapters of a run directory; RunDirectoryError where it is none, or has no adapter yet."""
    if not (run / "plan.yaml").is_file():
        raise RunDirectoryError(f"{run} has no plan.yaml, so it is not a run; name a run directory or an adapter")
    plan: Plan = build_plan(read_values(run / "plan.yaml"), origin=str(run / "plan.yaml"))
    found = [
        StageAdapter(method.label, index, domain.name, folder)
        for method in plan.methods
        for index, domain in enumerate(plan.data.domains)
        if (folder := Run(run).stage(method.label, index, domain.name) / "adapter").is_dir()
    ]
    if not found:
        raise RunDirectoryError(f"{run} has no adapter yet: run `gaintune sequence` on it until a stage is learnt")
    return RunAdapters(tuple(found), len(plan.data.domains))
