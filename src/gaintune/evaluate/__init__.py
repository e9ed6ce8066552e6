"""Measure a model and adapters on it: perplexity, masked tokens, choices, labels; `benchmarks` runs lm-eval.

May import `adapters`, `methods`, `data`, `models`, `results` and what lies below.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
