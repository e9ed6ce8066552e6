"""The kinds of steps a recipe may have, by name."""

from __future__ import annotations

from gaintune.recipes.outcome import Kind
from gaintune.recipes.steps import (
    analyse as analysing,
)
from gaintune.recipes.steps import analyse as surveying
from gaintune.recipes.steps import (
    answers as answering,
)
from gaintune.recipes.steps import (
    benchmarks as benchmarking,
)
from gaintune.recipes.steps import (
    checks,
)
from gaintune.recipes.steps import (
    classify as classifying,
)
from gaintune.recipes.steps import (
    sweep as sweeping,
)
from gaintune.recipes.steps import (
    train as adapting,
)

KINDS: dict[str, Kind] = {
    "sequence": Kind(adapting.sequence, checks.sequence),
    "separately": Kind(adapting.separately, checks.separately),
    "sweep": Kind(sweeping.sweep, checks.sweep),
    "benchmarks": Kind(benchmarking.benchmarks, checks.benchmarks),
    "classify": Kind(classifying.classify, checks.classify),
    "answers": Kind(answering.answers, checks.answers),
    "gates": Kind(analysing.gates, checks.gates),
    "linear-model": Kind(analysing.linear_model, checks.linear_model),
    "gains": Kind(analysing.gains, checks.gains),
    "subspace": Kind(analysing.subspace, checks.subspace),
    "tokens": Kind(analysing.tokens, checks.tokens),
    "landscape": Kind(surveying.landscape, checks.landscape),
    "transfer": Kind(surveying.transfer, checks.transfer),
    "retention": Kind(surveying.retention, checks.retention),
}
