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
from gaintune.config import EvaluateConfig, Flag, Plan, Section

if TYPE_CHECKING:
    from gaintune.evaluate.benchmarks import (
        BenchmarkComparison,
        BenchmarkConfig,
        BenchmarkReport,
        BenchmarkScore,
        Suite,
    )
    from gaintune.progress import Progress


class BenchmarkSettings(Section):
    """Options for benchmarks, beside their names; None for what was not given."""

    fewshot: int | None = Field(
        default=None,
        description="Worked examples before each question; what lm-eval's task file says unless given.",
    )
    fewshot_seed: int | None = Field(
        default=None, description="Seed of the draw of worked examples; lm-eval's unless given."
    )
    limit: int | None = Field(default=None, description="Rows of each benchmark, the first ones; all unless given.")
    benchmark_data: Annotated[list[str] | None, Flag(metavar="FOLDER|NAME=PATH")] = Field(
        default=None, description="Local rows: a folder with a folder for each benchmark; repeatable."
    )
    benchmark_source: str | None = Field(
        default=None,
        description="Where rows are from: auto, hub or local; auto asks the Hub for what is not local.",
    )
    generated_tokens: int | None = Field(default=None, description="Longest generated answer, in tokens.")
    allow_code_execution: bool = Field(
        default=False, description="Run the programs that the model writes, which humaneval needs."
    )

    def config(self, uncertainty: EvaluateConfig, benchmarks: str | Sequence[str] | None) -> BenchmarkConfig | None:
        """Return which benchmarks are asked for and how; None for none.

        Args:
            uncertainty: the plan's batch size and what intervals rest on.
            benchmarks: their names.

        Raises:
            ConfigError: an option for benchmarks without any, or a wrong value.
        """
        given = {name: getattr(self, name) for name in type(self).model_fields if name in self.model_fields_set}
        if not benchmarks:
            refuse("is for benchmarks: name some with --benchmarks", given)
            return None
        from gaintune.evaluate.benchmarks import read_config

        return read_config(
            {
                "tasks": benchmarks,
                **{CONFIG_FIELDS.get(name, name): value for name, value in given.items()},
                "batch_size": uncertainty.batch_size,
                "bootstrap_samples": uncertainty.bootstrap_samples,
                "confidence": uncertainty.confidence,
                "bootstrap_seed": uncertainty.seed,
            }
        )


CONFIG_FIELDS = {"fewshot_seed": "seed", "benchmark_data": "data", "benchmark_source": "source"}


def suite_of(config: BenchmarkConfig) -> Suite:
    """The tasks of a config with their rows, before a model is loaded."""
    from gaintune.evaluate.benchmarks import load_suite

    return load_suite(config)


def measure(
    plan: Plan,
    adapters: Sequence[Path],
    config: BenchmarkConfig,
    suite: Suite,
    *,
    keep: bool,
    allow_other_base: bool,
    progress: Progress,
) -> BenchmarkReport:
    """Scores of the plan's base and of adapters on it, each in its own numbers; the cache keeps them if `keep`."""
    from gaintune.evaluate.benchmarks import benchmark_adapters
    from gaintune.storage import cache_dir

    return benchmark_adapters(
        plan.model,
        adapters,
        config,
        cache=cache_dir() / "benchmarks" if keep else None,
        suite=suite,
        allow_other_base=allow_other_base,
        progress=progress,
    )


def tables(report: BenchmarkReport) -> Iterator[Table | str]:
    """The scores of what was asked for, and a line for each benchmark about its rows."""
    rows = []
    about = {}
    names = _short(list(report.adapted))
    for score in (score for name in report.asked for score in report.base if score.task == name):
        compared = [one for one in report.comparisons if (one.task, one.metric) == (score.task, score.metric)]
        share = all(one.unit == "points" for one in compared) if compared else score.is_share
        rows.append([score.task, score.metric, BASE, _value(score, share), "—"])
        rows += [["", "", names[each.label], _value(each.adapted, share), _difference(each)] for each in compared]
        facts = score.facts
        told = [
            f"{score.rows:,} {facts.split} rows of {facts.source}",
            f"{facts.fewshot} worked examples",
            *facts.notes,
        ]
        about[score.task] = f"{score.task}: {'; '.join(told)}"
    heads = ["benchmark", "metric", "model", "score ± standard error", "against the base"]
    yield table("", heads, rows, numeric=(3, 4))
    yield from about.values()


def _short(labels: Sequence[str]) -> dict[str, str]:
    """Paths without the folders that all of them begin and end with, a single one by its last part; never `base`."""
    parts = [list(Path(label).parts) for label in labels]
    while len(parts) > 1 and all(len(each) > 1 and each[0] == parts[0][0] for each in parts):
        parts = [each[1:] for each in parts]
    while len(parts) > 1 and all(len(each) > 1 and each[-1] == parts[0][-1] for each in parts):
        parts = [each[:-1] for each in parts]
    names = ["/".join(each if len(parts) > 1 else each[-1:]) for each in parts]
    return dict(zip(labels, labels if BASE in names else names, strict=True))


def _value(score: BenchmarkScore, share: bool) -> str:
    factor, unit = (100.0, " %") if share else (1.0, "")
    error = "" if score.stderr is None else f" ± {factor * score.stderr:.2f}"
    return f"{factor * score.value:.2f}{error}{unit}"


def _difference(each: BenchmarkComparison) -> str:
    found = each.difference
    if found is None:
        return "—"
    if each.unit == "%":
        return percent(found.value, found.low, found.high)
    interval = "" if found.low is None or found.high is None else f" [{found.low:+.2f}, {found.high:+.2f}]"
    return f"{found.value:+.2f}{interval}{' points' if each.unit == 'points' else ''}"
