"""Commands that hand results over: a run's report, a model with an adapter absorbed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gaintune.cli.console import quiet_libraries, say
from gaintune.cli.options import Given, command

commands = typer.Typer()


@command(commands, "report", group="Delivery", examples="gaintune report runs/demo")
def report(run: Annotated[Path, typer.Argument(help="Run directory.")]) -> None:
    """Write the report of a run anew, from its stored losses: page, figures, CSV and Markdown."""
    from gaintune.report import write_report

    say(f"report {write_report(run)}")


@command(
    commands,
    "merge",
    group="Delivery",
    takes=("model", "data", "evaluate"),
    without=("data.watched", "data.train_tokens", "evaluate.seed"),
    helps={
        "model": "Base; the one the adapter names unless given.",
        "plan": "Plan whose base and texts are used.",
    },
    examples="""\
gaintune merge adapters/notes merged --domain notes.jsonl
gaintune merge adapters/notes merged --dtype bf16 --tolerance 0.2
gaintune merge adapters/gsm8k merged --domain gsm8k --task instruct""",
)
def merge(
    given: Given,
    adapter: Annotated[Path, typer.Argument(help="Adapter folder.")],
    out_folder: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the merged model; must not exist.")],
    dtype: Annotated[
        str,
        typer.Option(help="Numbers of the merged weights: auto, bf16, fp16 or fp32.", rich_help_panel="Output"),
    ] = "auto",
    max_shard_size: Annotated[
        str, typer.Option(help="Largest size of one safetensors file.", rich_help_panel="Output")
    ] = "5GB",
    tolerance: Annotated[
        float, typer.Option(help="Largest accepted change of perplexity, %.", rich_help_panel="Parity")
    ] = 0.5,
    force: Annotated[
        bool, typer.Option("--force", help="Write the model even above the tolerance.", rich_help_panel="Parity")
    ] = False,
    allow_other_base: Annotated[
        bool,
        typer.Option(
            "--allow-other-base",
            help="Merge into a base the adapter was not trained on.",
            rich_help_panel="Model",
        ),
    ] = False,
) -> None:
    """Absorb an adapter into its base and write a plain transformers folder with a certificate of parity.

    The merged model is read back and compared with the adapter on the first --domain's validation text.
    """
    from gaintune.workflows import check_out, merge_adapter

    check_out(out_folder)
    if given.file is None:
        given = given.over({"data.domains": ["law"]})
    plan = given.on_base_of([adapter]).plan()
    quiet_libraries()
    from gaintune.data import load_domain
    from gaintune.models import load_tokenizer

    text = load_domain(plan.data.domains[0], plan.data, load_tokenizer(plan.model))
    certificate = merge_adapter(
        adapter,
        out_folder,
        blocks=text.validation,
        bytes_per_block=text.validation_bytes,
        model=plan.model,
        dtype=dtype,
        tolerance=tolerance,
        force=force,
        allow_other_base=allow_other_base,
        max_shard_size=max_shard_size,
        batch_size=plan.evaluate.batch_size,
    )
    say(f"{certificate.verdict}\nmodel {out_folder}")
