"""Adapters and runs on disk as training leaves them, with factors of a test's choosing; made without any model."""

from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from gaintune.adapters import CONFIG, WEIGHTS, AdapterRecord
from gaintune.adapters.record import RECORD
from gaintune.config import build_plan, plan_yaml
from gaintune.storage import Run, write_json, write_manifest, write_text

PARAMETER = {"GAIN": "gain_v", "IA3": "ia3_l", "LORA": "lora_A.weight"}


def adapter(
    folder: Path, tensors: dict[str, torch.Tensor], *, kind="GAIN", method="gain-ffn", domains=("prose",)
) -> Path:
    """Write an adapter whose parameter of each module is given, as it is stored (GAIN: the gain minus 1)."""
    folder.mkdir(parents=True)
    saved = {f"base_model.model.{name}.{PARAMETER[kind]}": tensor.contiguous() for name, tensor in tensors.items()}
    save_file(saved, folder / WEIGHTS)
    write_json(folder / CONFIG, {"peft_type": kind, "base_model_name_or_path": "tiny"})
    record = AdapterRecord("tiny", "f" * 64, method, method, tuple(domains))
    write_json(folder / RECORD, {"format": 1, **asdict(record)})
    write_manifest(folder)
    return folder


def run(folder: Path, methods: dict[str, tuple[str, list[dict[str, torch.Tensor]]]], domains: list[str]) -> Path:
    """Write a run directory: label -> PEFT's type and the tensors after each stage so far."""
    values = {
        "model": {"name": "tiny"},
        "data": {"domains": [{"name": name, "source": f"{name}.jsonl"} for name in domains]},
        "methods": [
            {"name": "gain-ffn" if kind == "GAIN" else kind.lower(), "label": label}
            for label, (kind, _) in methods.items()
        ],
    }
    write_text(folder / "plan.yaml", plan_yaml(build_plan(values)))
    for label, (kind, stages) in methods.items():
        for index, tensors in enumerate(stages):
            place = Run(folder).stage(label, index, domains[index]) / "adapter"
            adapter(place, tensors, kind=kind, method=label, domains=domains[: index + 1])
    return folder
