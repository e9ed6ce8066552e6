"""The best of an adaptation's snapshots, for plans with `train.keep: best`."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from gaintune.adapters import load_adapter
from gaintune.models import Base
from gaintune.training import snapshots_of

T = TypeVar("T")


def best_snapshot(
    copies: Path, load: Callable[[], Base], measure: Callable[[nn.Module], T], merit: Callable[[T], float]
) -> tuple[int, dict[int, T]]:
    """Measure every snapshot in a folder; return the update of the best one, and all results by update.

    Each snapshot is loaded onto a base of its own, so that its files are measured. Of equal snapshots the first counts.

    Raises:
        AdapterError: there are no snapshots, or one is damaged.
    """
    results: dict[int, T] = {}
    for step, folder in snapshots_of(copies).items():
        model = load_adapter(load(), folder)
        results[step] = measure(model)
        del model
        gc.collect()  # an adapted model refers to itself
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return max(results, key=lambda step: merit(results[step])), results
