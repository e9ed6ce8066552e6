"""Transfer: what separately trained gains share, and what is left of transfer without it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from gaintune.analysis.base import Analysis, Options
from gaintune.config import Flag, as_list

Component = Literal["mean", "principal", "held-out", "cross-fitted"]
"""What adapters share: their mean vector; what each has along their first principal direction (not centered); the mean
of all adapters but the one that was trained on the domain being measured, so that nothing of that domain is in it; or
what each has along the mean of the others, again without the measured domain's. `shared_component` has the formulas.
"""
Control = Literal["signs", "norm"]
"""What is measured beside the shared part: the same magnitudes with random signs, or the whole adapter at its norm."""


class TransferOptions(Options):
    """Choice of the components that count as shared, one ablation each, and of the controls in all of them."""

    components: Annotated[tuple[Component, ...], BeforeValidator(as_list), Flag("component")] = Field(
        default=("mean",),
        description="what is taken for shared: mean (the mean vector), principal (the first principal direction), "
        "held-out (the mean without the measured domain's adapter), cross-fitted (the projection on the mean of the "
        "other adapters, without the measured domain's); repeatable",
    )
    controls: Annotated[tuple[Control, ...], BeforeValidator(as_list), Flag("control")] = Field(
        default=(),
        description="what is measured beside the shared part: signs (its magnitudes with random signs, drawn by "
        "evaluate.seed), norm (the whole adapter, scaled to its norm); repeatable",
    )


class TransferAnalysis(Analysis):
    """GAIN paper (arXiv 2604.04516), section 5.1, "Why does positive transfer occur?"."""

    name = "transfer"
    help = (
        "What separately trained GAIN adapters share, and what is left of transfer without it, or with it alone.\n\n"
        "Writes transfer.csv, .md and .json, transfer-correlations.csv, and a figure as PNG and SVG."
    )
    examples = """\
gaintune transfer adapters/law adapters/code --component principal
gaintune transfer runs/a runs/b runs/c --component cross-fitted --control norm"""
    texts = "trained"
    together = "label"
    label = "gain-ffn"
    Options = TransferOptions

    def recipe_defaults(self, adapters: Sequence[Path]) -> Mapping[str, Any]:
        """Measure two ablations."""
        return {"components": ["mean", "held-out"]}
