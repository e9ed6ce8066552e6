"""A tiny base, rows of two benchmarks, adapters moved as training would, and a progress that remembers titles."""

import contextlib

from gaintune.evaluate.benchmarks import BenchmarkConfig
from support import tiny_adapters
from support.files import edit_json as edit  # noqa: F401  # tests take it from here
from support.tiny_adapters import logits as logits
from support.tiny_adapters import save as adapter  # noqa: F401

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


def base_of(tiny):
    return tiny_adapters.base_of(tiny, "fp32")


def config_of(data, **changes):
    values = {"tasks": NAMES, "source": "local", "data": (str(data),), "bootstrap_samples": 200, "batch_size": 4}
    return BenchmarkConfig.model_validate({**values, **changes})
