"""Gains: what the factors of GAIN and (IA)3 adapters are after every stage."""

from __future__ import annotations

from typing import Any

from gaintune.analysis.base import Analysis, Options, Subject
from gaintune.progress import Progress


class GainsAnalysis(Analysis):
    """GAIN paper (arXiv 2604.04516), appendix C (table 5) and appendix J (tables 9 and 10)."""

    name = "gains"
    help = (
        "Read trained gains, stage by stage: smallest, largest, share within [0.95, 1.05], sign flips, regime.\n\n"
        "Loads no model. Writes gains.csv, gains-layers.csv, gains.md, gains.json and two figures as PNG and SVG."
    )
    examples = "gaintune gains runs/demo adapters/law --out runs/gains"
    takes = "runs"
    argument = "Run directories, or GAIN and (IA)3 adapters."
    needs = "factors"
    one_figure = False

    def measure(self, subject: Subject, options: Options, progress: Progress) -> Any:
        """Read the factors of every stage."""
        return self.part("survey").survey_gains(subject.adapters)
