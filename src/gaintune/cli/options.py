"""Commands and their options, made from plan fields.

To add an option for a field of the plan: mark the field with `Flag` in `config/plan.py`. It appears in every command
that takes the field's section, in the section's group, with the field's description and default.
import logging

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
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import typer
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from gaintune.cli.help import HelpfulCommand
from gaintune.config import (
    DataConfig,
    Flag,
    Plan,
    apply_overrides,
    as_domain,
    as_list,
    build_plan,
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

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Given:
    """The parts of a plan as a person gave them; `plan()` assembles them.

    Attributes:
        file: the plan file, if there is one.
        options: values by their keys in the plan, such as `train.lr`; `methods.*.replay` is that of every method.
        assignments: what `--set` was given.
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
        for key, value in self.options.items():
            if ".*." not in key:
                if key == "methods":
                    value = [parse_method(each) if isinstance(each, str) else each for each in value]
                values = _laid(values, key, value)
        for key, value in self.options.items():
            if ".*." in key:
                values = _laid_over_entries(values, key, value)
        values = apply_overrides(values, self.assignments)
        if {"data.domains", "data.watched"} & set(self.options):
            values = {**values, "data": _with_own_tasks(values["data"], chosen="data.task" in self.options)}
        return build_plan(values, origin=str(self.file) if self.file else "plan")


def parse_method(text: str) -> dict[str, Any]:
    """Read `lora:rank=16,targets=q_proj+v_proj` as the fields of a method."""
    name, _, options = text.partition(":")
    fields: dict[str, Any] = {}
    for option in filter(None, options.split(",")):
        key, separator, value = option.partition("=")
        if not separator:
            raise ConfigError(f"--method {text}: write name:key=value,key=value, such as lora:rank=16,lr=2e-4")
        if key in fields:
            raise ConfigError(f"--method {text}: {key} is given twice; keep one")
        fields[key] = value.split("+") if key == "targets" and "+" in value else value
    return {"name": name, **fields}


def _laid(values: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    section, _, leaf = key.partition(".")
    if not leaf:
        return {**values, section: value}
    held = values.get(section)
    return {**values, section: {**(held if isinstance(held, dict) else {}), leaf: value}}


def _laid_over_entries(values: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """Lay an option over every method, or over every domain that is a local file: all that no name stands for."""
    place, _, field_name = key.partition(".*.")
    held: Any = values
    default: Any = Plan()
    for part in place.split("."):
        held = held.get(part) if isinstance(held, dict) else None
        default = getattr(default, part)
    entries = as_list(held) or [each.name for each in default]
    if not isinstance(entries, list | tuple):
        return dict(values)  # the plan's check says what is wrong with it
    if place == "methods":
        entries = [{"name": each} if isinstance(each, str) else each for each in entries]
        return _laid(
            values, place, [{**each, field_name: value} if isinstance(each, dict) else each for each in entries]
        )
    entries = [as_domain(each) for each in entries]
    from gaintune.data import CATALOGUE, GLUE

    local = [isinstance(each, dict) and each.get("source") not in {*CATALOGUE, *GLUE} for each in entries]
    if not any(local):
        option = f"--{field_name.replace('_', '-')}"
        raise ConfigError(f"{option} names a column of local files: give one with --domain, such as notes.csv")
    entries = [{**each, field_name: value} if own else each for each, own in zip(entries, local, strict=True)]
    return _laid(values, place, entries)


def _with_own_tasks(data: Any, *, chosen: bool) -> Any:
    """Give domains of the catalogue their own task, text or instruct, where the plan's is the other one.

    Args:
        data: the plan's data, not checked yet.
        chosen: whether the task was given on the command line, so that it should not go unheeded.

    Raises:
        ConfigError: a task was chosen, and no domain has it.
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
        key: [each if task_of(each) == task else {**as_domain(each), "task": task_of(each)} for each in domains]
        for key, domains in given.items()
    }
    others = [f"{each.get('name')} ({each['task']})" for each in changed.get("domains", ()) if task_of(each) != task]
    if others and (chosen or task != DataConfig.model_fields["task"].default):
        own = ", ".join(others)
        if task not in {task_of(each) for domains in changed.values() for each in domains}:
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
        """Declare the option to Typer; a value of None is that it was not given."""
        kind = _kind(self.info.annotation)
        names = [f"--{self.name}"]
        if kind is bool and ("." in self.keys[0] or self.info.default):  # what a plan file turns on can be turned off
            names = [f"--{self.name}/--no-{self.name}"]
        text = help_text or self.flag.help or _description(self.info)
        settings: dict[str, Any] = {"help": text, "metavar": self.flag.metavar, "show_default": False}
        option = typer.Option(*names, rich_help_panel=self.group, **settings)
        typed = str if _holds_numbers(self.info.annotation) else kind
        return _keyword(self.parameter, Annotated[typed | None, option], None)

    def read(self, value: Any) -> Any:
        """Return a given value as the field's model takes it: numbers with commas between them as a list."""
        if not _holds_numbers(self.info.annotation):
            return value
        try:
            return [float(each) for each in value.split(",")]
        except ValueError:
            message = f"--{self.name} {value}: write numbers with commas between them, such as 0,0.5,1"
            raise ConfigError(message) from None


def plan_options(takes: Sequence[str], without: Sequence[str] = ()) -> list[FieldOption]:
    """List the options of marked fields under the keys of `takes`, without those under the keys of `without`."""
    found: dict[str, FieldOption] = {}
    for section in takes:
        for key, info, flag in _marked(Plan):
            if not _under(key, section) or any(_under(key, left) for left in without):
                continue
            name = flag.name or key.rpartition(".")[2].replace("_", "-")
            if name in found and not (flag.joint and found[name].flag.joint):
                raise TypeError(f"two fields make --{name}: {found[name].keys[0]} and {key}; name one in its Flag")
            if name in found:
                found[name] = replace(found[name], keys=(*found[name].keys, key))
            else:
                found[name] = FieldOption(info, flag, name, (key,), GROUPS[key.partition(".")[0]])
    return list(found.values())


def _under(key: str, section: str) -> bool:
    return key == section or key.startswith(f"{section}.")


def _marked(model: type[BaseModel], prefix: str = "", seen: tuple[Any, ...] = ()) -> Iterator[tuple[str, Any, Flag]]:
    """Yield the key, field and mark of every marked field; `*` stands for every entry of a list.

    A model that two lists of a section hold counts for the first of them, the domains that are learned.
    """
    for name, info in model.model_fields.items():
        key = f"{prefix}{name}"
        flag = _flag(info)
        if flag:
            yield key, info, flag
        inner = section_of(info.annotation)
        if inner and inner not in seen:
            seen = (*seen, inner)
            yield from _marked(inner, f"{key}." if info.annotation is inner else f"{key}.*.")


def _flag(info: FieldInfo) -> Flag | None:
    return next((each for each in info.metadata if isinstance(each, Flag)), None)


def _description(info: FieldInfo) -> str:
    """A field's own description and default, so that help and plan never disagree."""
    default = info.get_default(call_default_factory=True)
    text = info.description or ""
    text = text[:1].upper() + text[1:]
    if default is None or default is False:
        return text
    if isinstance(default, tuple | list):
        default = ",".join(map(str, default))
    return f"{text}{'' if text.endswith('.') else '.'} [default: {default}]" if default != "" else text


def _parts(annotation: Any) -> list[Any]:
    """The kinds that a field may be, other than None."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _parts(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [part for each in get_args(annotation) for part in _parts(each)]
    return [] if annotation is types.NoneType else [annotation]


def _kind(annotation: Any) -> Any:
    """What Typer parses: a number, a switch, a path, a list of text, else text that the field's model checks."""
    (first, *others) = _parts(annotation)
    if others:
        return str
    if get_origin(first) in (tuple, list, Sequence):
        return list[str]
    return first if first in (int, float, bool, Path) else str


def _holds_numbers(annotation: Any) -> bool:
    (first, *others) = _parts(annotation)
    numbers = {each for each in get_args(first) if each is not Ellipsis}
    return not others and get_origin(first) in (tuple, list, Sequence) and numbers <= {int, float}


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def model_options(model: type[BaseModel], group: str | None = None) -> list[FieldOption]:
    """List the options of a command's own pydantic model, one for each field; a `Flag` only words them otherwise."""
    found = []
    for name, info in model.model_fields.items():
        flag = _flag(info) or Flag()
        found.append(FieldOption(info, flag, flag.name or name.replace("_", "-"), (name,), group))
    return found


def _read_model(model: type[BaseModel], options: Iterable[FieldOption], values: Mapping[str, Any]) -> BaseModel:
    named = {option.keys[0]: option for option in options}
    given = {key: option.read(values[option.parameter]) for key, option in named.items() if option.parameter in values}
    try:
        return model.model_validate(given)
    except ValidationError as error:
        lines = []
        for detail in error.errors():
            option = named.get(str(detail["loc"][0])) if detail["loc"] else None
            message = detail["msg"].removeprefix("Value error, ")
            if option:
                message = f"--{option.name} {values.get(option.parameter, '')}".rstrip() + f": {message}"
            lines.append(message)
        raise ConfigError("\n".join(lines)) from None


def refuse(reason: str, options: Iterable[str]) -> None:
    """Refuse options that would have no effect; the message names the first one, before the reason."""
    for name in options:
        raise ConfigError(f"--{name.replace('_', '-')} {reason}")


def run_option(help_text: str, group: str | None = "Output") -> Any:
    """Declare `--run`, with the name that `torchrun` hands on: it takes `--run` for an abbreviation of its own."""
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
        app: the application, or the group of commands, that the command belongs to.
        name: the command's name.
        group: the heading under which the application's help lists it.
        takes: sections and keys of the plan whose marked fields become options.
        without: keys that have no effect in this command.
        plan_argument: whether the plan file may be given by position, too.
        options: the model of the parameter `options`, where it is known only when the command is made.
        options_group: the heading of its options; those of another model stand under its parameter's name.
        helps: other help texts, by the option's name without dashes.
        examples: command lines for the help, one to a line.
    """
    helps = helps or {}

    def register(function: Callable[..., None]) -> Callable[..., None]:
        asked = inspect.signature(function, eval_str=True).parameters
        special = [each for each in ("plan", "given") if each in asked]
        models = {each.name: each.annotation for each in asked.values() if _is_model(each)}
        models |= {"options": options} if options else {}
        headings = {name: options_group if name == "options" else name.capitalize() for name in models}
        own = {name: model_options(model, headings[name]) for name, model in models.items()}
        fields = [each for each in plan_options(takes, without) if each.parameter not in asked]

        def run(**values: Any) -> None:
            values = {key: value for key, value in values.items() if value is not None and value != []}
            passed = {key: values.get(key, asked[key].default) for key in asked if key not in (*special, *models)}
            passed |= {name: _read_model(model, own[name], values) for name, model in models.items()}
            if special:
                given = _given(values, fields)
                passed[special[0]] = given if special[0] == "given" else given.plan()
            function(**passed)

        plain = [each for each in asked.values() if each.name not in (*special, *models)]
        parameters = [_keyword(each.name, each.annotation, each.default) for each in plain]
        parameters += [each.declared(helps.get(each.name)) for group in (*own.values(), fields) for each in group]
        if special:
            parameters += _plan_parameters(plan_argument, helps.get("plan", PLAN_HELP))
        parameters.sort(key=_position)
        run.__name__, run.__doc__ = function.__name__, function.__doc__
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {each.name: each.annotation for each in parameters}
        app.command(name, cls=HelpfulCommand, rich_help_panel=group, epilog=examples or None)(run)
        return function

    return register


def _position(parameter: inspect.Parameter) -> int:
    """Return where an option's group stands in the help: the plan's, then a command's own, then its output."""
    marks = getattr(parameter.annotation, "__metadata__", (None,))
    group = getattr(marks[-1], "rich_help_panel", None)
    return ORDER.index(group) if group in ORDER else len(ORDER) + (group == "Output")


def _is_model(parameter: inspect.Parameter) -> bool:
    kind = parameter.annotation
    return isinstance(kind, type) and issubclass(kind, BaseModel) and kind is not Plan


def _plan_parameters(by_position: bool, help_text: str) -> list[inspect.Parameter]:
    place = typer.Argument(metavar="PLAN.yaml", help=PLAN_HELP)
    file = typer.Option("--plan", metavar="PLAN.yaml", help=help_text, rich_help_panel="Plan")
    keys = typer.Option("--set", metavar="SECTION.KEY=VALUE", help=SET_HELP, rich_help_panel="Plan")
    return [
        *([_keyword("plan_place", Annotated[Path | None, place], None)] if by_position else []),
        _keyword("plan", Annotated[Path | None, file], None),
        _keyword("set_", Annotated[list[str] | None, keys], None),
    ]


def _given(values: Mapping[str, Any], fields: Iterable[FieldOption]) -> Given:
    options = {
        key: each.read(values[each.parameter]) for each in fields if each.parameter in values for key in each.keys
    }
    given = Given(values.get("plan"), options, values.get("set_", ()))
    return given.on_file(values["plan_place"]) if "plan_place" in values else given
