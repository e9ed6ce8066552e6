"""The analyses, by name. To add one: its folder (see `base.py`), and a line here."""

from __future__ import annotations

from gaintune.analysis.base import Analysis
from gaintune.analysis.gains import GainsAnalysis
from gaintune.analysis.gates import GatesAnalysis
from gaintune.analysis.landscape import LandscapeAnalysis
from gaintune.analysis.linear_model import LinearModelAnalysis
from gaintune.analysis.retention import RetentionAnalysis
from gaintune.analysis.subspace import SubspaceAnalysis
from gaintune.analysis.tokens import TokensAnalysis
from gaintune.analysis.transfer import TransferAnalysis

ANALYSES: dict[str, Analysis] = {
    analysis.name: analysis
    for analysis in (
        GatesAnalysis(),
        LinearModelAnalysis(),
        GainsAnalysis(),
        SubspaceAnalysis(),
        TokensAnalysis(),
        LandscapeAnalysis(),
        TransferAnalysis(),
        RetentionAnalysis(),
    )
}
