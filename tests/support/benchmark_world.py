"""A tiny base, rows of two benchmarks, adapters moved as training would, and a progress that remembers titles."""

import contextlib
import json

import torch

from gaintune.config import ModelConfig
from gaintune.evaluate.benchmarks import BenchmarkConfig
from gaintune.models import load_base
from support import tiny_base, tiny_benchmarks
from support.tiny_adapters import save as adapter

__all__ = ["NAMES", "ROWS", "Watch", "adapter", "base_of", "config_of", "edit", "logits", "write_base", "write_rows"]

NAMES = ("arc_easy", "lambada_openai")
ROWS = 12


class Watch:
    """Remembers the titles of what was measured."""

    def __init__(self):
        self.titles = []

    @contextlib.contextmanager
    def task(self, title, total, unit):
        done = []
        yield lambda amount, **figures: done.append(amount)
        assert sum(done) == total, "every request is counted"
        self.titles.append(title)

    def note(self, text):
        pass


def write_base(folder):
    return tiny_base.folder(folder / "tiny", dtype=torch.float32, max_position_embeddings=1024)


def write_rows(folder):
    for name in NAMES:
        tiny_benchmarks.write(folder / f"{name}.jsonl", tiny_benchmarks.hub_rows(name, ROWS))
    return folder


def base_of(tiny):
    return load_base(ModelConfig(name=str(tiny), device="cpu", dtype="fp32"))


def config_of(data, **changes):
    values = {"tasks": NAMES, "source": "local", "data": (str(data),), "bootstrap_samples": 200, "batch_size": 4}
    return BenchmarkConfig.model_validate({**values, **changes})


def logits(model):
    with torch.inference_mode():
        return model(tiny_base.blocks()).logits


def edit(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
