"""The plan: every setting of a run as plain data, checked when it is read, with unknown keys refused."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator

from gaintune.errors import ConfigError
from gaintune.config.explain import explain
from gaintune.config.sections import NAME, ClassifyConfig, EvaluateConfig, MethodConfig, ModelConfig, Section, TrainConfig

DEMO_DOMAINS = ("medical", "law", "scripture", "manual", "code")
CLASSIFIER_BASE = "FacebookAI/roberta-base"
Task = Literal["text", "instruct", "classify"]
Template = Literal["auto", "plain", "alpaca", "magicoder", "chat"]


class DomainConfig(Section):
    """One domain: a catalogue name, or a local file or folder under a name of your choosing."""

    name: str = Field(description="label in tables and folders: letters, digits, dot, dash and underscore")
    source: str = Field(description="catalogue name, or path of a .jsonl/.json/.csv/.parquet/.txt/.md file or folder")
    text_column: str | None = Field(
        default=None, description="column that holds the text; found by itself when there is one"
    )
    task: Task | None = Field(
        default=None, description="what is learnt from this domain's rows; the plan's unless given"
    )
    template: Template | None = Field(
        default=None, description="how this domain's prompts and completions are written; the plan's unless given"
    )
    prompt_column: str | None = Field(default=None, description="instruct: column of the prompt; 'prompt' unless given")
    completion_column: str | None = Field(
        default=None, description="instruct: column of the completion; 'completion' unless given"
    )

    @field_validator("name")
    @classmethod
    def _plain_name(cls, value: str) -> str:
        if not NAME.fullmatch(value):
            raise ValueError(f"{value!r} is not a usable name: use letters, digits, dot, dash and underscore")
        return value


def as_list(value: Any) -> Any:
    """Accept one entry where a list of them is asked for, such as 'lora' for ['lora']."""
    return [value] if isinstance(value, str | Mapping) else value


def as_domain(value: Any) -> Any:
    """Accept 'law', 'contracts=./contracts.jsonl' or a mapping."""
    if not isinstance(value, str):
        return value
    name, separator, source = value.partition("=")
    if separator:
        return {"name": name, "source": source}
    looks_like_path = "/" in value or Path(value).suffix in {".jsonl", ".json", ".csv", ".parquet", ".txt", ".md"}
    return {"name": Path(value).stem if looks_like_path else value, "source": value}


class DataConfig(Section):
    """How much of each domain, and how it is cut."""

    domains: Annotated[tuple[Annotated[DomainConfig, BeforeValidator(as_domain)], ...], BeforeValidator(as_list)] = (
        Field(
            default=tuple(DomainConfig(name=name, source=name) for name in DEMO_DOMAINS),
            description="domains in the order they are learnt",
            min_length=1,
        )
    )
    watched: Annotated[tuple[Annotated[DomainConfig, BeforeValidator(as_domain)], ...], BeforeValidator(as_list)] = (
        Field(default=(), description="sequence: domains that are measured beside the others and never learnt")
    )
    task: Task = Field(
        default="text",
        description="what is learnt from the rows: text (every token), instruct (the completion of a prompt), "
        "or classify (a label)",
    )
    template: Template = Field(
        default="auto",
        description="instruct: how prompts and completions are written: plain (as they are), alpaca, magicoder, or "
        "chat (the model's own chat template); auto is chat for messages and plain for prompt and completion",
    )
    packing: bool = Field(
        default=True,
        description="instruct: several rows in a block, none attending to another; false pads every row to a block",
    )
    end_of_text: bool = Field(
        default=True,
        description="instruct: learn the end-of-text token after every completion; false leaves it out, to learn "
        "answers alone. A chat template's own end of turn stays",
    )
    train_tokens: int = Field(default=8192, gt=0, description="training budget of a domain, in tokens")
    validation_tokens: int = Field(default=4096, gt=0, description="validation budget of a domain, in tokens")
    block_size: int = Field(default=256, ge=8, description="length of a packed block, in tokens")
    seed: int = Field(default=0, ge=0, description="seed of the split by document and of the order of documents")

    @model_validator(mode="after")
    def _consistent(self) -> DataConfig:
        names = [domain.name for domain in self.measured]
        if len(set(names)) != len(names):
            raise ValueError(f"domains: every name must be different, got {', '.join(names)}")
        for field in ("train_tokens", "validation_tokens"):
            if getattr(self, field) < self.block_size:
                raise ValueError(f"{field} is {getattr(self, field)}, less than one block ({self.block_size} tokens)")
        tasks = {domain.name: self.task_of(domain) for domain in self.measured}
        if "classify" in tasks.values() and len(set(tasks.values())) > 1:
            others = ", ".join(f"{name} ({task})" for name, task in tasks.items() if task != "classify")
            raise ValueError(f"domains: a classifier's domains cannot be mixed with others: {others}")
        for domain in self.measured:
            own = ("template", "prompt_column", "completion_column")
            given = [field for field in own if getattr(domain, field) is not None]
            if given and self.task_of(domain) != "instruct":
                raise ValueError(f"domains: {domain.name}: {given[0]} is for task instruct")
        for field in () if "instruct" in tasks.values() else ("template", "packing", "end_of_text"):
            if getattr(self, field) != type(self).model_fields[field].default:
                raise ValueError(
                    f"{field} is for task instruct, and no domain has it: set data.task=instruct (--task instruct)"
                )
        return self

    @property
    def measured(self) -> tuple[DomainConfig, ...]:
        """The domains that are learnt, in their order, and those that are only watched."""
        return (*self.domains, *self.watched)

    def task_of(self, domain: DomainConfig) -> Task:
        """What is learnt from a domain's rows: its own task, else the plan's."""
        return domain.task or self.task

    def template_of(self, domain: DomainConfig) -> Template:
        """How a domain's prompts and completions are written: its own template, else the plan's."""
        return domain.template or self.template


class Plan(Section):
    """Everything that decides what a run computes."""

    model: ModelConfig = Field(default_factory=lambda: ModelConfig())
    data: DataConfig = Field(default_factory=lambda: DataConfig())
    methods: Annotated[tuple[MethodConfig, ...], BeforeValidator(as_list)] = Field(
        default=(MethodConfig(name="gain-ffn", label="gain-ffn"),),
        min_length=1,
        description="each starts from the same base",
    )
    train: TrainConfig = Field(default_factory=lambda: TrainConfig())
    evaluate: EvaluateConfig = Field(default_factory=lambda: EvaluateConfig())
    classify: ClassifyConfig = Field(default_factory=lambda: ClassifyConfig())

    @property
    def classifies(self) -> bool:
        """Whether labels are learnt from the domains' rows."""
        return self.data.task_of(self.data.domains[0]) == "classify"

    @model_validator(mode="before")
    @classmethod
    def _base_of_a_classifier(cls, values: Any) -> Any:
        """The base is an encoder where labels are learnt and the plan names none."""
        if not isinstance(values, Mapping) or not _says_classify(values.get("data")):
            return values
        model = values.get("model") or {}
        if not isinstance(model, Mapping) or "name" in model:
            return values
        return {**values, "model": {**model, "name": CLASSIFIER_BASE}}

    @model_validator(mode="after")
    def _different_labels(self) -> Plan:
        labels = [method.label for method in self.methods]
        if len(set(labels)) != len(labels):
            raise ValueError(f"methods: every label must be different, got {', '.join(labels)}")
        return self

    @model_validator(mode="after")
    def _rows_not_tokens(self) -> Plan:
        for field in ("train_tokens", "validation_tokens", "block_size") if self.classifies else ():
            if getattr(self.data, field) != DataConfig.model_fields[field].default:
                raise ValueError(
                    f"data.{field} is for text and instructions; of labelled rows classify.train_rows, "
                    "classify.validation_rows and classify.max_length say how many and how long"
                )
        return self


def _says_classify(data: Any) -> bool:
    """Whether a plan's data, checked or not, says that labels are learnt."""
    if isinstance(data, DataConfig):
        return data.task_of(data.domains[0]) == "classify"
    if not isinstance(data, Mapping):
        return False
    domains = as_list(data.get("domains"))
    each = domains if isinstance(domains, list | tuple) else ()
    return data.get("task") == "classify" or any(isinstance(d, Mapping) and d.get("task") == "classify" for d in each)


def build_plan(values: dict[str, Any], origin: str = "plan") -> Plan:
    """Check nested values into a plan.

    Raises:
        ConfigError: an unknown key or a value of the wrong kind, named with its place in `origin`.
    """
    try:
        return Plan.model_validate(values)
    except ValidationError as error:
        raise explain(error, origin, Plan) from None


def read_values(path: Path) -> dict[str, Any]:
    """Read a YAML plan as nested values, without checking its keys yet."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such plan file") from None
    except OSError as error:
        raise ConfigError(f"{path}: this plan cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: not valid YAML ({getattr(error, 'problem', error)})") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a plan is a mapping of sections, such as 'train:' and 'data:'")
    return values


def read_plan(plan: Plan | Mapping[str, Any] | str | Path) -> Plan:
    """A plan from a plan, nested values, or a YAML file; raises as `build_plan` does."""
    if isinstance(plan, Plan):
        return plan
    if isinstance(plan, Mapping):
        return build_plan(dict(plan))
    return build_plan(read_values(Path(plan)), origin=str(plan))


def apply_overrides(values: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Return `values` with dotted assignments such as 'train.lr=0.005' laid over them; values are read as YAML."""
    result = dict(values)
    for assignment in assignments:
        key, separator, text = assignment.partition("=")
        if not separator or not key:
            raise ConfigError(f"--set {assignment}: write section.key=value, such as train.lr=0.005")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(f"--set {assignment}: {text!r} is not a YAML value") from None
        if isinstance(value, str):  # YAML 1.1 reads 1e-3 as a string; a person means the number
            with contextlib.suppress(ValueError):
                value = float(value)
        *parents, leaf = key.split(".")
        node = result
        for parent in parents:
            child = node.get(parent)
            node[parent] = dict(child) if isinstance(child, dict) else {}
            node = node[parent]
        node[leaf] = value
    return result


def plan_yaml(plan: Plan) -> str:
    """The whole plan as YAML that `build_plan` reads back to an equal plan."""
    return yaml.safe_dump(plan.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def plan_yaml_documented(plan: Plan) -> str:
    """The whole plan as YAML with every key's description beside it; reads back to an equal plan."""
    lines = []
    for name, info in Plan.model_fields.items():
        value = getattr(plan, name)
        if isinstance(value, Section):
            lines.append(f"{name}:")
            for key, field in type(value).model_fields.items():
                dumped = yaml.safe_dump({key: value.model_dump(mode="json")[key]}, sort_keys=False).rstrip("\n")
                lines.extend(f"  {line}" for line in (f"# {field.description}", *dumped.split("\n")))
        else:
            dumped = yaml.safe_dump({name: plan.model_dump(mode="json")[name]}, sort_keys=False).rstrip("\n")
            lines.extend((f"# {info.description}; see `gaintune methods`", dumped))
    return "\n".join(lines) + "\n"
