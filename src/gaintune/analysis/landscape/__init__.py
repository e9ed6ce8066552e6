"""Landscape: the loss between a pretrained model and adapted ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from gaintune.analysis.base import Analysis, Numbers, Options, Result
from gaintune.config import Flag, as_list

Positions = Annotated[tuple[float, ...], BeforeValidator(as_list)]


class LandscapeOptions(Options):
    """Positions at which the loss is measured; 0 (pretrained) and 1 (adapted) are always among them."""

    plane: bool = Field(default=False, description="measure the plane that two adapters span, too.")
    line: Annotated[Positions, Flag(metavar="T,T,...", help="Places along a line. [default: -0.25 to 1.25]")] = Field(
        default=tuple(step / 8 for step in range(-2, 11)), min_length=1
    )
    grid: Annotated[Positions, Flag(metavar="T,T,...", help="Places along a side. [default: -0.25 to 1.25]")] = Field(
        default=tuple(step / 4 for step in range(-1, 6)), min_length=1
    )


class LandscapeAnalysis(Analysis):
    """GAIN paper (arXiv 2604.04516), Figures 3 and 4, and appendix E."""

    name = "landscape"
    help = (
        "Loss from the pretrained model (0) to adapted ones (1) and a little beyond, and on the plane of two.\n\n"
        "GAIN's v is scaled, LoRA's B A, DISeL's B with its gates as they are, and the weights of all others, in fp32. "
        "Writes landscape.csv, .md and .json, and two figures as PNG and SVG."
    )
    examples = "gaintune landscape adapters/law adapters/code --plane --line 0,0.5,1"
    texts = "trained"
    together = "label"
    one_figure = False
    Options = LandscapeOptions

    def recipe_defaults(self, adapters: Sequence[Path]) -> Mapping[str, Any]:
        """Measure the plane wherever there are two adapters."""
        return {"plane": len(adapters) == 2}

    def across(self, results: Mapping[str, Result]) -> Numbers:
        """Return the numbers of every plane, and of every two."""
        from gaintune.analysis.landscape import report

        return report.plane_numbers({label: result.survey for label, result in results.items()})
