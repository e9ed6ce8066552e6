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
)
from gaintune.cli_shared import LEARNT, Adapters, Model, OtherBase, PlanOption, err, out, say, survey_plan
from gaintune.cli.console import percent, progress_on, quiet_libraries, table
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
    out_folder: Annotated[Path, typer.Option("--out", help="Folder for tables and figures.")] = Path("runs/landscape"),
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
    from gaintune.analysis.landscape.survey import GRID, LINE, survey_landscape
    from gaintune.analysis.landscape.report import in_nats, write

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
    out_folder: Annotated[Path, typer.Option("--out", help="Folder for tables and the figure.")] = Path(
        "runs/transfer"
    ),
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
    from gaintune.analysis.transfer.survey import PARTS, survey_transfer
    from gaintune.analysis.transfer.report import NAMES, write

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
        Path, typer.Option("--out", help="Folder for tables and figure, and what is measured.")
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
    from gaintune.analysis.retention.survey import survey_retention
    from gaintune.analysis.retention.report import sides, write
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
