"""Commands that hand results over: a run's report, a model with an adapter absorbed."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from pydantic import BaseModel, Field

from gaintune.cli.console import quiet_libraries, say
from gaintune.cli.options import AllowOtherBase, Given, command

commands = typer.Typer()
delivery = partial(command, commands, group="Delivery")


@delivery("report", examples="gaintune report runs/demo")
def report(run: Annotated[Path, typer.Argument(help="Run directory.")]) -> None:
    """Write the report of a run anew, from its stored losses: page, figures, CSV and Markdown."""
    from gaintune.report import write_report

    say(f"report {write_report(run)}")


class MergeSettings(BaseModel):
    """Options of the merged model."""

    dtype: str = Field(default="auto", description="precision of the merged weights: auto, bf16, fp16 or fp32")
    max_shard_size: str = Field(default="5GB", description="largest size of a safetensors file")
    tolerance: float = Field(default=0.5, description="largest accepted change of perplexity, in %")
    force: bool = Field(default=False, description="write the model even above the tolerance.")


@delivery(
    "merge",
    takes=("model", "data", "evaluate"),
    without=("data.watched", "data.stream", "data.train_tokens", "evaluate.seed"),
    helps={"model": "Base; the adapter's unless given.", "plan": "Plan whose base and texts are used."},
    examples="""\
gaintune merge adapters/notes merged --domain notes.jsonl
gaintune merge adapters/notes merged --dtype bf16 --tolerance 0.2
gaintune merge adapters/gsm8k merged --domain gsm8k --task instruct""",
)
def merge(
    given: Given,
    output: MergeSettings,
    adapter: Annotated[Path, typer.Argument(help="Adapter folder.")],
    out_folder: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the merged model; must not exist.")],
    allow_other_base: AllowOtherBase = False,
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
        allow_other_base=allow_other_base,
        batch_size=plan.evaluate.batch_size,
        **output.model_dump(),
    )
    say(f"{certificate.verdict}\nmodel {out_folder}")
