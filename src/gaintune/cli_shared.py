"""What commands that look at saved adapters share: consoles, options, and the plan that adapters and options give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from gaintune.cli.options import Options, assemble
from gaintune.config.plan import Plan

out = Console()
err = Console(stderr=True)

Adapters = Annotated[list[Path], typer.Argument(metavar="ADAPTER...", help="Adapter folders on one base.")]
Model = Annotated[str | None, typer.Option(help="Base; the plan's or the one the first adapter names unless given.")]
PlanOption = Annotated[
    Path | None,
    typer.Option("--plan", metavar="PLAN.yaml", help="Plan whose base, domains and data settings are used."),
]
OtherBase = Annotated[bool, typer.Option("--allow-other-base", help="Take adapters that were trained on another base.")]
LEARNT = "Domains are those that the adapters learnt last, unless --plan or --domain names some."


def say(text: str) -> None:
    """One line or more to standard output, as it is: no markup, no colours, no wrapping."""
    out.print(text, highlight=False, markup=False, soft_wrap=True)


def with_base(adapters: Sequence[Path], given: Options, assignments: Sequence[str] | None) -> tuple[Options, list[str]]:
    """Options and assignments with the base that the first adapter names, and its revision, unless one is given."""
    from gaintune.adapters.disk import claimed_base, read_record

    settled = list(assignments or ())
    if given.model is not None:
        return given, settled
    base = claimed_base(adapters[0], read_record(adapters[0]))
    revision = [f"model.revision={base.revision}"] if base.revision else []
    return replace(given, model=base.name), [*revision, *settled]


def survey_plan(plan: Path | None, adapters: Sequence[Path], given: Options, assignments: Sequence[str] | None) -> Plan:
    """The plan of a survey: a file's if there is one, then the options; base and domains learnt last by records."""
    if plan is not None:
        return assemble(plan, given, assignments)
    from gaintune.adapters.disk import read_record

    given, settled = with_base(adapters, given, assignments)
    records = [read_record(folder) for folder in adapters]
    learnt = dict.fromkeys(record.domains[-1] for record in records if record and record.domains)
    return assemble(None, replace(given, domains=given.domains or list(learnt) or None), settled)
