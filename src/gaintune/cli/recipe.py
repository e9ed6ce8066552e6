"""Commands for the papers' experiments: list them, show one, run one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gaintune.cli.console import err, out, progress_on, quiet_libraries, say, say_wrapped, table
from gaintune.cli.help import HelpfulGroup
from gaintune.cli.options import command, refuse, run_option
from gaintune.config import apply_overrides
from gaintune.errors import RecipeError
from gaintune.progress import plural

commands = typer.Typer()
recipe = typer.Typer(
    cls=HelpfulGroup,
    no_args_is_help=True,
    help="The papers' experiments: list, show, run.",
    epilog="gaintune recipe list\ngaintune recipe run G8",
)
commands.add_typer(recipe, name="recipe", rich_help_panel="Experiment")

Name = Annotated[str, typer.Argument(metavar="ID|FILE", help="Experiment of the list, such as G2, or a recipe.yaml.")]


@command(recipe, "list", examples="gaintune recipe list")
def list_() -> None:
    """List the experiments: id, what it is, and where in the papers it stands."""
    from gaintune.recipes import recipes

    rows = [[entry.id, entry.title, entry.source] for entry in recipes().values()]
    out.print(table("", ["id", "experiment", "source"], rows))


@command(
    recipe,
    "show",
    examples="gaintune recipe show G2\ngaintune recipe show D3 --scale paper\ngaintune recipe show G2 --check",
)
def show(
    name: Name,
    scale: Annotated[str | None, typer.Option(help="With paper: also the memory that its training steps take.")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Look up what scale paper reads from the Hub, and the room on the disk.")
    ] = False,
) -> None:
    """Show one experiment: the question, its steps, and the claims it decides."""
    from gaintune.recipes import recipe_named

    if scale not in (None, "paper"):
        refuse(f"{scale}: only paper has estimates of memory", ["scale"])

    entry = recipe_named(name)
    say(f"{entry.id}: {entry.title}\n{entry.source}\nmodel at scale paper: {entry.model}\n")
    say_wrapped(f"{entry.asks.strip()}\n", indent=0)
    for further in entry.models:
        say_wrapped(f"also at scale paper: {further.model}, --models {further.label} {_short(further.settings)}")
    for difference in entry.differs:
        say_wrapped(f"not as in the paper: {difference}")
    for step in entry.steps:
        say(f"step {step.name} ({step.do})")
        for key, value in step.settings.items():
            _say_setting(key, value)
        for other, over in entry.scales.items():
            for key, value in over.get(step.name, {}).items():
                _say_setting(f"at scale {other}, {key}", value)
    say("")
    for claim in entry.claims:
        only = f", at scale {claim.scale} alone" if claim.scale else ""
        only += f", of {claim.model} alone" if claim.model else ""
        say_wrapped(f"claim: {claim.says}\n    {claim.number} {claim.expect}{only}")
    if check:
        quiet_libraries()
        from gaintune.recipes import ScaleSetup, check_hub

        say("")
        for line in check_hub(entry.at("paper"), ScaleSetup.make("paper", entry.model, None, {}, Path()), Path("runs")):
            say(line)

    if scale == "paper":
        quiet_libraries()
        from gaintune.recipes import paper_memory

        for line in paper_memory(entry):
            say_wrapped(f"memory: step {line.step} on {line.model}, {', '.join(line.labels)}: {line.says}")


def _say_setting(key: str, value: object) -> None:
    """Print a setting in a line, or below its key the entries that have parts of their own, such as methods."""
    if isinstance(value, list) and any(isinstance(entry, dict | list) for entry in value):
        say_wrapped("\n".join([f"    {key}:", *(f"        {_short(entry)}" for entry in value)]))
    else:
        say_wrapped(f"    {key}: {_short(value)}")


def _short(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(_short, value))
    if isinstance(value, dict):
        return " ".join(f"{key}={_short(inner)}" for key, inner in value.items())
    return str(value)


@command(
    recipe,
    "run",
    examples="""\
gaintune recipe run G8
gaintune recipe run G2 --scale paper --data papers-data --run-dir runs/g2
gaintune recipe run G7 --scale paper --set 70b.model.quantization=4bit
gaintune recipe run G14 --jobs 2
gaintune recipe run mine.yaml --scale smoke""",
)
def run(
    name: Name,
    folder: Annotated[Path | None, run_option("Folder to begin or continue. [default: runs/id-scale]", None)] = None,
    scale: Annotated[
        str, typer.Option(help="paper (its models, data and budgets), small (embedded models), smoke (random weights).")
    ] = "small",
    data: Annotated[Path | None, typer.Option(help="Folder of local copies under the papers' names.")] = None,
    models: Annotated[
        str | None, typer.Option(help="Models of the recipe to run, by Hub id or label; all unless given.")
    ] = None,
    allow_code_execution: Annotated[
        bool, typer.Option("--allow-code-execution", help="Run programs that a model wrote (HumanEval), with limits.")
    ] = False,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="[STEP.]SECTION.KEY=VALUE",
            help="Any key of the steps' plans, such as train.seed=1; of one step's, such as 7b.model.dtype=fp32.",
        ),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            help="Where sweeps run: loky (processes here), ray, dask, sequential. [default: loky for several jobs]"
        ),
    ] = None,
    jobs: Annotated[int, typer.Option(help="Runs of a sweep at a time; each gets its share of the cores.")] = 1,
) -> None:
    """Run one experiment, and write its tables, figures, and a verdict on every claim.

    A step that fails does not stop the others. The command then ends with exit code 1, and running it again tries the
    step again.
    """
    from gaintune.recipes import recipe_named

    if scale == "smoke" and data is not None:
        refuse("has no effect at scale smoke, which makes its own texts: leave it out", ["data"])
    entry = recipe_named(name)
    quiet_libraries()
    from gaintune.recipes import SMOKE, run_recipe, shown

    folder = folder or Path("runs") / f"{entry.id.lower()}-{scale}"
    result = run_recipe(
        entry,
        folder,
        scale=scale,  # type: ignore[arg-type]  # checked there
        data=data,
        overrides=apply_overrides({}, set_ or ()),
        jobs=jobs,
        engine=engine,
        models=[name.strip() for name in (models or "").split(",") if name.strip()],
        allow_code_execution=allow_code_execution,
        progress=progress_on(err),
        prepare=quiet_libraries,
    )
    rows = [[one.claim.says, one.verdict, shown(one.number), str(one.claim.expect)] for one in result.findings]
    out.print(table(f"{entry.id}, scale {scale}", ["claim", "verdict here", "found", "claimed"], rows))
    if scale == "smoke":
        say(SMOKE)
    for step, outcome in result.outcomes.items():
        for note in () if outcome.failed else outcome.notes:
            say(f"{step}: {note}")
    say(f"results {folder / 'results.md'}")
    if result.failed:
        reasons = "\n".join(f"  {step}: {reason}" for step, reason in result.failed.items())
        raise RecipeError(f"{plural(len(result.failed), 'step')} failed; the same command tries again:\n{reasons}")
