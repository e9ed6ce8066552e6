"""The commands of the analyses, each made from the analysis's own description."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, Any

import typer

from gaintune.analysis import ANALYSES, Analysis, Subject, check_output, write_result
from gaintune.cli.console import err, out, percent, progress_on, quiet_libraries, say, table
from gaintune.cli.evaluate import BenchmarkSettings
from gaintune.cli.options import PLAN_OF_TEXTS, AllowOtherBase, Given, command
from gaintune.config import Plan

TRAINED = "Domains are those that the adapters were trained on last, unless --plan or --domain names some."
commands = typer.Typer()


def _parameters(analysis: Analysis) -> list[Parameter]:
    """List what the command takes beside the options of the plan and of the analysis."""
    out_folder = typer.Option(
        "--out",
        callback=lambda place: check_output(place, analysis.name),
        help="Folder for tables and figures.",
        rich_help_panel="Output",
    )
    taken: dict[str, tuple[Any, Any]] = {"out_folder": (Annotated[Path, out_folder], Path("runs") / analysis.name)}
    if analysis.takes != "nothing":
        metavar = {"runs": "RUN_OR_ADAPTER...", "adapter": "ADAPTER"}.get(analysis.takes, "ADAPTER...")
        argument = typer.Argument(metavar=metavar, help=analysis.argument)
        kind: Any = Path if analysis.takes == "adapter" else list[Path]
        taken["adapters"] = (Annotated[kind, argument], Parameter.empty)
    if analysis.loads_model:
        taken |= {"given": (Given, Parameter.empty), "allow_other_base": (AllowOtherBase, False)}
    if analysis.measures_benchmarks:
        taken["benchmark"] = (BenchmarkSettings, Parameter.empty)
    taken["options"] = (analysis.Options, Parameter.empty)
    return [Parameter(name, Parameter.KEYWORD_ONLY, annotation=a, default=b) for name, (a, b) in taken.items()]


def _plan(analysis: Analysis, given: Given, adapters: Sequence[Path], options: Any) -> Plan:
    """Assemble the plan: on the base that the adapters name, with the domains that the analysis measures."""
    if analysis.takes == "snapshots":
        from gaintune.training import snapshots_of

        adapters = [next(iter(snapshots_of(folder).values())) for folder in adapters]
    given = given.on_base_of(adapters)
    if analysis.texts == "none":
        return given.plan()
    if named := analysis.domains(given.options.get("data.domains", ()), options):
        return replace(given, options={**given.options, "data.domains": named}).plan()
    if analysis.default_domains and given.file is None:
        return given.over({"data.domains": list(analysis.default_domains)}).plan()
    return given.on_domains_of(adapters).plan()


def add_command(app: typer.Typer, analysis: Analysis) -> None:
    """Register the command of an analysis."""

    def run(
        options: Any,
        out_folder: Path,
        adapters: Path | Sequence[Path] = (),
        given: Given | None = None,
        allow_other_base: bool = False,
        benchmark: BenchmarkSettings | None = None,
    ) -> None:
        folders = [adapters] if isinstance(adapters, Path) else list(adapters)
        plan = None if given is None else _plan(analysis, given, folders, options)
        config = benchmark.config(plan.evaluate, [*options.target, *options.tasks]) if plan and benchmark else None
        quiet_libraries()
        subject = Subject(folders, plan, (), "", out_folder, config, allow_other_base)
        result = analysis.run(subject, options, progress_on(err))
        write_result(analysis.name, result, out_folder)
        shown = result.headline
        rows = [[cell if isinstance(cell, str) else percent(cell) for cell in row] for row in shown.rows]
        out.print(table(shown.title, shown.heads, rows, range(shown.numeric, len(shown.heads))))
        for remark in result.remarks:
            say(remark)
        say(f"tables and {'figure' if analysis.one_figure else 'figures'} {out_folder}")

    run.__signature__ = Signature(_parameters(analysis))  # type: ignore[attr-defined]
    run.__name__, run.__doc__ = analysis.name, analysis.help
    if analysis.texts != "none" and not analysis.default_domains:
        run.__doc__ += f"\n\n{TRAINED}"
    texts = ("data", "evaluate") if analysis.texts != "none" else ()
    command(
        app,
        analysis.name,
        group="Analysis",
        takes=("model", *texts) if analysis.loads_model else (),
        without=("data.stream",) if analysis.watches else ("data.watched", "data.stream"),
        options=analysis.Options,
        options_group="Analysis",
        helps={"model": "Base; the plan's or the first adapter's unless given.", "plan": PLAN_OF_TEXTS},
        examples=analysis.examples,
    )(run)


for _analysis in ANALYSES.values():
    add_command(commands, _analysis)
