"""Options for benchmarks, and the tables of their scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field
from rich.table import Table

from gaintune.adapters import BASE
from gaintune.cli.console import percent, table
from gaintune.cli.options import refuse
from gaintune.config import EvaluateConfig, Flag, Section

if TYPE_CHECKING:
    from gaintune.evaluate.benchmarks import BenchmarkComparison, BenchmarkConfig, BenchmarkReport, BenchmarkScore


class BenchmarkSettings(Section):
    """Options for benchmarks, beside their names; None for what was not given."""

    fewshot: int | None = Field(
        default=None, description="Worked examples before each question; as lm-eval's task file has it unless given."
    )
    fewshot_seed: int | None = Field(
        default=None,
        serialization_alias="seed",
        description="Seed of the draw of worked examples; lm-eval's unless given.",
    )
    limit: int | None = Field(default=None, description="Rows of each benchmark, the first ones; all unless given.")
    benchmark_data: Annotated[list[str] | None, Flag(metavar="FOLDER|NAME=PATH")] = Field(
        default=None,
        serialization_alias="data",
        description="Local rows: a folder with a folder for each benchmark; repeatable.",
    )
    benchmark_source: str | None = Field(
        default=None,
        serialization_alias="source",
        description="Source of rows: auto, hub or local; auto asks the Hub for what is not local.",
    )
    generated_tokens: int | None = Field(default=None, description="Longest generated answer, in tokens.")
    allow_code_execution: bool = Field(
        default=False, description="Run the programs that the model writes, which humaneval needs."
    )

    def config(self, uncertainty: EvaluateConfig, benchmarks: str | Sequence[str] | None) -> BenchmarkConfig | None:
        """Return which benchmarks to measure and how; None for none.

        Args:
            uncertainty: the plan's batch size and settings of intervals.
            benchmarks: their names.

        Raises:
            ConfigError: an option for benchmarks without any, or a wrong value.
        """
        if not benchmarks:
            refuse("is for benchmarks: name some with --benchmarks", self.model_dump(exclude_unset=True))
            return None
        from gaintune.evaluate.benchmarks import read_config

        common = uncertainty.model_dump()
        common["bootstrap_seed"] = common.pop("seed")
        return read_config({**common, "tasks": benchmarks, **self.model_dump(exclude_unset=True, by_alias=True)})


def tables(report: BenchmarkReport) -> Iterator[Table | str]:
    """Draw the scores of the benchmarks, and yield a line about the rows of each."""
    rows = []
    about = {}
    names = _short(list(report.adapted))
    for score in (score for name in report.asked for score in report.base if score.task == name):
        compared = [one for one in report.comparisons if (one.task, one.metric) == (score.task, score.metric)]
        share = all(one.unit == "points" for one in compared) if compared else score.is_share
        rows.append([score.task, score.metric, BASE, _value(score, share), "—"])
        rows += [["", "", names[one.label], _value(one.adapted, share), _difference(one)] for one in compared]
        facts = score.facts
        origin = f"{score.rows:,} {facts.split} rows of {facts.source}"
        about[score.task] = "; ".join([f"{score.task}: {origin}", f"{facts.fewshot} worked examples", *facts.notes])
    heads = ["benchmark", "metric", "model", "score ± standard error", "against the base"]
    yield table("", heads, rows, numeric=(3, 4))
    yield from about.values()


def _short(labels: Sequence[str]) -> dict[str, str]:
    """Shorten paths by the folders that all begin and end with, a single one to its last part; never to `base`."""
    parts = [list(Path(label).parts) for label in labels]
    for end in (0, -1):
        while len(parts) > 1 and all(len(path) > 1 and path[end] == parts[0][end] for path in parts):
            for path in parts:
                path.pop(end)
    names = ["/".join(path if len(parts) > 1 else path[-1:]) for path in parts]
    return dict(zip(labels, labels if BASE in names else names, strict=True))


def _value(score: BenchmarkScore, share: bool) -> str:
    factor, unit = (100.0, " %") if share else (1.0, "")
    error = "" if score.stderr is None else f" ± {factor * score.stderr:.2f}"
    return f"{factor * score.value:.2f}{error}{unit}"


def _difference(comparison: BenchmarkComparison) -> str:
    difference = comparison.difference
    if difference is None:
        return "—"
    if comparison.unit == "%":
        return percent(difference)
    text = percent(difference, "+.2f", unit="")
    return f"{text} points" if comparison.unit == "points" else text
