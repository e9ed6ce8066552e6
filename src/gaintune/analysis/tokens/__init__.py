"""Tokens: how the loss of every token moves between a base and an adapter."""

from __future__ import annotations

from pydantic import Field, model_validator

from gaintune.analysis.base import Analysis, Options
from gaintune.errors import ConfigError


def check_histogram(bins: int, limit: float | None) -> None:
    """Refuse an even number of bins, of which none would be centered on zero, and an empty or endless range."""
    if bins < 3 or bins % 2 == 0:
        raise ConfigError(f"bins is {bins}: give an odd number from 3 up, so that one bin is centered on zero")
    if limit is not None and not 0 < limit < float("inf"):
        raise ConfigError(f"limit is {limit}: the histogram's range in nats must be above 0")


class TokensOptions(Options):
    """Bins and range of the histograms of changes."""

    bins: int = Field(default=101, description="bins of a histogram, an odd number")
    limit: float | None = Field(
        default=None,
        description="nats at which histograms end; where 99.5 % of a domain's changes lie unless given.",
    )

    @model_validator(mode="after")
    def _usable(self) -> TokensOptions:
        check_histogram(self.bins, self.limit)
        return self


class TokensAnalysis(Analysis):
    """GAIN paper (arXiv 2604.04516), section 5.1 and figure 1."""

    name = "tokens"
    help = (
        "Change of the loss of every token between base and adapter: histogram, mean, skew and coherence.\n\n"
        "Writes tokens.csv, tokens-histogram.csv, tokens.md, .json, .png and .svg. Coherence is |mean| / mean size."
    )
    examples = "gaintune tokens adapters/gains adapters/lora --watch law"
    texts = "named"
    Options = TokensOptions
