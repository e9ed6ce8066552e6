"""Commands and their options, made from plan fields.

To add an option for a field of the plan: mark the field with `Flag` in `config/plan.py`. It appears in every command
that takes the field's section, in the section's group, with the field's description and default.

To add a command: write a function and register it.

    @command(app, "adapt", group="Training", takes=("model", "data"), examples="gaintune adapt --domain law --out law")
    def adapt(plan: Plan, out: Annotated[Path, typer.Option(help="Folder for the adapter.")]) -> None:
        "Adapt to one domain with one method and save the adapter."

`takes` names sections of the plan, or single keys; `without` leaves out keys that have no effect there. The function's
own parameters are the command's other arguments and options; Typer's `rich_help_panel` is their group. Two names are
special, and bring `--plan` and `--set`: `plan` is the assembled plan, and `given` is what it would be assembled from,
for commands that add to it first. A parameter that is a pydantic model makes an option of each of its fields, and
`options` does so of the model that was passed as `options=`.
"""

from __future__ import annotations

import inspect
import logging
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import typer
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from gaintune.cli.help import HelpfulCommand
from gaintune.config import (
    ANY_METHOD,
    Flag,
    MethodConfig,
    Plan,
    apply_overrides,
    as_domain,
    as_list,
    build_plan,
    read_value,
    read_values,
    section_of,
)
from gaintune.errors import ConfigError

GROUPS = {
    "model": "Model",
    "data": "Data",
    "methods": "Method",
    "train": "Training",
    "evaluate": "Evaluation",
    "classify": "Classification",
}
ORDER = ("Plan", *GROUPS.values())
PLAN_HELP = "YAML plan; options are laid over it."
SET_HELP = "Any other key of the plan, such as train.clip=0.5."
PLAN_OF_TEXTS = "Plan whose base, domains and data settings are used."
OTHER_BASE_HELP = "Take adapters that were trained on another base."

AllowOtherBase = Annotated[bool, typer.Option("--allow-other-base", help=OTHER_BASE_HELP, rich_help_panel="Model")]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Given:
    """The parts of a plan as a person gave them; `plan()` assembles them.

    Attributes:
        file: the plan file, if there is one.
        options: values by their keys in the plan, such as `train.lr`; `methods.*.replay` is that of every method.
        assignments: the values of `--set`.
    """

    file: Path | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    assignments: Sequence[str] = ()

    def over(self, defaults: Mapping[str, Any]) -> Given:
        """Add options, by their keys in the plan, that count where a person gave none."""
        return replace(self, options={**defaults, **self.options})

    def on_file(self, file: Path) -> Given:
        """Add a plan file that was given by position."""
        if self.file is not None:
            raise ConfigError(f"two plans, {file} and {self.file}: give one, by position or with --plan")
        return replace(self, file=file)

    def on_base_of(self, adapters: Sequence[Path]) -> Given:
        """Add the base that the first adapter names, and its revision, unless a plan file or an option names one."""
        if self.file is not None or "model.name" in self.options:
            return self
        from gaintune.adapters import claimed_base, read_record

        base = claimed_base(adapters[0], read_record(adapters[0]))
        return self.over({"model.name": base.name, **({"model.revision": base.revision} if base.revision else {})})

    def on_domains_of(self, adapters: Sequence[Path]) -> Given:
        """Add the domain that each adapter was trained on last, unless a plan file or an option names domains."""
        if self.file is not None or "data.domains" in self.options:
            return self
        from gaintune.adapters import read_record

        records = [read_record(folder) for folder in adapters]
        trained = dict.fromkeys(record.domains[-1] for record in records if record and record.domains)
        return self.over({"data.domains": list(trained)}) if trained else self

    def plan(self) -> Plan:
        """Assemble the plan: the file, then the options, then `--set`.

        Raises:
            ConfigError: a mistake, named with its file and key, or with its option.
        """
        values: dict[str, Any] = read_values(self.file) if self.file else {}
        for key, value in sorted(self.options.items(), key=lambda item: ".*." in item[0]):
            if key == "methods":
                value = [parse_method(method) if isinstance(method, str) else method for method in value]
            values = _laid_over_entries(values, key, value) if ".*." in key else _laid(values, key, value)
        values = apply_overrides(values, self.assignments)
        if {"data.domains", "data.watched"} & set(self.options):
            values = {**values, "data": _with_own_tasks(values["data"], chosen="data.task" in self.options)}
        return build_plan(values, origin=str(self.file) if self.file else "plan")


def parse_method(text: str) -> dict[str, Any]:
    """Read `lora:rank=16,targets=q_proj+v_proj`, or `peft:RANDLORA:r=8`, as the fields of a method.

    A key that is no option of a plan's method is a field of PEFT's configuration. Its value is read as YAML.
    """
    name, _, options = text.partition(":")
    fields: dict[str, Any] = {}
    config: dict[str, Any] = {}
    if name == ANY_METHOD:
        peft_type, _, options = options.partition(":")
        config = {"peft_type": peft_type.upper()}
    for option in filter(None, options.split(",")):
        key, separator, value = option.partition("=")
        if not separator:
            raise ConfigError(f"--method {text}: write name:key=value,key=value, such as lora:rank=16,lr=2e-4")
        if key in fields or key in config:
            raise ConfigError(f"--method {text}: {key} is given twice; keep one")
        if key in MethodConfig.model_fields:
            fields[key] = value.split("+") if key == "targets" and "+" in value else value
        else:
            config[key] = read_value(value, f"--method {text}")
    return {"name": name, **fields, **({"config": config} if config else {})}


def _laid(values: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    section, _, leaf = key.partition(".")
    if leaf:
        held = values.get(section)
        value = {**(held if isinstance(held, dict) else {}), leaf: value}
    return {**values, section: value}


def _laid_over_entries(values: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """Lay an option over every method, or over every domain that is a local file rather than a known name."""
    place, _, name = key.partition(".*.")
    held: Any = values
    default: Any = Plan()
    for part in place.split("."):
        held = held.get(part) if isinstance(held, dict) else None
        default = getattr(default, part)
    entries = as_list(held) or [entry.name for entry in default]
    if not isinstance(entries, list | tuple):
        return values  # the plan's check says what is wrong with it
    if place == "methods":
        entries = [{"name": entry} if isinstance(entry, str) else entry for entry in entries]
        chosen = [isinstance(entry, dict) for entry in entries]
    else:
        from gaintune.data import CATALOGUE, GLUE

        entries = [as_domain(entry) for entry in entries]
        chosen = [isinstance(entry, dict) and entry.get("source") not in {*CATALOGUE, *GLUE} for entry in entries]
        if not any(chosen):
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{option} names a column of local files: give one with --domain, such as notes.csv")
    laid = [{**entry, name: value} if own else entry for entry, own in zip(entries, chosen, strict=True)]
    return _laid(values, place, laid)


def _with_own_tasks(data: Any, *, chosen: bool) -> Any:
    """Give domains of the catalogue their own task, text or instruct, where the plan has the other one.

    A task that the command line gave (`chosen`) is not ignored silently: it is refused if no domain has it.
    """
    from gaintune.data import CATALOGUE

    task = data.get("task", "text") if isinstance(data, dict) else None
    if task not in ("text", "instruct"):  # a classifier's domains are not mixed, and the plan refuses what is wrong
        return data

    def task_of(value: Any) -> str:
        domain = as_domain(value)
        if not isinstance(domain, dict):  # the plan refuses it
            return task
        entry = CATALOGUE.get(str(domain.get("source")))
        return domain.get("task") or (entry.task if entry else task)

    given = {key: as_list(data[key]) for key in ("domains", "watched") if data.get(key)}
    changed = {
        key: [value if task_of(value) == task else {**as_domain(value), "task": task_of(value)} for value in values]
        for key, values in given.items()
    }
    others = [value for value in changed.get("domains", ()) if task_of(value) != task]
    if others and (chosen or task != Plan().data.task):
        own = ", ".join(f"{domain.get('name')} ({domain['task']})" for domain in others)
        if task not in {task_of(value) for values in changed.values() for value in values}:
            raise ConfigError(
                f"task {task} has no effect, every domain has its own: {own}. Leave --task or data.task out, or give "
                "files of your own (name=PATH)"
            )
        logger.warning("task %s is not for every domain, these keep their own: %s", task, own)
    return {**data, **changed}


@dataclass(frozen=True)
class FieldOption:
    """One option made from a field of the plan, or of a command's own model of options."""

    info: FieldInfo
    flag: Flag
    name: str
    keys: tuple[str, ...]
    group: str | None = None

    @property
    def parameter(self) -> str:
        """The name by which the option's value is passed."""
        return self.name.replace("-", "_")

    def declared(self, help_text: str | None = None) -> inspect.Parameter:
        """Make the parameter that Typer reads; None means that the option was not given."""
        kind, _ = _kind(self.info.annotation)
        names = f"--{self.name}"
        if kind is bool and ("." in self.keys[0] or self.info.default):  # what a plan file turns on can be turned off
            names += f"/--no-{self.name}"
        text = help_text or self.flag.help or _description(self.info)
        settings: dict[str, Any] = {"help": text, "metavar": self.flag.metavar, "rich_help_panel": self.group}
        return _keyword(self.parameter, Annotated[kind | None, typer.Option(names, show_default=False, **settings)])

    def read(self, value: Any) -> Any:
        """Return a given value as the field's model takes it: numbers with commas between them as a list."""
        if not _kind(self.info.annotation)[1]:
            return value
        try:
            return [float(number) for number in value.split(",")]
        except ValueError:
            message = f"--{self.name} {value}: write numbers with commas between them, such as 0,0.5,1"
            raise ConfigError(message) from None


def plan_options(takes: Sequence[str], without: Sequence[str] = ()) -> list[FieldOption]:
    """List the options of marked fields under the keys of `takes`, without those under the keys of `without`."""
    options: dict[str, FieldOption] = {}
    for key, info, flag in _marked(Plan):
        taken, left = (any(f"{key}.".startswith(f"{part}.") for part in parts) for parts in (takes, without))
        if not taken or left:
            continue
        name = flag.name or key.rpartition(".")[2].replace("_", "-")
        first = options.get(name)
        if first is None:
            options[name] = FieldOption(info, flag, name, (key,), GROUPS[key.partition(".")[0]])
        elif flag.joint and first.flag.joint:
            options[name] = replace(first, keys=(*first.keys, key))
        else:
            raise TypeError(f"two fields make --{name}: {first.keys[0]} and {key}; name one in its Flag")
    return list(options.values())


def _marked(model: type[BaseModel], prefix: str = "", seen: tuple[Any, ...] = ()) -> Iterator[tuple[str, Any, Flag]]:
    """Yield the key, field and mark of every marked field; `*` stands for every entry of a list.

    A model that two lists of a section hold counts for the first of them, the domains that are trained on.
    """
    for name, info in model.model_fields.items():
        key = f"{prefix}{name}"
        if flag := _flag(info):
            yield key, info, flag
        inner = section_of(info.annotation)
        if inner and inner not in seen:
            seen = (*seen, inner)
            yield from _marked(inner, f"{key}." if info.annotation is inner else f"{key}.*.")


def _flag(info: FieldInfo) -> Flag | None:
    return next((mark for mark in info.metadata if isinstance(mark, Flag)), None)


def _description(info: FieldInfo) -> str:
    """Return a field's own description and default, so that help and plan never disagree."""
    default = info.get_default(call_default_factory=True)
    text = info.description or ""
    text = text[:1].upper() + text[1:]
    if isinstance(default, tuple | list):
        default = ",".join(map(str, default))
    if default is None or default is False or default == "":
        return text
    return f"{text}{'' if text.endswith('.') else '.'} [default: {default}]"


def _parts(annotation: Any) -> list[Any]:
    """Return the kinds that a field may be, other than None."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _parts(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [part for kind in get_args(annotation) for part in _parts(kind)]
    return [] if annotation is types.NoneType else [annotation]


def _kind(annotation: Any) -> tuple[Any, bool]:
    """Return what Typer parses, and whether that is text of numbers with commas between them."""
    (first, *others) = _parts(annotation)
    if others:
        return str, False
    if get_origin(first) in (tuple, list, Sequence):
        numbers = set(get_args(first)) <= {int, float, Ellipsis}
        return str if numbers else list[str], numbers
    return first if first in (int, float, bool, Path) else str, False


def _keyword(name: str, annotation: Any, default: Any = None) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def model_options(model: type[BaseModel], group: str | None = None) -> list[FieldOption]:
    """List the options of a command's own pydantic model, one for each field; a `Flag` only changes its words."""
    marked = [(name, info, _flag(info) or Flag()) for name, info in model.model_fields.items()]
    return [FieldOption(i, flag, flag.name or name.replace("_", "-"), (name,), group) for name, i, flag in marked]


def _read_model(model: type[BaseModel], options: Iterable[FieldOption], values: Mapping[str, Any]) -> BaseModel:
    given = {option.keys[0]: option for option in options if option.parameter in values}
    try:
        return model.model_validate({key: option.read(values[option.parameter]) for key, option in given.items()})
    except ValidationError as error:
        lines = []
        for detail in error.errors():
            option = given.get(str(detail["loc"][0])) if detail["loc"] else None
            message = detail["msg"].removeprefix("Value error, ")
            lines.append(f"--{option.name} {values[option.parameter]}: {message}" if option else message)
        raise ConfigError("\n".join(lines)) from None


def refuse(reason: str, options: Iterable[str]) -> None:
    """Refuse options that would have no effect; the message names the first one, before the reason."""
    for name in options:
        raise ConfigError(f"--{name.replace('_', '-')} {reason}")


def run_option(help_text: str, group: str | None = "Output") -> Any:
    """Make the option `--run`, with a second name: `torchrun` takes `--run` for an abbreviation of its own."""
    return typer.Option("--run", "--run-dir", help=help_text, rich_help_panel=group)


def command(
    app: typer.Typer,
    name: str,
    *,
    group: str | None = None,
    takes: Sequence[str] = (),
    without: Sequence[str] = (),
    plan_argument: bool = False,
    options: type[BaseModel] | None = None,
    options_group: str | None = None,
    helps: Mapping[str, str] | None = None,
    examples: str = "",
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function as a command; the head of this file says how.

    Args:
        group: the heading under which the application's help lists it.
        plan_argument: whether the plan file may be given by position, too.
        options: the model of the parameter `options`, where it is known only when the command is made.
        options_group: the heading of its options; those of another model stand under its parameter's name.
        helps: other help texts, by the option's name without dashes.
        examples: command lines for the help, one to a line.
    """
    helps = helps or {}

    def register(function: Callable[..., None]) -> Callable[..., None]:
        declared = inspect.signature(function, eval_str=True).parameters
        special = next((name for name in ("plan", "given") if name in declared), None)
        kinds = {name: parameter.annotation for name, parameter in declared.items()}
        models = {name: kind for name, kind in kinds.items() if _is_model(kind)}
        models |= {"options": options} if options else {}
        headings = {name: options_group if name == "options" else name.capitalize() for name in models}
        own = {name: model_options(model, headings[name]) for name, model in models.items()}
        fields = [option for option in plan_options(takes, without) if option.parameter not in declared]
        plain = [parameter for parameter in declared.values() if parameter.name not in (special, *models)]

        def run(**values: Any) -> None:
            values = {key: value for key, value in values.items() if value is not None and value != []}
            passed = {parameter.name: values.get(parameter.name, parameter.default) for parameter in plain}
            passed |= {name: _read_model(model, own[name], values) for name, model in models.items()}
            if special:
                chosen = [option for option in fields if option.parameter in values]
                laid = {key: option.read(values[option.parameter]) for option in chosen for key in option.keys}
                given = Given(values.get("plan"), laid, values.get("set_", ()))
                given = given.on_file(values["plan_place"]) if "plan_place" in values else given
                passed[special] = given if special == "given" else given.plan()
            function(**passed)

        parameters = [_keyword(parameter.name, parameter.annotation, parameter.default) for parameter in plain]
        parameters += [option.declared(helps.get(option.name)) for option in chain(*own.values(), fields)]
        if special and plan_argument:
            place = typer.Argument(metavar="PLAN.yaml", help=PLAN_HELP)
            parameters.append(_keyword("plan_place", Annotated[Path | None, place]))
        if special:
            text = helps.get("plan", PLAN_HELP)
            file = typer.Option("--plan", metavar="PLAN.yaml", help=text, rich_help_panel="Plan")
            keys = typer.Option("--set", metavar="SECTION.KEY=VALUE", help=SET_HELP, rich_help_panel="Plan")
            parameters.append(_keyword("plan", Annotated[Path | None, file]))
            parameters.append(_keyword("set_", Annotated[list[str] | None, keys]))
        parameters.sort(key=_position)
        run.__name__, run.__doc__ = function.__name__, function.__doc__
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        app.command(name, cls=HelpfulCommand, rich_help_panel=group, epilog=examples or None)(run)
        return function

    return register


def _position(parameter: inspect.Parameter) -> int:
    """Return the position of an option's group in the help: the plan's, then a command's own, then its output."""
    marks = getattr(parameter.annotation, "__metadata__", (None,))
    group = getattr(marks[-1], "rich_help_panel", None)
    return ORDER.index(group) if group in ORDER else len(ORDER) + (group == "Output")


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel) and kind is not Plan
