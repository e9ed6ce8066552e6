"""Options of the analyses, written out, until each is made from its analysis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gaintune.cli.benchmarks import BenchmarkOptions
from gaintune.cli.options import Given
from gaintune.config import (
    DataConfig,
    MethodConfig,
    ModelConfig,
    Plan,
    Section,
    TrainConfig,
)

if TYPE_CHECKING:
    from gaintune.evaluate.benchmarks import BenchmarkConfig


def _help(section: type[Section], field: str) -> str:
    """A field's own description and default, so that help and plan never disagree."""
    info = section.model_fields[field]
    default = info.get_default(call_default_factory=True)
    if isinstance(default, tuple):
        default = " ".join(getattr(each, "name", str(each)) for each in default)
    text = info.description or ""
    text = text[:1].upper() + text[1:]
    return text if default is None else f"{text}. [default: {default}]"


def _option(section: type[Section], field: str, *names: str) -> Any:
    return typer.Option(*names, help=_help(section, field), show_default=False)


PlanFile = Annotated[Path | None, typer.Argument(metavar="PLAN.yaml", help="YAML plan; options are laid over it.")]
Model = Annotated[str | None, _option(ModelConfig, "name", "--model")]
Domains = Annotated[
    list[str] | None, typer.Option("--domain", help="Domain: catalogue name, path, or name=path; repeat in order.")
]
Methods = Annotated[
    list[str] | None,
    typer.Option("--method", help="Method, such as gain-ffn or lora:rank=16,lr=2e-4,label=lora16; repeatable."),
]
Task = Annotated[str | None, _option(DataConfig, "task", "--task")]
Template = Annotated[str | None, _option(DataConfig, "template", "--template")]
Penalty = Annotated[str | None, _option(MethodConfig, "penalty", "--penalty")]
PenaltyStrength = Annotated[float | None, _option(MethodConfig, "penalty_strength", "--penalty-strength")]
Replay = Annotated[float | None, _option(MethodConfig, "replay", "--replay")]
Watched = Annotated[
    list[str] | None,
    typer.Option("--watch", help="Domain that is measured beside the others and never learnt; repeatable."),
]
TextColumn = Annotated[
    str | None,
    typer.Option("--text-column", help="Column that holds the text of every domain that is a local file or folder."),
]
TrainTokens = Annotated[int | None, _option(DataConfig, "train_tokens", "--train-tokens")]
ValidationTokens = Annotated[int | None, _option(DataConfig, "validation_tokens", "--validation-tokens")]
BlockSize = Annotated[int | None, _option(DataConfig, "block_size", "--block-size")]
Lr = Annotated[float | None, _option(TrainConfig, "lr", "--lr")]
Epochs = Annotated[int | None, _option(TrainConfig, "epochs", "--epochs")]
BatchSize = Annotated[int | None, _option(TrainConfig, "batch_size", "--batch-size")]
Seed = Annotated[
    int | None,
    typer.Option("--seed", help="Seed of training and resampling; the split has its own, data.seed. [default: 0]"),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Any other key of the plan, such as train.clip=0.5."),
]

PLACES = {
    "model": ("model.name",),
    "domains": ("data.domains",),
    "watched": ("data.watched",),
    "methods": ("methods",),
    "task": ("data.task",),
    "template": ("data.template",),
    "train_tokens": ("data.train_tokens",),
    "validation_tokens": ("data.validation_tokens",),
    "block_size": ("data.block_size",),
    "lr": ("train.lr",),
    "epochs": ("train.epochs",),
    "batch_size": ("train.batch_size",),
    "seed": ("train.seed", "evaluate.seed"),  # not data.seed: what is held out must not move between runs
}

OF_EVERY_METHOD = ("penalty", "penalty_strength", "replay")


@dataclass(frozen=True)
class Options:
    """What was given on the command line of the options that several commands share; None for what was not."""

    model: str | None = None
    domains: Sequence[Any] | None = None
    watched: Sequence[str] | None = None
    methods: Sequence[str] | None = None
    task: str | None = None
    template: str | None = None
    text_column: str | None = None
    penalty: str | None = None
    penalty_strength: float | None = None
    replay: float | None = None
    train_tokens: int | None = None
    validation_tokens: int | None = None
    block_size: int | None = None
    lr: float | None = None
    epochs: int | None = None
    batch_size: int | None = None
    seed: int | None = None


def assemble(plan: Path | None, given: Options, assignments: Sequence[str] | None) -> Plan:
    """Assemble a plan from a file, options and assignments."""
    places = {**PLACES, **{option: (f"methods.*.{option}",) for option in OF_EVERY_METHOD}}
    places["text_column"] = ("data.domains.*.text_column",)
    options = {
        key: value for option, keys in places.items() for key in keys if (value := getattr(given, option)) is not None
    }
    return Given(plan, options, assignments or ()).plan()


Adapters = Annotated[list[Path], typer.Argument(metavar="ADAPTER...", help="Adapter folders on one base.")]
AdaptersBase = Annotated[
    str | None, typer.Option(help="Base; the plan's or the one the first adapter names unless given.")
]
PlanOption = Annotated[
    Path | None,
    typer.Option("--plan", metavar="PLAN.yaml", help="Plan whose base, domains and data settings are used."),
]
OtherBase = Annotated[bool, typer.Option("--allow-other-base", help="Take adapters that were trained on another base.")]
LEARNT = "Domains are those that the adapters learnt last, unless --plan or --domain names some."


def with_base(adapters: Sequence[Path], given: Options, assignments: Sequence[str] | None) -> tuple[Options, list[str]]:
    """Options and assignments with the base that the first adapter names, and its revision, unless one is given."""
    from gaintune.adapters import claimed_base, read_record

    settled = list(assignments or ())
    if given.model is not None:
        return given, settled
    base = claimed_base(adapters[0], read_record(adapters[0]))
    revision = [f"model.revision={base.revision}"] if base.revision else []
    return replace(given, model=base.name), [*revision, *settled]


def survey_plan(plan: Path | None, adapters: Sequence[Path], given: Options, assignments: Sequence[str] | None) -> Plan:
    """The plan of a survey: a file's if there is one, then the options; base and domains learnt last by records."""
    if plan is not None:
        return assemble(plan, given, assignments)
    from gaintune.adapters import read_record

    given, settled = with_base(adapters, given, assignments)
    records = [read_record(folder) for folder in adapters]
    learnt = dict.fromkeys(record.domains[-1] for record in records if record and record.domains)
    return assemble(None, replace(given, domains=given.domains or list(learnt) or None), settled)


Fewshot = Annotated[
    int | None, typer.Option(help="Worked examples before each question; what lm-eval's task file says unless given.")
]
FewshotSeed = Annotated[int | None, typer.Option(help="Seed of the draw of worked examples; lm-eval's unless given.")]
Limit = Annotated[int | None, typer.Option(help="Rows of each benchmark, the first ones; all unless given.")]
BenchmarkData = Annotated[
    list[str] | None,
    typer.Option(metavar="FOLDER|NAME=PATH", help="Local rows: a folder with a folder for each benchmark; repeatable."),
]
BenchmarkSource = Annotated[
    str | None, typer.Option(help="Where rows are from: auto, hub or local; auto asks the Hub for what is not local.")
]
GeneratedTokens = Annotated[int | None, typer.Option(help="Longest generated answer, in tokens.")]
AllowCode = Annotated[
    bool, typer.Option("--allow-code-execution", help="Run the programs that the model writes, which humaneval needs.")
]


def config_of(plan: Plan, benchmarks: str | None, **options: Any) -> BenchmarkConfig | None:
    """Return the benchmarks that options ask for; None for none."""
    given = {name: value for name, value in options.items() if value not in (None, False)}
    return BenchmarkOptions.model_validate(given).config(plan.evaluate, benchmarks or "")
