"""Commands that measure adapters elsewhere than training left them: landscapes, parts of gains, snapshots."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

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
from gaintune.cli.console import percent, progress_on, quiet_libraries, table
from gaintune.cli.options import (
    LEARNT,
    Adapters,
    BlockSize,
    Domains,
    Model,
    Options,
    OtherBase,
    PlanOption,
    Seed,
    Set,
    Task,
    Template,
    TextColumn,
    TrainTokens,
    ValidationTokens,
    Watched,
    assemble,
    err,
    out,
    say,
    survey_plan,
    tables_folder,
    with_base,
)
from gaintune.config.plan import as_domain
from gaintune.errors import ConfigError


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command(epilog=LEARNT)(landscape)
    app.command(epilog=LEARNT)(transfer)
    app.command(epilog=LEARNT)(retention)


def landscape(
    adapters: Adapters,
    plane: Annotated[bool, typer.Option("--plane", help="Measure the plane that two adapters span, too.")] = False,
    places: Annotated[
        str | None, typer.Option("--line", metavar="T,T,...", help="Places along a line. [default: -0.25 to 1.25]")
    ] = None,
    grid: Annotated[
        str | None, typer.Option("--grid", metavar="T,T,...", help="Places along a side. [default: -0.25 to 1.25]")
    ] = None,
    plan: PlanOption = None,
    domain: Domains = None,
    watch: Watched = None,
    task: Task = None,
    template: Template = None,
    text_column: TextColumn = None,
    out_folder: Annotated[
        Path, typer.Option("--out", callback=tables_folder, help="Folder for tables and figures.")
    ] = Path("runs/landscape"),
    model: Model = None,
    train_tokens: TrainTokens = None,
    validation_tokens: ValidationTokens = None,
    block_size: BlockSize = None,
    allow_other_base: OtherBase = False,
    seed: Seed = None,
    set_: Set = None,
) -> None:
    """Loss from the pretrained model (0) to adapted ones (1) and a little beyond, and on the plane of two.

    GAIN's v is scaled, LoRA's B A, DISeL's B with its gates as they are, and the weights of all others, in fp32.
    Writes landscape.csv, .md and .json, and two figures as PNG and SVG.
    """
    given = Options(
        model=model, domains=domain, watched=watch, task=task, template=template, text_column=text_column,
        train_tokens=train_tokens, validation_tokens=validation_tokens, block_size=block_size, seed=seed,
    )  # fmt: skip
    settled = survey_plan(plan, adapters, given, set_)
    quiet_libraries()
    from gaintune.analysis.landscape.report import in_nats, write
    from gaintune.analysis.landscape.survey import GRID, LINE, survey_landscape

    found = survey_landscape(
        settled,
        adapters,
        plane=plane,
        line=LINE if places is None else _numbers("--line", places),
        grid=GRID if grid is None else _numbers("--grid", grid),
        allow_other_base=allow_other_base,
        progress=progress_on(err),
    )
    write(found, out_folder)
    rows = []
    for line in found.lines:
        for name in line.domains:
            one = line.figures(name)
            at, best = one.at_adapted[0], f"{one.best[0]:g}"
            spread = [in_nats(one.range), in_nats(one.barrier)]
            rows.append([line.labels[0], name, percent(at.value, at.low, at.high), best, *spread])
    heads = ["adapter", "domain", "at the adapted model", "lowest at", "range, nats", "barrier, nats"]
    out.print(table("", heads, rows, numeric=range(2, 6)))
    if found.plane is not None:
        cosine = found.plane.geometry.cosine
        say(f"cosine of the two directions {'undefined' if cosine is None else format(cosine, '+.4f')}")
    say(f"tables and figures {out_folder}")


def transfer(
    adapters: Adapters,
    component: Annotated[
        list[str] | None,
        typer.Option(
            help="What is taken for shared: mean (the mean vector), principal (the first principal direction), "
            "held-out (the mean without the measured domain's adapter); repeatable. [default: mean]"
        ),
    ] = None,
    plan: PlanOption = None,
    domain: Domains = None,
    watch: Watched = None,
    task: Task = None,
    template: Template = None,
    text_column: TextColumn = None,
    out_folder: Annotated[
        Path, typer.Option("--out", callback=tables_folder, help="Folder for tables and the figure.")
    ] = Path("runs/transfer"),
    model: Model = None,
    train_tokens: TrainTokens = None,
    validation_tokens: ValidationTokens = None,
    block_size: BlockSize = None,
    allow_other_base: OtherBase = False,
    seed: Seed = None,
    set_: Set = None,
) -> None:
    """What separately trained GAIN adapters share, and what is left of transfer without it, or with it alone.

    Writes transfer.csv, .md and .json, transfer-correlations.csv, and a figure as PNG and SVG.
    """
    given = Options(
        model=model, domains=domain, watched=watch, task=task, template=template, text_column=text_column,
        train_tokens=train_tokens, validation_tokens=validation_tokens, block_size=block_size, seed=seed,
    )  # fmt: skip
    settled = survey_plan(plan, adapters, given, set_)
    quiet_libraries()
    from gaintune.analysis.transfer.report import NAMES, write
    from gaintune.analysis.transfer.survey import PARTS, survey_transfer

    chosen: Any = component or ["mean"]
    found = survey_transfer(
        settled, adapters, components=chosen, allow_other_base=allow_other_base, progress=progress_on(err)
    )
    write(found, out_folder)
    rows = []
    for one in found.ablations:
        for part in PARTS:
            whole, own, left = one.transfer(part), one.in_domain(part), one.left(part)
            kept = "—" if left is None else percent(left.value, left.low, left.high)
            figures = [percent(whole.value, whole.low, whole.high), kept, percent(own.value, own.low, own.high)]
            rows.append([one.component, NAMES[part], *figures])
    heads = ["shared is", "gains", "transfer to other domains", "left of it", "own domain"]
    out.print(table("Change of perplexity (negative is better)", heads, rows, numeric=range(2, 5)))
    pairs, sharing = found.sharing.pairs, found.sharing
    say(
        f"correlations {min(pairs):+.3f} to {max(pairs):+.3f}; common share of the variance "
        f"{100 * sharing.common_share:.1f} % (the mean's {100 * sharing.mean_share:.1f} %, by chance "
        f"{100 * sharing.chance_share:.1f} %)\ntables and figure {out_folder}"
    )


def retention(
    adapters: Annotated[
        list[Path], typer.Argument(metavar="ADAPTER...", help="Adapters with snapshots (train.snapshot_steps).")
    ],
    plan: PlanOption = None,
    domain: Domains = None,
    watch: Watched = None,
    benchmarks: Annotated[
        str | None, typer.Option(metavar="NAMES", help="Benchmarks whose mean is retention, such as arc_easy,piqa.")
    ] = None,
    target_benchmarks: Annotated[
        str | None, typer.Option(metavar="NAMES", help="Benchmarks that measure the target, such as gsm8k:8.")
    ] = None,
    fewshot: Fewshot = None,
    fewshot_seed: FewshotSeed = None,
    limit: Limit = None,
    benchmark_data: BenchmarkData = None,
    benchmark_source: BenchmarkSource = None,
    generated_tokens: GeneratedTokens = None,
    allow_code_execution: AllowCode = False,
    every: Annotated[int, typer.Option(help="Measure every so many-th snapshot, and always the last.")] = 1,
    task: Task = None,
    template: Template = None,
    text_column: TextColumn = None,
    out_folder: Annotated[
        Path, typer.Option("--out", callback=tables_folder, help="Folder for tables and figure, and what is measured.")
    ] = Path("runs/retention"),
    model: Model = None,
    train_tokens: TrainTokens = None,
    validation_tokens: ValidationTokens = None,
    block_size: BlockSize = None,
    allow_other_base: OtherBase = False,
    seed: Seed = None,
    set_: Set = None,
) -> None:
    """Target and retention at every snapshot of one or more adaptations; a stopped survey continues.

    --domain is the target, --watch a text whose retention is asked. Writes retention.csv, .md and .json, and a figure
    as PNG and SVG.
    """
    from gaintune.training.snapshots import snapshots_of

    given = Options(
        model=model, domains=domain, watched=watch, task=task, template=template, text_column=text_column,
        train_tokens=train_tokens, validation_tokens=validation_tokens, block_size=block_size, seed=seed,
    )  # fmt: skip
    firsts = [next(iter(snapshots_of(folder).values())) for folder in adapters]
    settled = survey_plan(plan, firsts, given, set_)
    asked = ",".join(names for names in (target_benchmarks, benchmarks) if names)
    config = config_of(
        settled,
        asked,
        fewshot=fewshot,
        fewshot_seed=fewshot_seed,
        limit=limit,
        benchmark_data=benchmark_data,
        benchmark_source=benchmark_source,
        generated_tokens=generated_tokens,
        allow_code_execution=allow_code_execution,
    )
    own = [name.partition(":")[0].strip() for name in (target_benchmarks or "").split(",") if name.strip()]
    quiet_libraries()
    from gaintune.analysis.retention.report import sides, write
    from gaintune.analysis.retention.survey import survey_retention
    from gaintune.storage.assets import cache_dir

    found = survey_retention(
        settled,
        adapters,
        benchmarks=config,
        target_tasks=own,
        every=every,
        cache=out_folder / "measured",
        benchmark_cache=cache_dir() / "benchmarks",
        allow_other_base=allow_other_base,
        progress=progress_on(err),
    )
    write(found, out_folder)
    shown = list(dict.fromkeys(side for pair in sides(found) for side in pair))
    rows = []
    for course in found.courses:
        for moment in course.moments:
            figures = [side.read(course, moment) for side in shown]
            cells = ["—" if one is None else percent(one.value, one.low, one.high) for one in figures]
            rows.append([course.label, str(moment.step), *cells])
    out.print(table("", ["adaptation", "updates", *(side.name for side in shown)], rows, numeric=range(1, 6)))
    say(f"tables and figure {out_folder}")


def _numbers(option: str, text: str) -> list[float]:
    try:
        return [float(each) for each in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option} {text}: write numbers with commas between them, such as 0,0.5,1") from None


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
    out_folder: Annotated[
        Path, typer.Option("--out", callback=tables_folder, help="Folder for tables and figures.")
    ] = Path("runs/gates"),
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
    out_folder: Annotated[
        Path, typer.Option("--out", callback=tables_folder, help="Folder for tables and the figure.")
    ] = Path("runs/linear-model"),
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


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(gains)
    app.command()(subspace)
    app.command(epilog=LEARNT)(tokens)


def gains(
    paths: Annotated[
        list[Path], typer.Argument(metavar="RUN_OR_ADAPTER...", help="Run directories, or GAIN and (IA)3 adapters.")
    ],
    out_folder: Annotated[
        Path, typer.Option("--out", callback=tables_folder, help="Folder for tables and figures.")
    ] = Path("runs/gains"),
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
    out_folder: Annotated[
        Path, typer.Option("--out", callback=tables_folder, help="Folder for tables and the figure.")
    ] = Path("runs/subspace"),
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
    out_folder: Annotated[
        Path, typer.Option("--out", callback=tables_folder, help="Folder for tables and the figure.")
    ] = Path("runs/tokens"),
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
    from gaintune.analysis.tokens.report import HEADS, cells, write
    from gaintune.analysis.tokens.survey import survey_tokens

    survey = survey_tokens(
        settled, adapters, bins=bins, limit=limit, allow_other_base=allow_other_base, progress=progress_on(err)
    )
    write(survey, out_folder)
    rows: list[list[str]] = [
        [text, label, *cells(one)] for text, found in survey.changes.items() for label, one in found.items()
    ]
    out.print(table("", ["domain", "adapter", *HEADS], rows, numeric=range(2, 9)))
    say(f"tables and figure {out_folder}")
