"""Gates: when a DISeL adapter's gates open."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from gaintune.analysis.base import Analysis, Options
from gaintune.config import as_domain
from gaintune.errors import ConfigError

Tokens = Literal["auto", "response", "all"]
CLOSED, OPEN = 0.05, 0.5
"""A gate below `CLOSED` lets hardly anything of its part through; one above `OPEN` most of it. Both are bin edges."""
EDGES_EVERY = 20  # a number of bins has both edges if it is a multiple of this


def check_bins(bins: int) -> None:
    """Refuse a number of bins of which 0.05 or 0.5 would not be an edge."""
    if bins < EDGES_EVERY or bins % EDGES_EVERY:
        raise ConfigError(f"bins is {bins}: give a multiple of {EDGES_EVERY}, so that {CLOSED} and {OPEN} are edges")


class GatesOptions(Options):
    """Choice of the tokens whose gates count, and of the histograms' bins."""

    instruct: tuple[str, ...] = Field(
        default=(),
        description="domain of prompts and completions: name or name=path; repeatable, beside --domain.",
    )
    tokens: Tokens = Field(
        default="auto",
        description="tokens whose gates count: response (those the loss scores), all (but padding), or auto: response "
        "in instruction domains and all in texts",
    )
    bins: int = Field(default=100, description="bins of a histogram over [0, 1], a multiple of 20")

    @model_validator(mode="after")
    def _usable(self) -> GatesOptions:
        check_bins(self.bins)
        return self


class GatesAnalysis(Analysis):
    """DISeL paper (arXiv 2605.19028), section 5 and appendix V, Figures 4, 5 and 10 to 14."""

    name = "gates"
    help = (
        "Record a DISeL adapter's gates on domains' validation text: histograms by depth, heatmap, table.\n\n"
        "Writes gates.csv, gates-layers.csv, gates-apart.csv (differences of means, with intervals over rows of text), "
        "gates-rows.csv, gates.md, gates.json and two figures as PNG and SVG. A gate counts if the token at its own "
        "position does."
    )
    examples = "gaintune gates adapters/gsm8k --domain law --instruct gsm8k=gsm8k.jsonl"
    takes = "adapter"
    argument = "Folder of a DISeL adapter."
    texts = "named"
    default_domains = ("law", "code")
    watches = False
    together = "one"
    label = "disel"
    needs = "gates"
    one_figure = False
    Options = GatesOptions

    def domains(self, named: Sequence[Any], options: GatesOptions) -> Sequence[Any]:
        """Add the domains of prompts and completions."""
        return [*named, *({**as_domain(each), "task": "instruct"} for each in options.instruct)]
