"""Options that several commands share, and how they are laid over a plan."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from gaintune.config.plan import (
    DataConfig,
    MethodConfig,
    ModelConfig,
    Plan,
    Section,
    TrainConfig,
    apply_overrides,
    as_domain,
    as_list,
    build_plan,
    read_values,
)
from gaintune.errors import ConfigError, RunDirectoryError
from gaintune.storage.files import canonical_json
from gaintune.storage.ownership import strangers


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


def parse_method(text: str) -> dict[str, Any]:
    """`lora:rank=16,targets=q_proj+v_proj` as the fields of a method."""
    name, _, options = text.partition(":")
    fields: dict[str, Any] = {}
    for option in filter(None, options.split(",")):
        key, separator, value = option.partition("=")
        if not separator:
            raise ConfigError(f"--method {text}: write name:key=value,key=value, such as lora:rank=16,lr=2e-4")
        fields[key] = value.split("+") if key == "targets" and "+" in value else value
    return {"name": name, **fields}


def _with_text_column(domains: Any, column: str) -> list[Any]:
    """Domains with the column that holds their text, where they are local files: all that no name stands for."""
    from gaintune.data.domains import CATALOGUE
    from gaintune.data.labelled import GLUE

    known = {*CATALOGUE, *GLUE}
    each = [as_domain(domain) for domain in as_list(domains) or ()]
    local = [isinstance(domain, dict) and domain.get("source") not in known for domain in each]
    if not any(local):
        raise ConfigError("--text-column names a column of local files: give one with --domain, such as notes.csv")
    return [{**domain, "text_column": column} if own else domain for domain, own in zip(each, local, strict=True)]


def assemble(plan: Path | None, given: Options, assignments: Sequence[str] | None) -> Plan:
    """The plan file if there is one, then the options that were given, then `--set`.

    Options of a method (`--penalty` and the like) are laid over every method, and `--text-column` over every local
    domain.
    """
    values: dict[str, Any] = read_values(plan) if plan else {}
    for option, keys in PLACES.items():
        value = getattr(given, option)
        if value is None:
            continue
        if option == "methods":
            value = [parse_method(each) for each in value]
        for key in keys:
            section, _, leaf = key.partition(".")
            if leaf:
                held = values.get(section)
                values[section] = {**(held if isinstance(held, dict) else {}), leaf: value}
            else:
                values[section] = value
    if given.text_column is not None:
        data = values.get("data")
        data = data if isinstance(data, dict) else {}
        values["data"] = {**data, "domains": _with_text_column(data.get("domains"), given.text_column)}
    of_every = {option: getattr(given, option) for option in OF_EVERY_METHOD if getattr(given, option) is not None}
    if of_every:
        methods = as_list(values.get("methods")) or [method.name for method in Plan().methods]
        values["methods"] = [{**({"name": each} if isinstance(each, str) else each), **of_every} for each in methods]
    values = apply_overrides(values, assignments or ())
    if given.domains or given.watched:
        values = {**values, "data": _with_own_tasks(values["data"])}
    return build_plan(values, origin=str(plan) if plan else "plan")


def _with_own_tasks(data: Any) -> Any:
    """Domains of the catalogue with their own task, text or instruct, where the plan's is the other one."""
    from gaintune.data.domains import CATALOGUE

    task = data.get("task", "text") if isinstance(data, dict) else None
    if task not in ("text", "instruct"):  # a classifier's domains are not mixed, and the plan refuses what is wrong
        return data

    def settled(value: Any) -> Any:
        domain = as_domain(value)
        entry = CATALOGUE.get(str(domain.get("source"))) if isinstance(domain, dict) else None
        return value if entry is None or entry.task in (task, domain.get("task")) else {"task": entry.task, **domain}

    given = {key: as_list(data[key]) for key in ("domains", "watched") if data.get(key)}
    return {**data, **{key: [settled(each) for each in domains] for key, domains in given.items()}}


out = Console()
err = Console(stderr=True)

Adapters = Annotated[list[Path], typer.Argument(metavar="ADAPTER...", help="Adapter folders on one base.")]
Model = Annotated[str | None, typer.Option(help="Base; the plan's or the one the first adapter names unless given.")]
PlanOption = Annotated[
    Path | None,
    typer.Option("--plan", metavar="PLAN.yaml", help="Plan whose base, domains and data settings are used."),
]
OtherBase = Annotated[bool, typer.Option("--allow-other-base", help="Take adapters that were trained on another base.")]
TABLES = {
    "gates": ("gates.csv", "gates-*.csv", "gates.md", "gate-histograms.*", "gate-heatmap.*"),
    **{
        name: (f"{name}.csv", f"{name}-*.csv", f"{name}.md", f"{name}.*g", f"{name}-*.*g")
        for name in ("gains", "landscape", "linear-model", "retention", "subspace", "tokens", "transfer")
    },
}
"""What every analysis writes beside its record, which is NAME.json."""
LEARNT = "Domains are those that the adapters learnt last, unless --plan or --domain names some."


def say(text: str) -> None:
    """One line or more to standard output, as it is: no markup, no colours, no wrapping."""
    out.print(text, highlight=False, markup=False, soft_wrap=True)


def tables_folder(folder: Path) -> Path:
    """Return the value of --out, for a folder that is new or holds tables of analyses and nothing else.

    Raises:
        RunDirectoryError: it is a file, or holds what no analysis wrote.
    """
    if folder.exists() and not folder.is_dir():
        raise RunDirectoryError(f"{folder} is a file; name a folder for tables and figures")
    if folder.exists():
        own = [
            file
            for name, beside in TABLES.items()
            if _ours(folder / f"{name}.json")
            for file in (f"{name}.json", *beside)
        ]
        stranger = next(strangers(folder, [*own, "measured/*.json"]), None)  # retention keeps losses there on its way
        if stranger is not None:
            raise RunDirectoryError(
                f"{folder} is not empty, and no analysis wrote {stranger}; name another folder for tables and figures"
            )
    return folder


def _ours(record: Path) -> bool:
    """Whether a file is JSON in the form in which this program writes it."""
    try:
        text = record.read_text(encoding="utf-8")
        return text == canonical_json(json.loads(text))
    except (OSError, ValueError):
        return False


def with_base(adapters: Sequence[Path], given: Options, assignments: Sequence[str] | None) -> tuple[Options, list[str]]:
    """Options and assignments with the base that the first adapter names, and its revision, unless one is given."""
    from gaintune.adapters.disk import claimed_base, read_record

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
    from gaintune.adapters.disk import read_record

    given, settled = with_base(adapters, given, assignments)
    records = [read_record(folder) for folder in adapters]
    learnt = dict.fromkeys(record.domains[-1] for record in records if record and record.domains)
    return assemble(None, replace(given, domains=given.domains or list(learnt) or None), settled)
