"""Adapt language models to domain after domain without making them forget, and measure what was kept.

Importing this package registers GAIN and DISeL with PEFT: at once if PEFT is already imported, else as soon as it is.
The public names below are loaded when they are first used, so that importing gaintune costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    from gaintune.adapters.disk import AdapterRecord, load_adapter, save_adapter
    from gaintune.config.plan import ModelConfig, Plan
    from gaintune.data.load import load_domain
    from gaintune.errors import GaintuneError
    from gaintune.evaluate.benchmarks.config import BenchmarkConfig
    from gaintune.evaluate.benchmarks.run import run_benchmarks
    from gaintune.evaluate.perplexity import measure
    from gaintune.models.base import load_base
    from gaintune.recipes.runner import run_recipe
    from gaintune.report import write_report
    from gaintune.results.records import Matrix
    from gaintune.tuners.disel import DiselConfig, DiselModel
    from gaintune.tuners.gain import GainConfig, GainModel
    from gaintune.tuners.optim import AdapterOptimizerMixin, create_disel_optimizer, parameter_groups
    from gaintune.workflows.adaptation import AdaptResult, adapt
    from gaintune.workflows.classification import ClassifierResult, adapt_classifier
    from gaintune.workflows.merge import merge_adapter
    from gaintune.workflows.sequence import run_sequence
    from gaintune.workflows.sweep.run import run_sweep

__version__ = "0.1.0"

_HOMES = {
    "AdaptResult": "workflows.adaptation",
    "adapt": "workflows.adaptation",
    "AdapterRecord": "adapters.disk",
    "load_adapter": "adapters.disk",
    "save_adapter": "adapters.disk",
    "ClassifierResult": "workflows.classification",
    "adapt_classifier": "workflows.classification",
    "ModelConfig": "config.plan",
    "Plan": "config.plan",
    "load_domain": "data.load",
    "GaintuneError": "errors",
    "BenchmarkConfig": "evaluate.benchmarks.config",
    "run_benchmarks": "evaluate.benchmarks.run",
    "measure": "evaluate.perplexity",
    "Matrix": "results.records",
    "merge_adapter": "workflows.merge",
    "load_base": "models.base",
    "run_recipe": "recipes.runner",
    "write_report": "report",
    "run_sequence": "workflows.sequence",
    "run_sweep": "workflows.sweep.run",
    "DiselConfig": "tuners.disel",
    "DiselModel": "tuners.disel",
    "GainConfig": "tuners.gain",
    "GainModel": "tuners.gain",
    "AdapterOptimizerMixin": "tuners.optim",
    "create_disel_optimizer": "tuners.optim",
    "parameter_groups": "tuners.optim",
}

__all__ = [
    "AdaptResult",
    "AdapterOptimizerMixin",
    "AdapterRecord",
    "BenchmarkConfig",
    "ClassifierResult",
    "DiselConfig",
    "DiselModel",
    "GainConfig",
    "GainModel",
    "GaintuneError",
    "Matrix",
    "ModelConfig",
    "Plan",
    "adapt",
    "adapt_classifier",
    "create_disel_optimizer",
    "load_adapter",
    "load_base",
    "load_domain",
    "measure",
    "merge_adapter",
    "parameter_groups",
    "run_benchmarks",
    "run_recipe",
    "run_sequence",
    "run_sweep",
    "save_adapter",
    "write_report",
]


@wrapt.when_imported("peft")
def _register(peft: Any) -> None:
    from gaintune.tuners.registry import register

    register()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gaintune' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"gaintune.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
