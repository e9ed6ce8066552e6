"""Commands for the papers' experiments: list them, show one, run one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gaintune.cli.analysis_options import Set
from gaintune.cli.console import err, out, progress_on, quiet_libraries, say, table
from gaintune.config import apply_overrides

if TYPE_CHECKING:
    from gaintune.recipes import Recipe

app = typer.Typer(no_args_is_help=True, help="The papers' experiments: list, show, run.")

Name = Annotated[
    str,
    typer.Argument(
        metavar="ID|FILE", help="Experiment, such as G2 (`gaintune recipe list` has all), or a recipe.yaml."
    ),
]


@app.command("list")
def list_() -> None:
    """List the experiments: id, what it is, and where in the papers it stands."""
    from gaintune.recipes import recipes

    rows = [[each.id, each.title, each.source] for each in recipes().values()]
    out.print(table("", ["id", "experiment", "source"], rows))


@app.command()
def show(name: Name) -> None:
    """Show one experiment: the question, its steps, and the claims it decides."""
    from gaintune.recipes import recipe_named

    recipe = recipe_named(name)
    say(
        f"{recipe.id}: {recipe.title}\n{recipe.source}\nmodel at scale paper: {recipe.model}\n\n{recipe.asks.strip()}\n"
    )
    for step in recipe.steps:
        say(f"step {step.name} ({step.do})")
        for key, value in step.settings.items():
            say(f"    {key}: {_short(value)}")
        for scale, over in recipe.scales.items():
            for key, value in over.get(step.name, {}).items():
                say(f"    at scale {scale}, {key}: {_short(value)}")
    say("")
    for claim in recipe.claims:
        say(f"claim: {claim.says}\n    {claim.number} {claim.expect}")


def _short(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(_short(each) for each in value)
    if isinstance(value, dict):
        return " ".join(f"{key}={_short(each)}" for key, each in value.items())
    return str(value)


@app.command()
def run(
    name: Name,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--run", help="Folder; one that was begun is continued. [default: runs/id-scale]", show_default=False
        ),
    ] = None,
    scale: Annotated[
        str,
        typer.Option(
            help="paper (the papers' models, data and budgets), small (the demo model), smoke (random weights)."
        ),
    ] = "small",
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of local copies under the papers' names; else the Hub or embedded texts."),
    ] = None,
    allow_code_execution: Annotated[
        bool,
        typer.Option(
            "--allow-code-execution",
            help="Run programs that a model wrote (HumanEval), in a process of their own with limits.",
        ),
    ] = False,
    set_: Set = None,
) -> None:
    """Run one experiment, and write its tables, figures, and a verdict on every claim."""
    from gaintune.recipes import recipe_named

    recipe: Recipe = recipe_named(name)
    quiet_libraries()
    from gaintune.recipes import SMOKE, run_recipe, shown

    place = folder or Path("runs") / f"{recipe.id.lower()}-{scale}"
    result = run_recipe(
        recipe,
        place,
        scale=scale,  # type: ignore[arg-type]  # checked there
        data=data,
        overrides=apply_overrides({}, set_ or ()),
        allow_code_execution=allow_code_execution,
        progress=progress_on(err),
    )
    rows = [[each.claim.says, each.verdict, shown(each.number), str(each.claim.expect)] for each in result.findings]
    out.print(table(f"{recipe.id}, scale {scale}", ["claim", "verdict here", "found", "claimed"], rows))
    if scale == "smoke":
        say(SMOKE)
    for step, outcome in result.outcomes.items():
        for note in outcome.notes:
            say(f"{step}: {note}")
    say(f"results {place / 'results.md'}")
