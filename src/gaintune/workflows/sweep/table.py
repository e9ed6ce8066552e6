"""What a sweep found, as tidy tables: a row for each run, and a row for each domain measured after each stage."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from gaintune.report import tidy
from gaintune.results import FIGURES, DomainLoss, Matrix, MethodRun, Stage
from gaintune.storage import Run, read_json, write_bytes, write_text
from gaintune.workflows.sweep.grid import PlannedRun

FACTS = ("numbers", "device")  # of a finished run
INTEGERS = ("rank", "trainable_parameters")  # with gaps, where a method has no rank or a run is not finished


@dataclass(frozen=True)
class SweepRow:
    """One run of a grid: `matrix` has its numbers if it is finished, else `error` says why it is not.

    `diverged` says that it cannot be finished with its settings: a loss or a gradient was not finite.
    """

    run: PlannedRun
    folder: Path
    matrix: Matrix | None
    error: str | None
    diverged: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """Where the run lies in the grid, as columns."""
        run = self.run
        return {
            "id": run.id, "label": run.label, "method": run.method, "rank": run.rank, "lr": run.lr, "order": run.order,
            "domains": " ".join(run.domains), "seed": run.seed, "train_tokens": run.budget,
        }  # fmt: skip

    @property
    def numbers(self) -> str | None:
        """What a finished run computed with, as `Precision.name`; None of one that is not."""
        return None if self.matrix is None else self.matrix.methods[0].info["numbers"]

    @property
    def device(self) -> str | None:
        """The device that a finished run was begun on, by its name; None of one that is not."""
        return None if self.matrix is None else read_json(self.folder / "environment.json")["device"]

    def figures(self) -> dict[str, Any]:
        """The summary in %, each figure with the ends of its interval over blocks; nothing of an unfinished run."""
        if self.matrix is None:
            return {}
        (method,) = self.matrix.methods
        values: dict[str, Any] = {
            "numbers": self.numbers, "device": self.device,
            "trainable_parameters": method.info.get("trainable_parameters"),
        }  # fmt: skip
        for name in FIGURES:
            interval = getattr(method.summary, name)
            values |= {
                name: None if interval is None else interval.value,
                f"{name}_low": None if interval is None else interval.low,
                f"{name}_high": None if interval is None else interval.high,
            }
        return values

    def losses(self) -> MethodRun:
        """What was measured in a finished run, block by block."""
        assert self.matrix is not None
        (method,) = self.matrix.methods
        run = Run(self.folder)

        def read(folder: Path) -> dict[str, DomainLoss]:
            return {name: DomainLoss.from_dict(read_json(folder / f"{name}.json")) for name in method.base}

        base = read(run.base(method.info["numbers"], self.matrix.domains[0]).parent)
        folders = (run.stage(method.label, index, stage.domain) for index, stage in enumerate(method.stages))
        losses = [read(folder / "evaluations") for folder in folders]
        stages = [Stage(stage.domain, each) for stage, each in zip(method.stages, losses, strict=True)]
        return MethodRun(method.label, base, tuple(stages), dict(method.info))


@dataclass(frozen=True)
class SweepTable:
    """Every run of a grid."""

    rows: tuple[SweepRow, ...]

    @property
    def finished(self) -> tuple[SweepRow, ...]:
        """The runs that have numbers."""
        return tuple(row for row in self.rows if row.matrix is not None)

    @property
    def failed(self) -> tuple[SweepRow, ...]:
        """The runs that have none."""
        return tuple(row for row in self.rows if row.matrix is None)

    def frame(self) -> pd.DataFrame:
        """A row for each run: its settings, `finished` or `failed`, its figures, its error."""
        measured = [f"{name}{end}" for name in FIGURES for end in ("", "_low", "_high")]
        rows = [
            {
                **row.settings,
                "status": "failed" if row.matrix is None else "finished",
                **{**dict.fromkeys((*FACTS, "trainable_parameters", *measured)), **row.figures()},
                "error": row.error,
            }
            for row in self.rows
        ]
        return _typed(pd.DataFrame(rows), measured).astype(dict.fromkeys((*FACTS, "error"), "string"))

    def cells(self) -> pd.DataFrame:
        """A row for each domain measured after each stage of each finished run; changes in % of the base."""
        frames = [tidy(row.matrix).drop(columns="method").assign(**row.settings) for row in self.finished if row.matrix]
        if not frames:
            return pd.DataFrame()
        frame = pd.concat(frames, ignore_index=True)
        first = list(self.finished[0].settings)
        names = [str(name) for name in frame.columns]
        percents = [name for name in names if name.endswith("_percent")]
        return _typed(frame[[*first, *(name for name in names if name not in first)]], percents)

    def write(self, folder: Path) -> None:
        """Write sweep.csv and cells.csv, and both as Parquet."""
        for name, frame in (("sweep", self.frame()), ("cells", self.cells())):
            write_text(folder / f"{name}.csv", frame.to_csv(index=False, lineterminator="\n"))
            buffer = io.BytesIO()
            frame.to_parquet(buffer, index=False)
            write_bytes(folder / f"{name}.parquet", buffer.getvalue())


def _typed(frame: pd.DataFrame, numbers: list[str]) -> pd.DataFrame:
    """The same types whatever is missing, so that tables of several sweeps can be put together."""
    whole = {name: "Int64" for name in INTEGERS if name in frame}
    return frame.astype({**whole, **{name: "float64" for name in numbers if name in frame}})
