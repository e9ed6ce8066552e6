"""The kinds of steps a recipe may have, by name."""

from __future__ import annotations

from gaintune.recipes.outcome import Kind
from gaintune.recipes.steps import analyse, answers, benchmarks, checks, classify, sweep, train

KINDS: dict[str, Kind] = {
    "sequence": Kind(train.sequence, checks.sequence),
    "separately": Kind(train.separately, checks.separately),
    "sweep": Kind(sweep.sweep, checks.sweep),
    "benchmarks": Kind(benchmarks.benchmarks, checks.benchmarks),
    "classify": Kind(classify.classify, checks.classify),
    "answers": Kind(answers.answers, checks.answers),
    **analyse.STEPS,
}
