"""Options of `gaintune evaluate` for benchmarks, and what is printed of their scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from gaintune.adapters import BASE
from gaintune.cli.console import percent, table
from gaintune.config import Plan
from gaintune.errors import ConfigError

if TYPE_CHECKING:
    from gaintune.evaluate.benchmarks import (
        BenchmarkComparison,
        BenchmarkConfig,
        BenchmarkReport,
        BenchmarkScore,
        Suite,
    )
    from gaintune.progress import Progress

Benchmarks = Annotated[
    str | None,
    typer.Option(metavar="NAMES", help="lm-eval's benchmarks: arc_easy,piqa, or gsm8k:8 for eight worked examples."),
]
Fewshot = Annotated[
    int | None, typer.Option(help="Worked examples before each question; what lm-eval's task file says unless given.")
]
FewshotSeed = Annotated[int | None, typer.Option(help="Seed of the draw of worked examples; lm-eval's unless given.")]
Limit = Annotated[int | None, typer.Option(help="Rows of each benchmark, the first ones; all unless given.")]
BenchmarkData = Annotated[
    list[str] | None,
    typer.Option(metavar="FOLDER|NAME=PATH", help="Local rows: a folder with a folder for each benchmark; repeatable."),
]
BenchmarkSource = Annotated[
    str | None, typer.Option(help="Where rows are from: auto, hub or local; auto asks the Hub for what is not local.")
]
GeneratedTokens = Annotated[int | None, typer.Option(help="Longest generated answer, in tokens.")]
AllowCode = Annotated[
    bool, typer.Option("--allow-code-execution", help="Run the programs that the model writes, which humaneval needs.")
]

NoCache = Annotated[bool, typer.Option("--no-cache", help="Measure benchmarks anew, and keep no scores.")]

FIELDS = {"fewshot_seed": "seed", "benchmark_data": "data", "benchmark_source": "source"}


def config_of(
    plan: Plan, benchmarks: str | None, *, allow_code_execution: bool, no_cache: bool = False, **options: Any
) -> BenchmarkConfig | None:
    """The benchmarks that options ask for; None for none.

    Args:
        plan: where the batch size and what intervals rest on are from.
        benchmarks: their names.
        allow_code_execution: whether programs that the model writes may run.
        no_cache: whether scores are not to be kept.
        options: the other options of benchmarks by their names; None for what was not given.

    Raises:
        ConfigError: an option of benchmarks without --benchmarks, or a wrong value.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if not benchmarks:
        switches = {"allow_code_execution": allow_code_execution, "no_cache": no_cache}
        option = next((name for name in (*given, *(name for name, on in switches.items() if on))), None)
        if option:
            option = option.replace("_", "-")
            raise ConfigError(f"--{option} is for benchmarks: name some with --benchmarks")
        return None
    from gaintune.evaluate.benchmarks import read_config

    uncertainty = plan.evaluate
    return read_config(
        {
            "tasks": benchmarks,
            **{FIELDS.get(name, name): value for name, value in given.items()},
            "allow_code_execution": allow_code_execution,
            "batch_size": uncertainty.batch_size,
            "bootstrap_samples": uncertainty.bootstrap_samples,
            "confidence": uncertainty.confidence,
            "bootstrap_seed": uncertainty.seed,
        }
    )


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
