"""Measure a model and adapters on it: perplexity, masked tokens, choices, labels; `benchmarks` runs lm-eval.

May import `adapters`, `methods`, `data`, `models`, `results` and what lies below.
A new measure is a function of a loaded model that runs in `run_batches`, and a `compare_...` over a base and adapters
that hands it to `measure_base_and_adapters`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
