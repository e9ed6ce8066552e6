"""Commands that look into what was learnt: gains, the space an update lies in, and the loss of single tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gaintune.cli.options import (
    BlockSize,
    Domains,
    Options,
    Seed,
    Set,
    Task,
    Template,
    TextColumn,
    TrainTokens,
    ValidationTokens,
    Watched,
    assemble,
)
from gaintune.cli_shared import LEARNT, Adapters, Model, OtherBase, PlanOption, err, out, say, survey_plan, with_base
from gaintune.cli.console import progress_on, quiet_libraries, table


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(gains)
    app.command()(subspace)
    app.command(epilog=LEARNT)(tokens)


def gains(
    paths: Annotated[
        list[Path], typer.Argument(metavar="RUN_OR_ADAPTER...", help="Run directories, or GAIN and (IA)3 adapters.")
    ],
    out_folder: Annotated[Path, typer.Option("--out", help="Folder for tables and figures.")] = Path("runs/gains"),
) -> None:
    """Read what gains learnt, stage by stage: smallest, largest, share within [0.95, 1.05], sign flips, regime.

    Loads no model. Writes gains.csv, gains-layers.csv, gains.md, gains.json and two figures as PNG and SVG.
    """
    quiet_libraries()
    from gaintune.analysis.gains.report import TIGHT, stage_cells, verdict, write
    from gaintune.analysis.gains.survey import survey_gains

    survey = survey_gains(paths)
    write(survey, out_folder)
    rows = []
    for sequence in survey.sequences:
        for stage in sequence.stages:
            rows.append([sequence.label, f"{stage.index + 1} {stage.domain}", *stage_cells(stage)])
    heads = ["method", "after stage", "smallest", "largest", TIGHT, "at or below 0", "factors"]
    out.print(table("", heads, rows, numeric=range(2, 7)))
    for sequence in survey.sequences:
        say(f"{sequence.label}: {verdict(sequence)}")
    if survey.left_out:
        say(f"without factors, left out: {', '.join(survey.left_out)}")
    say(f"tables and figures {out_folder}")


def subspace(
    adapters: Adapters,
    out_folder: Annotated[Path, typer.Option("--out", help="Folder for tables and the figure.")] = Path(
        "runs/subspace"
    ),
    model: Model = None,
    top: Annotated[int, typer.Option(help="Leading singular vectors of each adapted weight that are looked at.")] = 10,
    epsilon: Annotated[
        float, typer.Option(help="A vector is an intruder if its largest |cosine| to a pretrained one is below this.")
    ] = 0.5,
    leading: Annotated[float, typer.Option(help="Share of a weight's energy that its leading directions hold.")] = 0.9,
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="Singular values up to this share of the largest count as zero in a weight's rank; max(out, in) "
            "times fp32's epsilon unless given."
        ),
    ] = None,
    gate: Annotated[
        float | None,
        typer.Option(help="DISeL and Gated LoRA: the value at which every gate is held; without it they are refused."),
    ] = None,
    allow_other_base: OtherBase = False,
    set_: Set = None,
) -> None:
    """Share of an update's energy outside the pretrained weight's column space, and intruder dimensions.

    Writes subspace.csv, .md, .json, .png and .svg. Two singular value decompositions for every adapted weight, in
    float64, on the model's device.
    """
    settled = assemble(None, *with_base(adapters, Options(model=model), set_))
    quiet_libraries()
    from gaintune.analysis.subspace.compare import SubspaceSettings
    from gaintune.analysis.subspace.report import heads, remarks, summary_rows, write
    from gaintune.analysis.subspace.survey import survey_subspace

    survey = survey_subspace(
        adapters,
        settled.model,
        settings=SubspaceSettings(top, epsilon, leading, tolerance),
        gate=gate,
        allow_other_base=allow_other_base,
        progress=progress_on(err),
    )
    write(survey, out_folder)
    out.print(table("", heads(survey), summary_rows(survey), numeric=range(2, 7)))
    for remark in remarks(survey):
        say(remark)
    say(f"tables and figure {out_folder}")


def tokens(
    adapters: Adapters,
    plan: PlanOption = None,
    domain: Domains = None,
    watch: Watched = None,
    task: Task = None,
    template: Template = None,
    text_column: TextColumn = None,
    out_folder: Annotated[Path, typer.Option("--out", help="Folder for tables and the figure.")] = Path("runs/tokens"),
    model: Model = None,
    train_tokens: TrainTokens = None,
    validation_tokens: ValidationTokens = None,
    block_size: BlockSize = None,
    bins: Annotated[int, typer.Option(help="Bins of a histogram, an odd number.")] = 101,
    limit: Annotated[
        float | None,
        typer.Option(help="Nats at which histograms end; where 99.5 % of a domain's changes lie unless given."),
    ] = None,
    allow_other_base: OtherBase = False,
    seed: Seed = None,
    set_: Set = None,
) -> None:
    """Change of the loss of every token between base and adapter: histogram, mean, skew and coherence.

    Writes tokens.csv, tokens-histogram.csv, tokens.md, .json, .png and .svg. Coherence is |mean| / mean size.
    """
    given = Options(
        model=model, domains=domain, watched=watch, task=task, template=template, text_column=text_column,
        train_tokens=train_tokens, validation_tokens=validation_tokens, block_size=block_size, seed=seed,
    )  # fmt: skip
    settled = survey_plan(plan, adapters, given, set_)
    quiet_libraries()
    from gaintune.analysis.tokens.survey import survey_tokens
    from gaintune.analysis.tokens.report import HEADS, cells, write

    survey = survey_tokens(
        settled, adapters, bins=bins, limit=limit, allow_other_base=allow_other_base, progress=progress_on(err)
    )
    write(survey, out_folder)
    rows: list[list[str]] = [
        [text, label, *cells(one)] for text, found in survey.changes.items() for label, one in found.items()
    ]
    out.print(table("", ["domain", "adapter", *HEADS], rows, numeric=range(2, 9)))
    say(f"tables and figure {out_folder}")
