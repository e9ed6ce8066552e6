"""The kinds of steps that a recipe may have, by name.

To add one: write a function that reads a step's settings and returns a `PreparedStep`, in a module of this package, and
list it here. Every analysis is a kind of its own.
"""

from gaintune.recipes.outcome import StepKind
from gaintune.recipes.steps import absorb, analyze, answers, benchmarks, classify, differences, sweep, train

KINDS: dict[str, StepKind] = {
    "sequence": train.sequence,
    "separately": train.separately,
    "sweep": sweep.sweep,
    "benchmarks": benchmarks.benchmarks,
    "classify": classify.classify,
    "answers": answers.answers,
    "absorb": absorb.absorb,
    "differences": differences.differences,
    **analyze.KINDS,
}
