"""The kinds of steps a recipe may have, by name."""

from __future__ import annotations

from gaintune.recipes import adapting, analysing
from gaintune.recipes.outcome import Kind

KINDS: dict[str, Kind] = {
    "sequence": adapting.sequence,
    "separately": adapting.separately,
    "gates": analysing.gates,
    "linear-model": analysing.linear_model,
}
