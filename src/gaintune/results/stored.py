"""The matrix of a run from the losses it stored: intervals made anew without a model."""

from __future__ import annotations

import logging
from pathlib import Path

from gaintune.config import EvaluateConfig
from gaintune.results.losses import DomainLoss, MethodRun, Stage
from gaintune.results.matrix import build_matrix
from gaintune.results.records import Matrix, MethodMatrix
from gaintune.storage import Run, read_stored

logger = logging.getLogger(__name__)


def recomputed(folder: Path, matrix: Matrix, settings: EvaluateConfig) -> Matrix:
    """What a run's matrix is by today's statistics, from the losses of every block that its cells were made of.

    The matrix itself, with a warning, where a file of losses is not there, such as of a run of which only matrix.json
    was kept.

    Args:
        folder: run directory.
        matrix: its matrix.json.
        settings: resamples, confidence and seed of its plan.
    """
    run = Run(folder)
    try:
        return build_matrix([_losses(run, method) for method in matrix.methods], settings, planned=matrix.planned)
    except FileNotFoundError as missing:
        logger.warning("%s is not there: intervals stay as %s has them", missing, run.matrix)
        return matrix


def _losses(run: Run, method: MethodMatrix) -> MethodRun:
    """Every loss behind a method's matrix."""
    numbers = str(method.info.get("numbers"))
    base = {name: _read(run.base(numbers, name)) for name in method.base}
    stages = [
        Stage(
            row.domain,
            {
                name: _read(run.stage(method.label, index, row.domain) / "evaluations" / f"{name}.json")
                for name in row.cells
            },
        )
        for index, row in enumerate(method.stages)
    ]
    return MethodRun(method.label, base, tuple(stages), dict(method.info))


def _read(file: Path) -> DomainLoss:
    if not file.is_file():
        raise FileNotFoundError(file)
    return read_stored(file, DomainLoss.from_dict)
