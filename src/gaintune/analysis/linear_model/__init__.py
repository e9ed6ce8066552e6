"""The linear model: what fixed and input-dependent corrections can reach."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from gaintune.analysis.base import Analysis, Options, Subject
from gaintune.progress import Progress

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class LinearModelOptions(Options):
    """One experiment.

    Gates learn at twice the rate of A and B here, not at DISeL's usual five times: with five, a rank part ends in a
    local optimum on about one seed in six (5 of 32 at these sizes with a batch of 128; none of 32 with two).
    """

    dimension: int = Field(default=32, ge=1, description="size of inputs and outputs")
    rank: int = Field(default=4, ge=1, description="rank of dW, and of what is trained")
    separation: Positive = Field(default=3.0, description="distance between the means, in standard deviations")
    steps: int = Field(default=1500, ge=1, description="training steps of every method, Adam with a cosine schedule")
    seeds: int = Field(default=5, ge=1, description="how many seeds, from 0: each draws maps, start values and samples")
    batch_size: int = Field(default=256, ge=1, description="samples in a step, drawn anew each time")
    lr: Positive = Field(
        default=0.01, description="learning rate at the start; gates learn at --gate-lr-ratio times it"
    )
    gate_lr_ratio: Positive = Field(default=2.0, description="learning rate of gates over that of A and B")

    @model_validator(mode="after")
    def _rank_within_dimension(self) -> LinearModelOptions:
        if self.rank > self.dimension:
            raise ValueError(f"rank is {self.rank}, above the dimension ({self.dimension}): give a smaller rank")
        return self


class LinearModelAnalysis(Analysis):
    """DISeL paper (arXiv 2605.19028), section 2, Figure 1 and appendix I."""

    name = "linear-model"
    help = (
        "Run the DISeL paper's linear model: full, LoRA and DISeL against the best fixed and the Bayes correction.\n\n"
        "Losses are mean squared errors per output coordinate. Writes linear-model.csv, .md, .json, .png and .svg."
    )
    examples = "gaintune linear-model --dimension 16 --seeds 3"
    takes = "nothing"
    Options = LinearModelOptions

    def measure(self, subject: Subject, options: LinearModelOptions, progress: Progress) -> Any:
        """Train every method on every seed."""
        return self.part("survey").run_experiment(options, progress)
