"""The kinds of steps a recipe may have, by name."""

from __future__ import annotations

from gaintune.recipes import adapting, analysing, answering, benchmarking, classifying, surveying, sweeping
from gaintune.recipes.outcome import Kind

KINDS: dict[str, Kind] = {
    "sequence": adapting.sequence,
    "separately": adapting.separately,
    "sweep": sweeping.sweep,
    "benchmarks": benchmarking.benchmarks,
    "classify": classifying.classify,
    "answers": answering.answers,
    "gates": analysing.gates,
    "linear-model": analysing.linear_model,
    "gains": analysing.gains,
    "subspace": analysing.subspace,
    "tokens": analysing.tokens,
    "landscape": surveying.landscape,
    "transfer": surveying.transfer,
    "retention": surveying.retention,
}
