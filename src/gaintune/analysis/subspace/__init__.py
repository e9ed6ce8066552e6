"""Subspaces: what of an update leaves the pretrained column space, and intruder dimensions."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from gaintune.analysis.base import Analysis, Options


class SubspaceOptions(Options):
    """Settings of the comparison; `top` and `epsilon` are as in the published code of arXiv 2410.21228."""

    top: int = Field(default=10, ge=1, description="leading singular vectors of each adapted weight to compare")
    epsilon: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="a vector is an intruder if its largest |cosine| to a pretrained one is below this",
    )
    leading: float = Field(
        default=0.9, gt=0, le=1, description="share of a weight's energy that its leading directions hold"
    )
    tolerance: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="singular values up to this share of the largest count as zero in a weight's rank; max(out, in) "
        "times fp32's epsilon unless given.",
    )
    relative_update: float | None = Field(
        default=None,
        gt=0,
        description="count intruders a second time with every module's update scaled to this |dW|/|W|, such as 0.01",
    )
    gate: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="DISeL and Gated LoRA: the value at which every gate is held; without it they are refused.",
    )

    def counted(self) -> dict[str, Any]:
        """Return plain values of all options but the gates' value, and of `relative_update` only if it is given."""
        return self.model_dump(exclude={"gate"} if self.relative_update else {"gate", "relative_update"})


class SubspaceAnalysis(Analysis):
    """GAIN paper (arXiv 2604.04516), proposition 1; intruder dimensions as in arXiv 2410.21228, algorithm 1."""

    name = "subspace"
    help = (
        "Share of an update's energy outside the pretrained weight's column space, and intruder dimensions.\n\n"
        "Writes subspace.csv, .md, .json, .png and .svg. Two singular value decompositions for every adapted weight, "
        "in float64, on the model's device."
    )
    examples = """\
gaintune subspace adapters/gains adapters/lora --top 10
gaintune subspace adapters/gains adapters/lora --relative-update 0.01
gaintune subspace adapters/gated --gate 0.05"""
    Options = SubspaceOptions
