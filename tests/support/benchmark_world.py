"""A tiny base, rows of two benchmarks, adapters moved as training would, and a progress that remembers titles."""

import contextlib

import torch

from gaintune.adapters import save_adapter
from gaintune.config import MethodConfig
from gaintune.evaluate.benchmarks import BenchmarkConfig
from gaintune.methods import attach
from support import tiny_adapters, tiny_base, tiny_benchmarks
from support.files import edit_json as edit  # noqa: F401  # tests take it from here
from support.tiny_adapters import logits as logits

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
    return tiny_adapters.base_of(tiny, "fp32")


def config_of(data, **changes):
    values = {"tasks": NAMES, "source": "local", "data": (str(data),), "bootstrap_samples": 200, "batch_size": 4}
    return BenchmarkConfig.model_validate({**values, **changes})


def adapter(tiny, folder, method, seed=1):
    """An adapter whose weights were moved as training would."""
    base = base_of(tiny)
    model = tiny_adapters.moved(attach(base.model, MethodConfig.model_validate(method), seed=0), 0.1, seed)
    save_adapter(model, folder, tiny_adapters.record_of(base, method, domains=("prose",)))
    return folder
