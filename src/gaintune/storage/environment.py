"""The environment of a run: versions, processor, device and threads."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import torch

PACKAGES = (
    "gaintune", "torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors", "datasets", "bitsandbytes",
)  # fmt: skip


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as handle:  # noqa: PTH123  (a kernel file, not a path of ours)
            names = [line.partition(":")[2].strip() for line in handle if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Describe software and hardware, without host names, paths or credentials."""
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processor": _processor(),
        "threads": torch.get_num_threads(),
    }
