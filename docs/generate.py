"""Write the reference pages from the code: `python docs/generate.py` (a test checks that they are current)."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import sys
import typing
from pathlib import Path

import click
import typer
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

import gaintune
from gaintune.analysis import ANALYSES, Analysis
from gaintune.cli import app
from gaintune.results.records import BaseFigures, Cell, MatrixRow, MethodMatrix, StageSummary, Summary

FOLDER = Path(__file__).parent / "reference"
WIDTH = 100  # columns of the help texts
GENERATED = "<!-- Written by docs/generate.py; edit the code it reads. -->\n"


def commands() -> str:
    """Return the page of commands: the help of each, as a terminal shows it."""
    root = typer.main.get_command(app)
    lines = ["# Commands\n", GENERATED]
    for name, command in _walk(root, "gaintune"):
        context = click.Context(command, info_name=name, terminal_width=WIDTH, max_content_width=WIDTH)
        heading = "##" if name.count(" ") < 2 else "###"
        lines += [f"{heading} `{name}`\n", "```text", command.get_help(context).rstrip(), "```\n"]
    return "\n".join(lines)


def _walk(command: typing.Any, name: str) -> typing.Iterator[tuple[str, typing.Any]]:
    yield name, command
    for inner, below in sorted(getattr(command, "commands", {}).items()):
        yield from _walk(below, f"{name} {inner}")


def plan() -> str:
    """Return the page of plan keys: every section with its keys, defaults and meanings."""
    lines = [
        "# Plan\n",
        GENERATED,
        "A plan is a YAML file of these sections. `gaintune config` prints one with every default. On the command line "
        "`--set SECTION.KEY=VALUE` sets any key.\n",
    ]
    for name, info in gaintune.Plan.model_fields.items():
        section = _model_in(info.annotation)
        if section is not None:
            lines += [f"## `{name}`\n", *_fields_of(section)]
    return "\n".join(lines)


def _model_in(annotation: object) -> type[BaseModel] | None:
    """Return the pydantic model that a field holds, alone or in a tuple."""
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return annotation
    found = (_model_in(each) for each in typing.get_args(annotation))
    return next((each for each in found if each is not None), None)


def _fields_of(section: type[BaseModel]) -> list[str]:
    rows = []
    nested: list[str] = []
    for key, info in section.model_fields.items():
        default = info.get_default(call_default_factory=True)
        shown = "required" if default is PydanticUndefined else "—" if default is None else f"`{_plain(default)}`"
        rows.append(f"| `{key}` | {shown} | {(info.description or '').replace('|', chr(92) + '|')} |")
        inner = _model_in(info.annotation)
        if inner is not None:
            nested += [f"### An entry of `{key}`\n", *_fields_of(inner)]
    doc = inspect.getdoc(section) or ""
    return [f"{doc}\n", "| key | default | meaning |", "|---|---|---|", *rows, "", *nested]


def _plain(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(_plain(each) for each in value) or "none"
    return str(getattr(value, "name", value)).lower() if isinstance(value, bool) else str(getattr(value, "name", value))


FILES = """\
## A run directory

`gaintune sequence --run RUN` writes:

| file | what it holds |
|---|---|
| `run.json` | the marker: gaintune made this folder, and may change what it wrote there |
| `plan.yaml` | the whole plan, with every default |
| `environment.json` | versions, machine and device |
| `inputs.json` | fingerprint of the base, and a hash of every domain's rows |
| `events.jsonl` | what happened when, a line each |
| `base/PRECISION/DOMAIN.json` | losses of the untouched base, block by block |
| `stages/METHOD/NN-DOMAIN/adapter/` | the adapter after a stage |
| `stages/METHOD/NN-DOMAIN/training.json`, `metrics.json` | updates, tokens and the loss of every update; with \
`train.keep: best` also `kept_step` and `snapshot_losses` |
| `stages/METHOD/NN-DOMAIN/evaluations/DOMAIN.json` | losses after that stage, block by block |
| `matrix.json` | every number of the report, described below |
| `report.html`, `figures/`, `matrix.csv`, `matrix.md` | the report |

Losses are `nll` (nats), `tokens` and `bytes`: one number per validation block. An adapter's `manifest.json` holds the
SHA-256 of every file beside it and is written last.

## A recipe's folder

A folder for each step, as its kind writes it; `outcome.json` there is what a step measured, and `traceback.txt` what
stopped it where no one expected an error. Beside them `recipe.json` (the recipe and the last call's keys),
`results.md`, `results.csv` and `results.json`, which names failed steps under `failed`.

## An adapter folder

PEFT's `adapter_config.json` and `adapter_model.safetensors`, what a method needs for the next domain
(`adalora.safetensors`, `gainlora.safetensors`, `penalty.safetensors`), and `gaintune.json`, the record:

"""


def files() -> str:
    """Return the page of stored files: what a run and an adapter folder hold."""
    lines = ["# Files\n", GENERATED, FILES + "\n".join(_attributes(gaintune.AdapterRecord))]
    lines.append("\n## `matrix.json`\n")
    for record in (gaintune.Matrix, MethodMatrix, MatrixRow, Cell, BaseFigures, Summary, StageSummary):
        lines += [f"### {record.__name__}\n", f"{inspect.getdoc(record)}\n", *_attributes(record)]
    return "\n".join(lines) + "\n"


def _attributes(record: type) -> list[str]:
    rows = [f"| `{each.name}` | `{each.type}` |" for each in dataclasses.fields(record)]
    return ["| key | type |", "|---|---|", *(row.replace(" | None`", " or null`") for row in rows), ""]


def analyses() -> str:
    """Return the page of analyses: what each does, its source, and its options."""
    rows = [
        f"| [`{name}`](../analyses/{name}.md) | {_says(each)} | {_source(each)} |" for name, each in ANALYSES.items()
    ]
    lines = ["# Analyses\n", GENERATED, "| analysis | what it does | source |", "|---|---|---|", *rows, ""]
    for name, analysis in ANALYSES.items():
        if analysis.Options.model_fields:
            lines += [f"## Options of `{name}`\n", *_fields_of(analysis.Options)]
    return "\n".join(lines)


def _says(analysis: Analysis) -> str:
    return analysis.help.partition("\n")[0]


def _source(analysis: Analysis) -> str:
    return inspect.getdoc(type(analysis)) or ""


def python() -> str:
    """Return the page of the public Python names: signature and docstring of each."""
    lines = ["# Python\n", GENERATED, "Everything here is imported from `gaintune`.\n"]
    for name in sorted(dir(gaintune), key=str.lower):
        value = getattr(gaintune, name)
        lines.append(f"## `{name}`\n")
        if not inspect.isclass(value) or not issubclass(value, (BaseModel, Exception)):
            lines += ["```text", f"{name}{_signature(value)}", "```\n"]
        lines += ["```text", inspect.getdoc(value) or "", "```\n"]
    return "\n".join(lines)


def _signature(value: typing.Any) -> str:
    signature = inspect.signature(value)
    whole = str(signature)
    if len(whole) < WIDTH:
        return whole
    star = next((n for n, each in signature.parameters.items() if each.kind is each.KEYWORD_ONLY), None)
    shown = [f"    {'*, ' if name == star else ''}{each},\n" for name, each in signature.parameters.items()]
    return "(\n" + "".join(shown) + ")" + whole[whole.rindex(")") + 1 :]


PAGES = {"cli.md": commands, "plan.md": plan, "files.md": files, "analyses.md": analyses, "python.md": python}


def peft_types() -> str:
    """Return the page of PEFT's types: every one trains two updates for it, as in the tests that keep it current."""
    sys.path.insert(0, str(FOLDER.parents[1] / "tests"))
    return importlib.import_module("support.peft_types").page()


if __name__ == "__main__":
    for page, make in {**PAGES, "peft.md": peft_types}.items():
        (FOLDER / page).write_text(make(), encoding="utf-8")
