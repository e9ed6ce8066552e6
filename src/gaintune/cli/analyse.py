"""The commands of the analyses, each made from what its analysis says of itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from inspect import Parameter, Signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gaintune.analysis import ANALYSES, Analysis
from gaintune.cli.benchmarks import (
    AllowCode,
    BenchmarkData,
    BenchmarkSource,
    Fewshot,
    FewshotSeed,
    GeneratedTokens,
    Limit,
    config_of,
)
from gaintune.cli.console import err, out, percent, progress_on, quiet_libraries, say, table
from gaintune.cli.options import Given, command
from gaintune.config import Plan
from gaintune.results import Interval

if TYPE_CHECKING:
    from gaintune.evaluate.benchmarks import BenchmarkConfig

TRAINED = "Domains are those that the adapters learnt last, unless --plan or --domain names some."
BENCHMARKS = {
    "fewshot": Fewshot,
    "fewshot_seed": FewshotSeed,
    "limit": Limit,
    "benchmark_data": BenchmarkData,
    "benchmark_source": BenchmarkSource,
    "generated_tokens": GeneratedTokens,
    "allow_code_execution": AllowCode,
}


def _adapters(analysis: Analysis) -> Any:
    """Declare what the command is given; None for nothing."""
    several = "RUN_OR_ADAPTER..." if analysis.takes == "runs" else "ADAPTER..."
    if analysis.takes == "adapter":
        return Annotated[Path, typer.Argument(metavar="ADAPTER", help=analysis.argument)]
    return Annotated[list[Path], typer.Argument(metavar=several, help=analysis.argument)]


def _parameters(analysis: Analysis) -> list[Parameter]:
    """List the command's own parameters; those of the plan and of the analysis's options are added by `command`."""
    word = "the figure" if analysis.one_figure else "figures"
    other_base = typer.Option("--allow-other-base", help="Take adapters that were trained on another base.")
    folder = typer.Option("--out", help=f"Folder for tables and {word}.")
    kinds: dict[str, tuple[Any, Any]] = {"options": (analysis.Options, Parameter.empty)}
    if analysis.takes != "nothing":
        kinds["adapters"] = (_adapters(analysis), Parameter.empty)
    kinds["out_folder"] = (Annotated[Path, folder], Path("runs") / analysis.name)
    if analysis.takes not in ("nothing", "runs"):
        kinds["allow_other_base"] = (Annotated[bool, other_base], False)
        kinds["given"] = (Given, Parameter.empty)
    if analysis.measures_benchmarks:
        kinds |= {name: (kind, False if name == "allow_code_execution" else None) for name, kind in BENCHMARKS.items()}
    return [
        Parameter(name, Parameter.KEYWORD_ONLY, annotation=kind, default=default)
        for name, (kind, default) in kinds.items()
    ]


def _plan(analysis: Analysis, given: Given, adapters: Sequence[Path], options: Any) -> Plan:
    """Assemble the plan: on the base that the adapters name, with the domains that the analysis measures."""
    if analysis.takes == "snapshots":
        from gaintune.training import snapshots_of

        adapters = [next(iter(snapshots_of(folder).values())) for folder in adapters]
    given = given.on_base_of(adapters)
    if analysis.texts != "none":
        named = analysis.domains(given.options.get("data.domains", ()), options)
        if named:
            given = replace(given, options={**given.options, "data.domains": named})
        elif analysis.default_domains:
            given = given.under(data__domains=list(analysis.default_domains)) if given.file is None else given
        else:
            given = given.on_domains_of(adapters)
    return given.plan()


def _benchmarks(analysis: Analysis, plan: Plan, options: Any, given: Mapping[str, Any]) -> BenchmarkConfig | None:
    if not analysis.measures_benchmarks:
        return None
    return config_of(plan, ",".join([*options.target, *options.tasks]), **given)


def _run(
    analysis: Analysis,
    options: Any,
    out_folder: Path,
    adapters: Path | Sequence[Path] = (),
    given: Given | None = None,
    allow_other_base: bool = False,
    **benchmarks: Any,
) -> None:
    folders = [adapters] if isinstance(adapters, Path) else list(adapters)
    plan = None if given is None else _plan(analysis, given, folders, options)
    config = None if plan is None else _benchmarks(analysis, plan, options, benchmarks)
    quiet_libraries()
    from gaintune.analysis import Subject, write_result

    subject = Subject(folders, plan, (), "", out_folder, config, allow_other_base)
    result = analysis.run(subject, options, progress_on(err))
    write_result(analysis.name, result, out_folder)
    headline = result.headline
    rows = [[_cell(cell) for cell in row] for row in headline.rows]
    out.print(table(headline.title, headline.heads, rows, range(headline.numeric, len(headline.heads))))
    for remark in result.remarks:
        say(remark)
    say(f"tables and {'figure' if analysis.one_figure else 'figures'} {out_folder}")


def _cell(cell: str | Interval | None) -> str:
    if isinstance(cell, str):
        return cell
    return percent(None, None, None) if cell is None else percent(cell.value, cell.low, cell.high)


def _add(app: typer.Typer, analysis: Analysis) -> None:
    """Register the command of an analysis."""

    def run(**values: Any) -> None:
        _run(analysis, **values)

    run.__name__ = analysis.name
    run.__signature__ = Signature(_parameters(analysis))  # type: ignore[attr-defined]
    run.__doc__ = analysis.help
    takes: Sequence[str] = ()
    if analysis.takes not in ("nothing", "runs"):
        takes = ("model", "data", "evaluate") if analysis.texts != "none" else ("model",)
    if analysis.texts != "none" and not analysis.default_domains:
        run.__doc__ += f"\n\n{TRAINED}"
    command(
        app,
        analysis.name,
        group="Analysis",
        takes=takes,
        without=() if analysis.watches else ("data.watched",),
        options=analysis.Options,
        helps={
            "model": "Base; the plan's or the one the first adapter names unless given.",
            "plan": "Plan whose base, domains and data settings are used.",
        },
    )(run)


def register(app: typer.Typer) -> None:
    """Add the commands of the analyses."""
    for analysis in ANALYSES.values():
        _add(app, analysis)
