"""The command line: arguments become a plan, the library does the work, tables and paths come back. No logic here."""

from __future__ import annotations

import errno
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from gaintune import __version__
from gaintune.cli import analyse as cli_analysis
from gaintune.cli import analyse as cli_gains
from gaintune.cli import (
    analyse as cli_surveys,
)
from gaintune.cli import (
    evaluate as cli_evaluate,
)
from gaintune.cli import (
    lists as cli_lists,
)
from gaintune.cli import (
    recipe as cli_recipe,
)
from gaintune.cli import (
    sweep as cli_sweep,
)
from gaintune.cli.console import percent, progress_on, quiet_libraries, show_warnings, table
from gaintune.cli.options import (
    BatchSize,
    BlockSize,
    Domains,
    Epochs,
    Lr,
    Methods,
    Model,
    Options,
    Penalty,
    PenaltyStrength,
    PlanFile,
    Replay,
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
from gaintune.errors import DivergedError, GaintuneError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its boxes cut the names of options on a terminal of 80 columns
    context_settings={"max_content_width": 120},
)
out = Console()
err = Console(stderr=True)


def _tell_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"gaintune {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Adapt language models to domain after domain without making them forget, and measure what was kept."""


DEMO_METHODS = ["gain-ffn", "lora"]
DEMO_VALIDATION_TOKENS = 2560  # ten blocks: keeps the demo under ten minutes on two cores
INTERRUPTED = 130
CANNOT_WRITE = (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.ENAMETOOLONG)


def _sequence(plan: Any, run: Path) -> None:
    """Run a plan, print its summary, write its report."""
    quiet_libraries()
    from gaintune.report import write_report
    from gaintune.storage.run import first_process
    from gaintune.workflows.sequence import run_sequence

    try:
        matrix = run_sequence(plan, run, progress=progress_on(err))
    except DivergedError as error:
        if error.finished:  # what the others did is worth a report
            out.print(f"report  {write_report(run)}", highlight=False, soft_wrap=True)
        raise
    if not first_process():
        return
    figures = ("in_domain", "backward_transfer", "backward_transfer_since_learnt", "forward_interference")
    rows = []
    for method in matrix.methods:
        found = [getattr(method.summary, name) for name in figures]
        cells = [percent(each.value, each.low, each.high) if each else "—" for each in found]
        rows.append([method.label, *cells])
    heads = ["method", "in-domain", "earlier domains, against base", "earlier domains, since learnt", "not yet learnt"]
    out.print(table("Change of perplexity, % (negative is better)", heads, rows, numeric=range(1, 5)))
    report = write_report(run)
    out.print(f"report  {report}\nnumbers {run / 'matrix.json'}", highlight=False, soft_wrap=True)


@app.command()
def demo(
    plan: PlanFile = None,
    run: Annotated[Path, typer.Option(help="Run directory.")] = Path("runs/demo"),
    method: Methods = None,
    domain: Domains = None,
    set_: Set = None,
) -> None:
    """Run the main job on the embedded model and texts: five domains, gain-ffn and lora, then the report."""
    methods, tokens = (method, None) if plan else (method or DEMO_METHODS, DEMO_VALIDATION_TOKENS)
    _sequence(assemble(plan, Options(methods=methods, domains=domain, validation_tokens=tokens), set_), run)


@app.command()
def sequence(
    plan: PlanFile = None,
    run: Annotated[Path, typer.Option(help="Run directory; an unfinished run of the same plan is continued.")] = Path(
        "runs/sequence"
    ),
    model: Model = None,
    domain: Domains = None,
    watch: Watched = None,
    task: Task = None,
    template: Template = None,
    text_column: TextColumn = None,
    method: Methods = None,
    penalty: Penalty = None,
    penalty_strength: PenaltyStrength = None,
    replay: Replay = None,
    train_tokens: TrainTokens = None,
    validation_tokens: ValidationTokens = None,
    block_size: BlockSize = None,
    lr: Lr = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    seed: Seed = None,
    set_: Set = None,
) -> None:
    """Adapt to domain after domain with each method, measure every domain after every stage, write the report."""
    given = Options(
        model=model, domains=domain, watched=watch, methods=method, task=task, template=template,
        text_column=text_column, penalty=penalty, penalty_strength=penalty_strength, replay=replay,
        train_tokens=train_tokens, validation_tokens=validation_tokens, block_size=block_size, lr=lr, epochs=epochs,
        batch_size=batch_size, seed=seed,
    )  # fmt: skip
    _sequence(assemble(plan, given, set_), run)


@app.command()
def adapt(
    out_folder: Annotated[Path, typer.Option("--out", help="Folder for the adapter; must not exist.")],
    plan: PlanFile = None,
    model: Model = None,
    domain: Domains = None,
    task: Task = None,
    template: Template = None,
    text_column: TextColumn = None,
    method: Methods = None,
    penalty: Penalty = None,
    penalty_strength: PenaltyStrength = None,
    replay: Replay = None,
    start: Annotated[Path | None, typer.Option(help="Adapter to carry on from, such as the previous domain's.")] = None,
    allow_other_base: Annotated[
        bool, typer.Option("--allow-other-base", help="Use --start even if its base was another.")
    ] = False,
    train_tokens: TrainTokens = None,
    validation_tokens: ValidationTokens = None,
    block_size: BlockSize = None,
    lr: Lr = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    seed: Seed = None,
    set_: Set = None,
) -> None:
    """Adapt to one domain with one method and save the adapter; with --task classify, a new head beside it."""
    given = Options(
        model=model, domains=domain, methods=method, task=task, template=template, text_column=text_column,
        penalty=penalty, penalty_strength=penalty_strength, replay=replay, train_tokens=train_tokens,
        validation_tokens=validation_tokens, block_size=block_size, lr=lr, epochs=epochs, batch_size=batch_size,
        seed=seed,
    )  # fmt: skip
    settled = assemble(plan, given, set_)
    quiet_libraries()
    from gaintune.progress import plural
    from gaintune.results.losses import change
    from gaintune.storage.run import first_process
    from gaintune.workflows.adapt import adapt as run_adapt
    from gaintune.workflows.classify import ClassifierResult

    result = run_adapt(settled, out_folder, start=start, allow_other_base=allow_other_base, progress=progress_on(err))
    if not first_process():
        return
    if isinstance(result, ClassifierResult):
        cli_evaluate.print_classifier(result)
        return
    before, after = result.before, result.after
    out.print(
        f"{settled.data.domains[-1].name}: perplexity {before.perplexity:.2f} -> {after.perplexity:.2f} "
        f"({change(before, after):+.1f} %), {before.bits_per_byte:.3f} -> {after.bits_per_byte:.3f} bits per byte\n"
        f"{result.trainable_parameters:,} parameters trained on {result.tokens:,} tokens of blocks in "
        f"{plural(result.steps, 'step')}, {result.tokens_per_second:,.0f} tokens/s\nadapter {result.adapter}",
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def report(run: Annotated[Path, typer.Argument(help="Run directory.")]) -> None:
    """Write the report of a run anew, from its stored losses: page, figures, CSV and Markdown."""
    from gaintune.report import write_report

    out.print(f"report {write_report(run)}", highlight=False, soft_wrap=True)


@app.command()
def merge(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder.")],
    out_folder: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the merged model; must not exist.")],
    plan: Annotated[Path | None, typer.Option(metavar="PLAN.yaml", help="Plan whose base and texts are used.")] = None,
    model: Annotated[str | None, typer.Option(help="Base; the one the adapter names unless given.")] = None,
    dtype: Annotated[str, typer.Option(help="Numbers of the merged weights: auto, bf16, fp16 or fp32.")] = "auto",
    domain: Domains = None,
    task: Task = None,
    template: Template = None,
    text_column: TextColumn = None,
    validation_tokens: ValidationTokens = None,
    block_size: BlockSize = None,
    tolerance: Annotated[float, typer.Option(help="Largest accepted change of perplexity, %.")] = 0.5,
    max_shard_size: Annotated[str, typer.Option(help="Largest size of one safetensors file.")] = "5GB",
    force: Annotated[bool, typer.Option("--force", help="Write the model even above the tolerance.")] = False,
    allow_other_base: Annotated[
        bool, typer.Option("--allow-other-base", help="Merge into a base the adapter was not trained on.")
    ] = False,
    set_: Set = None,
) -> None:
    """Absorb an adapter into its base and write a plain transformers folder with a certificate of parity.

    The merged model is read back and compared with the adapter on the first --domain's validation text.
    """
    from gaintune.adapters.disk import claimed_base, read_record
    from gaintune.workflows.merge import check_out, merge_adapter

    check_out(out_folder)
    base = None if model or plan else claimed_base(adapter, read_record(adapter))
    given = Options(
        model=base.name if base else model, domains=domain or (None if plan else ["law"]), task=task,
        template=template, text_column=text_column, validation_tokens=validation_tokens, block_size=block_size,
    )  # fmt: skip
    settled = assemble(
        plan, given, [*([f"model.revision={base.revision}"] if base and base.revision else []), *(set_ or [])]
    )
    quiet_libraries()
    from gaintune.data.load import load_domain
    from gaintune.models.base import load_tokenizer

    text = load_domain(settled.data.domains[0], settled.data, load_tokenizer(settled.model))
    certificate = merge_adapter(
        adapter,
        out_folder,
        blocks=text.validation,
        bytes_per_block=text.validation_bytes,
        model=settled.model,
        dtype=dtype,
        tolerance=tolerance,
        force=force,
        allow_other_base=allow_other_base,
        max_shard_size=max_shard_size,
        batch_size=settled.evaluate.batch_size,
    )
    out.print(f"{certificate.verdict}\nmodel {out_folder}", highlight=False, soft_wrap=True)


cli_lists.register(app)
cli_analysis.register(app)
cli_gains.register(app)
cli_surveys.register(app)
cli_evaluate.register(app)
cli_sweep.register(app)
app.add_typer(cli_recipe.app, name="recipe")


def main() -> None:
    """Entry point: a person's mistake ends in one message and exit code 2, a failed run in exit code 1."""
    show_warnings(err)
    try:
        app()
    except GaintuneError as error:
        _fail(str(error), error.exit_code)
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            again = "training, sweeps, recipes and retention continue, all else begins anew"
            err.print(f"stopped; run the same command again ({again})", highlight=False)
        raise
    except Exception as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
        if full:  # safetensors says so through a class of its own
            _fail("the disk is full; make room and run the same command again, what was finished is kept", 1)
        if isinstance(error, OSError) and error.errno in CANNOT_WRITE:
            _fail(f"{error.filename or 'a file'}: {error.strerror}", 1)
        raise


def _fail(message: str, code: int) -> NoReturn:
    err.print(f"error: {message}", style="red", highlight=False, markup=False, soft_wrap=True)
    sys.exit(code)
