"""Transfer: what separately trained gains share, and what is left of transfer without it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from gaintune.analysis.base import Analysis, Options
from gaintune.config import Flag, as_list

Component = Literal["mean", "principal", "held-out"]
"""What adapters share: their mean vector; what each has along their first principal direction (not centered); or the
mean of all adapters but the one that was trained on the domain being measured, so that nothing of that domain is in it.
"""


class TransferOptions(Options):
    """Choice of the components that count as shared, one ablation each."""

    components: Annotated[tuple[Component, ...], BeforeValidator(as_list), Flag("component")] = Field(
        default=("mean",),
        description="what is taken for shared: mean (the mean vector), principal (the first principal direction), "
        "held-out (the mean without the measured domain's adapter); repeatable",
    )


class TransferAnalysis(Analysis):
    """GAIN paper (arXiv 2604.04516), section 5.1, "Why does positive transfer occur?"."""

    name = "transfer"
    help = (
        "What separately trained GAIN adapters share, and what is left of transfer without it, or with it alone.\n\n"
        "Writes transfer.csv, .md and .json, transfer-correlations.csv, and a figure as PNG and SVG."
    )
    examples = "gaintune transfer adapters/law adapters/code --component principal"
    texts = "trained"
    together = "label"
    label = "gain-ffn"
    Options = TransferOptions

    def recipe_defaults(self, adapters: Sequence[Path]) -> Mapping[str, Any]:
        """Measure two ablations."""
        return {"components": ["mean", "held-out"]}
