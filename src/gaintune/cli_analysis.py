"""Commands that analyse: gates of an adapter, and the linear model of the DISeL paper."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from gaintune.cli.options import BlockSize, Domains, Options, Seed, Set, Task, Template, ValidationTokens, assemble
from gaintune.cli_shared import Model, OtherBase, err, out, say, with_base
from gaintune.config.plan import as_domain
from gaintune.cli.console import progress_on, quiet_libraries, table
from gaintune.errors import ConfigError


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(gates)
    app.command("linear-model")(linear_model)


def gates(
    adapter: Annotated[Path, typer.Argument(help="Folder of a DISeL adapter.")],
    domain: Domains = None,
    instruct: Annotated[
        list[str] | None,
        typer.Option(help="Domain of prompts and completions: name or name=path; repeatable, beside --domain."),
    ] = None,
    task: Task = None,
    template: Template = None,
    tokens: Annotated[
        str,
        typer.Option(
            help="Tokens whose gates count: response (those the loss scores), all (but padding), or auto: response in "
            "instruction domains and all in texts."
        ),
    ] = "auto",
    out_folder: Annotated[Path, typer.Option("--out", help="Folder for tables and figures.")] = Path("runs/gates"),
    model: Model = None,
    validation_tokens: ValidationTokens = None,
    block_size: BlockSize = None,
    bins: Annotated[int, typer.Option(help="Bins of a histogram over [0, 1], a multiple of 20.")] = 100,
    allow_other_base: OtherBase = False,
    seed: Seed = None,
    set_: Set = None,
) -> None:
    """Record a DISeL adapter's gates on domains' validation text: histograms by depth, heatmap, table.

    Writes gates.csv, gates-layers.csv, gates-apart.csv (differences of means, with intervals over rows of text),
    gates-rows.csv, gates.md, gates.json and two figures as PNG and SVG. A gate counts if the token at its own position
    does.
    """
    if tokens not in ("auto", "response", "all"):
        raise ConfigError(f"--tokens {tokens}: use auto, response or all")
    instructions = [_instruct_domain(each) for each in instruct or ()]
    domains: list[Any] = [*(domain or ()), *instructions] or ["law", "code"]
    given = Options(
        model=model, domains=domains, task=task, template=template,
        validation_tokens=validation_tokens, block_size=block_size, seed=seed,
    )  # fmt: skip
    settled = assemble(None, *with_base([adapter], given, set_))
    quiet_libraries()
    from gaintune.analysis.gates.report import groups, write
    from gaintune.analysis.gates.survey import survey_gates

    survey = survey_gates(
        settled, adapter, tokens=tokens, bins=bins, allow_other_base=allow_other_base, progress=progress_on(err)
    )
    write(survey, out_folder)
    rows = [
        [
            name,
            depth,
            block,
            f"{one.mean:.4f}",
            f"{one.deviation:.4f}",
            f"{100 * one.closed:.1f} %",
            f"{100 * one.open:.1f} %",
        ]
        for name, depth, block, one in groups(survey.record)
    ]
    heads = ["domain", "depth", "block", "mean gate", "sd", "below 0.05", "0.5 and above"]
    out.print(table("", heads, rows, numeric=range(3, 7)))
    say(f"tables and figures {out_folder}")


def _instruct_domain(text: str) -> dict[str, Any]:
    return {**as_domain(text), "task": "instruct"}


def linear_model(
    dimension: Annotated[int, typer.Option(help="Size of inputs and outputs.")] = 32,
    rank: Annotated[int, typer.Option(help="Rank of dW, and of what is trained.")] = 4,
    separation: Annotated[float, typer.Option(help="Distance between the means, in standard deviations.")] = 3.0,
    steps: Annotated[int, typer.Option(help="Training steps of every method, Adam with a cosine schedule.")] = 1500,
    batch_size: Annotated[int, typer.Option(help="Samples in a step, drawn anew each time.")] = 256,
    lr: Annotated[
        float, typer.Option(help="Learning rate at the start; gates learn at --gate-lr-ratio times it.")
    ] = 0.01,
    gate_lr_ratio: Annotated[float, typer.Option(help="Learning rate of gates over that of A and B.")] = 2.0,
    seeds: Annotated[int, typer.Option(help="How many seeds, from 0: each draws maps, start values and samples.")] = 5,
    out_folder: Annotated[Path, typer.Option("--out", help="Folder for tables and the figure.")] = Path(
        "runs/linear-model"
    ),
) -> None:
    """Run the DISeL paper's linear model: full, LoRA and DISeL against the best fixed and the Bayes correction.

    Losses are mean squared errors per output coordinate. Writes linear-model.csv, .md, .json, .png and .svg.
    """
    quiet_libraries()
    from gaintune.analysis.linear_model.experiment import Settings, run_experiment
    from gaintune.analysis.linear_model.report import checks, summary, too_short, write

    settings = Settings(dimension, rank, separation, steps, seeds, batch_size, lr, gate_lr_ratio)
    results = run_experiment(settings, progress_on(err))
    write(settings, results, out_folder)
    rows = [
        [
            row.name,
            f"{row.losses.total:.4f}",
            f"{row.losses.in_domain:.4f}",
            f"{row.losses.retention:.4f}",
            f"{row.to_fixed[0]:.4f}",
            f"{row.to_bayes[0]:.4f}",
        ]
        for row in summary(results)
    ]
    heads = ["correction", "loss", "in-domain", "retention", "loss / best fixed", "loss / Bayes"]
    out.print(table(f"Linear model, mean of {settings.seeds} seeds", heads, rows, numeric=range(1, 6)))
    for check in checks(results):
        say(f"{'yes' if check.holds else 'NO '}  {check.claim} (worst seed: {check.worst:.4f} times)")
    short = too_short(settings, results)
    if short is not None:
        say(short)
    say(f"tables and figure {out_folder}")
