"""Commands that train: the demonstration, a sequence of domains, one adaptation, a sweep."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from gaintune.cli.console import err, out, percent, progress_on, quiet_libraries, say, table
from gaintune.cli.evaluate import print_classifier
from gaintune.cli.options import AllowOtherBase, Given, command, refuse, run_option
from gaintune.config import Plan
from gaintune.errors import DataError, DivergedError, SweepError
from gaintune.progress import plural

commands = typer.Typer()
training = partial(command, commands, group="Training")

DEMO_METHODS = ["gain-ffn", "lora"]
DEMO_VALIDATION_TOKENS = 2560  # ten blocks: keeps the demo under ten minutes on two cores
MEMORY_COLUMNS = {
    "weights": "weights", "trained state": "trained", "activations": "activations", "loss": "loss",
    "training": "training", "evaluation": "evaluation",
}  # fmt: skip
FIGURES = {
    "in_domain": "in-domain",
    "backward_transfer": "earlier domains, against base",
    "backward_transfer_since_learnt": "earlier domains, since trained",
    "forward_interference": "not yet trained",
}


def _sequence(plan: Plan, run: Path) -> None:
    """Run a plan, write its report and print its summary."""
    quiet_libraries()
    from gaintune.report import write_report
    from gaintune.storage import first_process
    from gaintune.workflows import run_sequence

    try:
        matrix = run_sequence(plan, run, progress=progress_on(err))
    except DivergedError as error:
        if error.finished:  # the other methods deserve a report
            say(f"report  {write_report(run)}")
        raise
    if not first_process():
        return
    rows = [[method.label, *(percent(getattr(method.summary, name)) for name in FIGURES)] for method in matrix.methods]
    title = "Change of perplexity, % (negative is better)"
    out.print(table(title, ["method", *FIGURES.values()], rows, numeric=range(1, 5)))
    say(f"report  {write_report(run)}\nnumbers {run / 'matrix.json'}")


@training(
    "demo",
    takes=("data.domains", "methods"),
    without=("data.domains.*", "methods.*"),
    plan_argument=True,
    examples="""\
gaintune demo
gaintune demo --method gain-ffn --method lora:rank=8 --run-dir runs/mine
gaintune demo --domain medical --domain law --set train.epochs=2""",
)
def demo(given: Given, run: Annotated[Path, run_option("Run directory.")] = Path("runs/demo")) -> None:
    """Run the main job on the embedded model and texts: five domains, gain-ffn and lora, then the report."""
    if given.file is None:
        given = given.over({"methods": DEMO_METHODS, "data.validation_tokens": DEMO_VALIDATION_TOKENS})
    _sequence(given.plan(), run)


@training(
    "sequence",
    takes=("model", "data", "methods", "train", "evaluate"),
    plan_argument=True,
    examples="""\
gaintune sequence plan.yaml --run runs/notes
gaintune sequence --model demo --domain notes.jsonl --domain law --method lora
gaintune sequence --plan plan.yaml --method lora:rank=16,lr=2e-4
torchrun --nproc-per-node 2 -m gaintune sequence plan.yaml --run-dir out""",
)
def sequence(
    plan: Plan, run: Annotated[Path, run_option("Run directory; the same plan continues it.")] = Path("runs/sequence")
) -> None:
    """Adapt to domain after domain with each method, measure every domain after every stage, write the report."""
    _sequence(plan, run)


@training(
    "adapt",
    takes=("model", "data", "methods", "train", "evaluate", "classify"),
    without=("data.watched", "data.stream"),
    plan_argument=True,
    examples="""\
gaintune adapt --domain notes.jsonl --method gain-ffn --out adapters/notes
gaintune adapt --domain law --start adapters/notes --out adapters/law
gaintune adapt --task instruct --domain gsm8k --out adapters/gsm8k
gaintune adapt --task classify --domain mrpc --epochs 3 --out adapters/mrpc
gaintune adapt plan.yaml --out adapters/notes --set train.clip=0.5""",
)
def adapt(
    plan: Plan,
    out_folder: Annotated[Path, typer.Option("--out", help="New folder for the adapter.", rich_help_panel="Output")],
    start: Annotated[
        Path | None, typer.Option(help="Adapter to continue from, such as the last domain's.", rich_help_panel="Start")
    ] = None,
    allow_other_base: AllowOtherBase = False,
) -> None:
    """Adapt to one domain with one method and save the adapter; with --task classify, a new head beside it."""
    quiet_libraries()
    from gaintune.results import change
    from gaintune.storage import first_process
    from gaintune.workflows import ClassifierResult
    from gaintune.workflows import adapt as run_adapt

    result = run_adapt(plan, out_folder, start=start, allow_other_base=allow_other_base, progress=progress_on(err))
    if not first_process():
        return
    if isinstance(result, ClassifierResult):
        print_classifier(result)
        return
    before, after = result.before, result.after
    say(
        f"{plan.data.domains[-1].name}: perplexity {before.perplexity:.2f} -> {after.perplexity:.2f} "
        f"({change(before, after):+.1f} %), {before.bits_per_byte:.3f} -> {after.bits_per_byte:.3f} bits per byte\n"
        f"{result.trainable_parameters:,} parameters trained on {result.tokens:,} tokens of blocks in "
        f"{plural(result.steps, 'step')}, {result.tokens_per_second:,.0f} tokens/s\nadapter {result.adapter}"
    )


@training(
    "estimate",
    takes=("model", "data", "methods", "train", "evaluate", "classify"),
    without=("data.watched",),
    plan_argument=True,
    examples="""\
gaintune estimate plan.yaml --devices 8 --device-memory 80GB
gaintune estimate --model Qwen/Qwen2.5-7B --method disel --device-memory 80GB
gaintune estimate --model my/model --config FOLDER --json
gaintune estimate plan.yaml --tokens-per-second 900""",
)
def estimate(
    plan: Plan,
    config: Annotated[
        Path | None,
        typer.Option(help="Folder of the model's config.json, if its own is not at hand.", rich_help_panel="Model"),
    ] = None,
    devices: Annotated[
        int,
        typer.Option(
            min=1, help="Devices, a process each, or one process with model.device_map=auto.", rich_help_panel="Device"
        ),
    ] = 1,
    device_memory: Annotated[
        str | None,
        typer.Option(
            help="Memory of each device, such as 80GB, which then counts as a GPU; else this machine's.",
            rich_help_panel="Device",
        ),
    ] = None,
    tokens_per_second: Annotated[
        float | None, typer.Option(min=0.001, help="Pace of a process, for the time.", rich_help_panel="Pace")
    ] = None,
    run: Annotated[Path | None, run_option("Sequence whose pace is taken, by method.", "Pace")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print bytes and seconds as JSON.", rich_help_panel="Output")
    ] = False,
) -> None:
    """Estimate memory and time of a plan from its model's config alone.

    Memory is that of each device, in GB of 10^9 bytes. A GPU counts as full at 92 %: its context and the gaps between
    tensors take the rest. Time is that of training alone.
    """
    quiet_libraries()
    from gaintune.workflows import estimate_plan, in_gb, read_bytes, read_pace

    if run is not None and tokens_per_second is not None:
        refuse("and --run both give a pace: give one", ["tokens_per_second"])
    size = None if device_memory is None else read_bytes(device_memory)
    pace = tokens_per_second if run is None else read_pace(run)
    estimated = estimate_plan(plan, devices=devices, device_memory=size, architecture=config, tokens_per_second=pace)
    if as_json:
        typer.echo(json.dumps(estimated.to_dict(), indent=1))
        return
    heads = ["method", *MEMORY_COLUMNS, *([] if size is None else [f"fits {devices} x {device_memory}"])]
    rows = []
    for method in estimated.methods:
        sizes = [in_gb(getattr(method.memory, name)) for name in MEMORY_COLUMNS.values()]
        rows.append([method.label, *sizes, *([] if size is None else ["yes" if method.fits else "no"])])
    title, numeric = f"{estimated.model}, memory of each device", range(1, 1 + len(MEMORY_COLUMNS))
    out.print(table(title, heads, rows, numeric=numeric))
    for method in estimated.methods:
        if method.advice:
            say(f"{method.label}: {method.advice}")
        took = "" if method.seconds is None else f", {_duration(method.seconds)}"
        say(f"{method.label}: {method.tokens:,} tokens in {plural(method.updates, 'update')}{took}")


def _duration(seconds: float) -> str:
    """Write a time in the largest unit that it fills once."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} seconds"


@training(
    "sweep",
    examples="""\
gaintune sweep grid.yaml --run runs/sweep --jobs 2
gaintune sweep grid.yaml --set seeds=[0,1] --set plan.train.epochs=2
gaintune sweep grid.yaml --engine ray --address ray://head:10001 --jobs 8
gaintune sweep grid.yaml --figure in_domain --target -20""",
)
def sweep(
    grid: Annotated[Path, typer.Argument(metavar="GRID.yaml", help="Grid: methods, rates, orders, seeds and more.")],
    run: Annotated[Path, run_option("Folder of the sweep; finished runs in it are kept.", None)] = Path("runs/sweep"),
    engine: Annotated[
        str, typer.Option(help="loky (processes here), ray, dask, or sequential (one process).")
    ] = "loky",
    jobs: Annotated[int, typer.Option(help="Runs at a time; each gets its share of the cores.")] = 1,
    address: Annotated[str | None, typer.Option(help="Ray or Dask cluster; a local one starts unless given.")] = None,
    target: Annotated[
        float | None, typer.Option(help="In-domain change, in %, to compare at; unless given, what all reach.")
    ] = None,
    figure: Annotated[str, typer.Option(help="Figure to compare, a column of sweep.csv.")] = "backward_transfer",
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any key of the grid, such as seeds=[0,1].")
    ] = None,
) -> None:
    """Run a grid of sequences, whatever of it is missing, and compare its methods over rates, seeds and orders.

    Writes sweep.csv (a row for each run) and cells.csv (a row for each domain measured), both as .parquet too,
    comparison.md and .json, and the trade-off as tradeoff.png and .svg. Keys of the grid are set as --set seeds=[0,1]
    or --set plan.train.epochs=2. Ends with exit code 1 if any run failed.
    """
    import gaintune.workflows.sweep as sweeps

    engine = sweeps.check_engine(engine, jobs, address)  # before what takes seconds to load
    quiet_libraries()
    sweeps.check_comparison(figure, target)
    checked, progress = sweeps.read_grid(grid, set_ or ()), progress_on(err)
    done = sweeps.run_sweep(
        checked, run, engine=engine, jobs=jobs, address=address, progress=progress, prepare=quiet_libraries
    )
    sweeps.discard(run)
    written = "tables"
    if done.finished:
        try:
            confidence = checked.plan.evaluate.confidence
            comparison = sweeps.compare_sweep(done, target=target, figure=figure, confidence=confidence)
        except DataError as error:
            say(f"methods are not compared: {error}")
        else:
            sweeps.write(comparison, run)
            written = "tables and comparison"
            frame = sweeps.point_frame(comparison.matched, comparison)
            rows = [list(map(str, row)) for row in frame.itertuples()]
            heads = ["method", *frame.columns]
            out.print(table(sweeps.target_title(comparison), heads, rows, numeric=range(1, 5)))
            lines = [sweeps.pair_sentence(pair, comparison) for pair in comparison.pairs]
            lines += [f"by curve, {sweeps.curve_sentence(curve, comparison)}" for curve in comparison.curves]
            for line in (*lines, *sweeps.remarks(comparison)):
                say(line)
    say(f"{plural(len(done.finished), 'run')} finished, {len(done.failed)} failed; {written} {run}")
    if done.failed:
        failures = "\n".join(f"  {row.folder}: {row.error}" for row in done.failed)
        raise SweepError(f"{plural(len(done.failed), 'run')} failed; the same command tries them again:\n{failures}")
