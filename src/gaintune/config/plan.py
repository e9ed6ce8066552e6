"""The plan: every setting of a run as plain data, checked when it is read; errors name the key of each mistake."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    model_serializer,
    model_validator,
)

from gaintune.errors import ConfigError
from gaintune.storage import as_yaml, rows_per_update

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
ANY_METHOD = "peft"  # the method that trains any PEFT type, which its `config` names
OTHER_WORDS = {  # names that other libraries give to our keys
    "learning_rate": "lr", "num_epochs": "epochs", "num_train_epochs": "epochs", "report_to": "trackers",
    "per_device_train_batch_size": "batch_size", "per_device_eval_batch_size": "batch_size", "r": "rank",
    "gradient_accumulation_steps": "gradient_accumulation", "lr_scheduler_type": "schedule", "max_grad_norm": "clip",
    "max_seq_length": "block_size", "model_name_or_path": "name", "torch_dtype": "dtype", "lora_alpha": "alpha",
    "target_modules": "targets",
}  # fmt: skip


@dataclass(frozen=True)
class Flag:
    """Mark of a field that is an option of every command that takes the field's section.

    `lr: Annotated[float | None, Flag()] = Field(...)` makes `--lr`, with the field's description and default as help.

    The option has the field's `name` unless another is given. `help` is the whole help text, where the description and
    default do not serve; `metavar` stands for the value in it. A `joint` option sets all fields of a command that have
    its name and are marked so.
    """

    name: str = ""
    help: str = ""
    metavar: str | None = None
    joint: bool = False


def _plain(value: str, info: ValidationInfo) -> str:
    """Refuse a name or label that could not be the name of a folder."""
    if not NAME.fullmatch(value):
        raise ValueError(f"{value!r} is not a usable {info.field_name}: use letters, digits, dot, dash and underscore")
    return value


Name = Annotated[str, AfterValidator(_plain)]


LATER = "later"  # marks a key that is not stored at its default, so that plans of earlier versions stay the same


class Section(BaseModel):
    """A frozen part of the plan; keys that are not fields and numbers that are not finite are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_serializer(mode="wrap")
    def _without_later_keys(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave keys that are marked `LATER` out where they have their defaults."""
        defaults = {
            key: field.get_default(call_default_factory=True)
            for key, field in type(self).model_fields.items()
            if LATER in field.metadata
        }
        left_out = [key for key, default in defaults.items() if getattr(self, key) == default]
        return {key: value for key, value in handler(self).items() if key not in left_out}


class ModelConfig(Section):
    """The base model and its precision."""

    name: Annotated[str, Flag("model")] = Field(
        default="demo",
        description="hub id, local folder, .gguf file, 'demo' (SmolLM2-135M-Instruct), or 'demo-gemma' (Gemma-3-270M)",
    )
    revision: str | None = Field(default=None, description="hub revision: a branch, tag or commit")
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        default="auto", description="precision; auto is bf16 on CUDA and on CPUs with AVX-512-BF16 or AMX, else fp32"
    )
    quantization: Literal["4bit", "8bit"] | None = Field(default=None, description="load the base through bitsandbytes")
    device: str = Field(default="auto", description="auto, cpu, cuda or cuda:N")
    trust_remote_code: bool = Field(default=False, description="run Python code that comes with the model")
    device_map: Annotated[Literal["auto"] | None, LATER] = Field(
        default=None, description="auto spreads a frozen base, layer by layer, over all visible CUDA devices"
    )

    @model_validator(mode="after")
    def _one_placement(self) -> ModelConfig:
        if self.device_map and self.device != "auto":
            raise ValueError(f"device_map={self.device_map} chooses the devices: leave device={self.device} out")
        return self


class TrainConfig(Section):
    """One adaptation: optimizer, schedule and bookkeeping."""

    lr: Annotated[float | None, Flag()] = Field(default=None, gt=0, description="peak learning rate; a method's wins")
    epochs: Annotated[int, Flag()] = Field(default=1, gt=0, description="passes over the training blocks")
    batch_size: Annotated[int, Flag()] = Field(default=4, gt=0, description="blocks in a forward pass, on each device")
    gradient_accumulation: int = Field(default=1, gt=0, description="forward passes added up before an update")
    effective_batch: Annotated[int | None, LATER] = Field(
        default=None, gt=0, description="blocks of an update over all processes; sets gradient_accumulation"
    )
    schedule: Literal["constant", "cosine"] = Field(default="constant", description="learning rate after the warm-up")
    warmup_ratio: float = Field(default=0.03, ge=0, lt=1, description="share of steps in which the rate rises from 0")
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's decay; never applied to gains")
    betas: tuple[float, float] = Field(default=(0.9, 0.999), description="AdamW's two averages")
    clip: float = Field(default=1.0, gt=0, description="largest norm of the gradient")
    gradient_checkpointing: bool = Field(default=False, description="recompute activations: less memory, 30 % slower")
    seed: Annotated[
        int,
        Flag(joint=True, help="Seed of training and resampling; the split has its own, data.seed. [default: 0]"),
    ] = Field(default=0, ge=0, description="seed of start values, order of blocks and dropout")
    checkpoint_steps: int = Field(default=50, gt=0, description="steps between checkpoints inside a stage")
    snapshot_steps: int | None = Field(
        default=None, gt=0, description="steps between kept copies of the adapter, for `gaintune retention`; else none"
    )
    trackers: tuple[str, ...] = Field(default=(), description="tensorboard, wandb and the other Trainer trackers")
    keep: Annotated[Literal["last", "best"], LATER] = Field(
        default="last",
        description="which weights of an adaptation count: those after the last update, or those of the snapshot with "
        "the lowest loss on the domain's validation text (best; of a classifier, with the highest accuracy)",
    )

    @model_validator(mode="after")
    def _choosable(self) -> TrainConfig:
        if self.keep == "best" and self.snapshot_steps is None:
            raise ValueError("keep=best chooses among snapshots: set snapshot_steps, the updates between them")
        return self

    @model_validator(mode="after")
    def _one_accumulation(self) -> TrainConfig:
        if self.effective_batch is not None and self.gradient_accumulation != 1:
            raise ValueError(
                f"effective_batch ({self.effective_batch}) and gradient_accumulation ({self.gradient_accumulation}) "
                "both say how many forward passes an update adds up: give one of them"
            )
        try:
            self.accumulation()
        except ConfigError as error:
            raise ValueError(str(error).removeprefix("train.")) from None
        return self

    def accumulation(self, processes: int = 1) -> int:
        """Return how many forward passes each process adds up before an update.

        Raises:
            ConfigError: the effective batch is no multiple of the rows of all processes' forward passes.
        """
        if self.effective_batch is None:
            return self.gradient_accumulation
        rows, left = self.batch_size * processes, self.effective_batch % (self.batch_size * processes)
        if left:
            below, above = self.effective_batch - left, self.effective_batch - left + rows
            near = f"{below} or {above}" if below else str(above)
            share = self.effective_batch // processes
            smaller = next((n for n in range(min(share, self.batch_size), 0, -1) if share % n == 0), None)
            other = f", or train.batch_size={smaller}" if smaller and self.effective_batch % processes == 0 else ""
            raise ConfigError(
                f"train.effective_batch is {self.effective_batch}, no multiple of the {rows} rows of a forward pass "
                f"(train.batch_size {self.batch_size} x {processes} process{'es' * (processes > 1)}): set "
                f"train.effective_batch={near}{other}"
            )
        return self.effective_batch // rows

    def rows_per_update(self, processes: int = 1) -> int:
        """Return how many rows an update of all processes takes; raises as `accumulation` does."""
        self.accumulation(processes)  # for its error
        return cast(int, rows_per_update(self.model_dump(), processes))


class EvaluateConfig(Section):
    """Settings of the measurement and of its uncertainty."""

    batch_size: int = Field(default=4, gt=0, description="blocks in a forward pass")
    bootstrap_samples: int = Field(default=2000, gt=0, description="resamples behind an interval")
    confidence: float = Field(default=0.95, gt=0, lt=1, description="coverage of an interval")
    seed: Annotated[int, Flag(joint=True)] = Field(default=0, ge=0, description="seed of the resampling")


class ClassifyConfig(Section):
    """Settings of a classifier's rows and head; `validation_rows` also limits the questions of `evaluate --choices`."""

    max_length: int = Field(default=128, ge=4, description="longest row, in tokens; longer ones are cut, and counted")
    train_rows: int | None = Field(default=None, gt=0, description="training rows, drawn by the seed; else all")
    validation_rows: int | None = Field(default=None, gt=0, description="validation rows, drawn by the seed; else all")
    head_lr: float | None = Field(default=None, gt=0, description="new head's peak rate; the method's, at most 0.001")


class MethodConfig(Section):
    """One way to adapt; None stands for the method's own default in the catalogue."""

    name: str = Field(description="catalogue name, see `gaintune methods`")
    label: Name = Field(default="", description="name in tables and folders; made of the method's name if not given")
    lr: float | None = Field(default=None, gt=0, description="peak learning rate")
    rank: int | None = Field(default=None, gt=0, description="rank of a low-rank method; the average one of adalora")
    alpha: float | None = Field(default=None, gt=0, description="low-rank methods: the update is alpha / rank * BA")
    targets: str | tuple[str, ...] | None = Field(
        default=None,
        description="endings of names, 'all-linear', 'output-projection' (where GAIN acts) or 'kappa' (KappaTune's)",
    )
    lr_ratio: float | None = Field(default=None, gt=0, description="lora+: rate of B as a multiple of the rate")
    orthogonality: float | None = Field(default=None, ge=0, description="adalora: weight of the orthogonality term")
    preserved: float | None = Field(default=None, gt=0, lt=1, description="osf: share of fixed singular directions")
    gate_bias: float | None = Field(default=None, description="disel: gates' first bias; they start near its sigmoid")
    gate_lr_ratio: float | None = Field(default=None, gt=0, description="disel: gates' rate as a multiple of the rate")
    gate_rank: int | None = Field(default=None, gt=0, description="disel: rank of the gates' matrix; full unless given")
    penalty: Annotated[Literal["l2", "ewc"] | None, Flag()] = Field(
        default=None,
        description="pull toward the weights after the previous domain: l2 (all alike) or ewc (by the diagonal Fisher "
        "information of the earlier domains)",
    )
    penalty_strength: Annotated[float | None, Flag()] = Field(
        default=None, ge=0, description="strength of the pull: half of it times the squared distance; 0 is none"
    )
    ewc_rows: int | None = Field(
        default=None, gt=0, description="ewc: rows for a domain's Fisher information; else all"
    )
    replay: Annotated[float, Flag()] = Field(
        default=0.0, ge=0, description="rows of earlier domains per row of its own"
    )
    gate_lr: Annotated[float | None, LATER] = Field(
        default=None, gt=0, description="disel: gates' peak rate, in place of gate_lr_ratio times the rate"
    )
    off_diagonals: Annotated[int | None, LATER] = Field(
        default=None, ge=0, description="svft: trained diagonals on each side of the singular values; none unless given"
    )
    renormalize: Annotated[float | None, LATER] = Field(
        default=None,
        gt=0,
        lt=1,
        description="sequence: share of what the adapter adds to the base that is kept after each stage, before it is "
        "measured (of gains, (IA)3's factors and LoRA's B)",
    )
    config: Annotated[dict[str, Any] | None, LATER] = Field(
        default=None, description="fields of PEFT's own configuration, laid over the method's; peft: with its peft_type"
    )
    start_rows: Annotated[int | None, LATER] = Field(
        default=None, gt=0, description="lora-ga, corda, eva: training rows that the start is computed from; else 256"
    )
    intruders: Annotated[float | None, LATER] = Field(
        default=None, ge=0, le=1, description="lora, lora+: share of intruder dimensions that stays after a domain"
    )

    @model_validator(mode="before")
    @classmethod
    def _default_label(cls, value: Any) -> Any:
        if isinstance(value, str):
            if ":" in value:
                raise ValueError("in a plan a method's options are keys: {name: lora, rank: 16}")
            value = {"name": value}
        if isinstance(value, dict) and not value.get("label"):
            value = {**value, "label": _label(value)}
        return value

    @model_validator(mode="after")
    def _whole_penalty(self) -> MethodConfig:
        if self.penalty is None and self.penalty_strength is not None:
            raise ValueError("penalty_strength is given without a penalty: add penalty=l2 or penalty=ewc")
        if self.penalty != "ewc" and self.ewc_rows is not None:
            raise ValueError("ewc_rows is given without penalty=ewc")
        if self.gate_lr is not None and self.gate_lr_ratio is not None:
            raise ValueError("gate_lr and gate_lr_ratio both set the gates' rate: leave one of them out")
        return self


def _label(values: dict[str, Any]) -> str:
    """Return the default label of a method, such as lora-ewc: a method may stand beside itself with a penalty."""
    replay = "" if str(values.get("replay") or 0) in {"0", "0.0"} else "replay"
    pulled = "renormalized" if values.get("renormalize") else ""
    name, config = str(values.get("name", "")), values.get("config")
    if name == ANY_METHOD and isinstance(config, Mapping) and config.get("peft_type"):
        name = str(config["peft_type"]).lower()
    parts = (name.replace("+", "-plus"), str(values.get("penalty") or ""), replay, pulled)
    return "-".join(filter(None, parts))


DEMO_DOMAINS = ("medical", "law", "scripture", "manual", "code")
CLASSIFIER_BASE = "FacebookAI/roberta-base"
Task = Literal["text", "instruct", "classify"]
Template = Literal["auto", "plain", "alpaca", "magicoder", "chat"]
BeginningOfText = Literal["auto", "always", "never"]


class DomainConfig(Section):
    """One domain: a catalogue name, or a local file or folder with a name of your choice."""

    name: Name = Field(description="label in tables and folders: letters, digits, dot, dash and underscore")
    source: str = Field(description="catalogue name, or path of a .jsonl/.json/.csv/.parquet/.txt/.md file or folder")
    text_column: Annotated[
        str | None, Flag(help="Column that holds the text of every domain that is a local file or folder.")
    ] = Field(default=None, description="column that holds the text; found by itself when there is one")
    task: Task | None = Field(default=None, description="what is learned from these rows; the plan's unless given")
    template: Template | None = Field(default=None, description="instruct: its own template; the plan's unless given")
    prompt_column: str | None = Field(default=None, description="instruct: prompt's column, else 'prompt'")
    completion_column: str | None = Field(default=None, description="instruct: completion's column, else 'completion'")


def as_list(value: Any) -> Any:
    """Accept a single entry in place of a list, such as 'lora' for ['lora']."""
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
    """The domains, how much of each is used, and how it is cut."""

    domains: Annotated[
        tuple[Annotated[DomainConfig, BeforeValidator(as_domain)], ...],
        BeforeValidator(as_list),
        Flag("domain", help="Domain: catalogue name, path, or name=path; repeat in order."),
    ] = Field(
        default=tuple(DomainConfig(name=name, source=name) for name in DEMO_DOMAINS),
        description="domains in the order they are learned",
        min_length=1,
    )
    watched: Annotated[
        tuple[Annotated[DomainConfig, BeforeValidator(as_domain)], ...],
        BeforeValidator(as_list),
        Flag("watch", help="Domain that is measured beside the others and never learned; repeatable."),
    ] = Field(default=(), description="sequence: domains that are measured beside the others and never learned")
    task: Annotated[Task, Flag()] = Field(
        default="text",
        description="what is learned from the rows: text (every token), instruct (the completion of a prompt), "
        "or classify (a label)",
    )
    template: Annotated[Template, Flag()] = Field(
        default="auto",
        description="instruct: how prompts and completions are written: plain (as they are), alpaca, magicoder, or "
        "chat (the model's own chat template); auto is chat for messages and plain for prompt and completion",
    )
    packing: bool = Field(
        default=True, description="instruct: several rows in a block, none attending to another; false pads every row"
    )
    end_of_text: bool = Field(
        default=True,
        description="instruct: learn the end-of-text token after every completion; false leaves it out, to learn "
        "answers alone. A chat template's own end of turn stays",
    )
    beginning_of_text: Annotated[BeginningOfText, LATER] = Field(
        default="auto",
        description="start every block of text and every row of instructions with the tokenizer's beginning-of-text "
        "token: always, never, or (auto) where the model was trained with one, such as Llama, Mistral and Gemma. It "
        "is one of the block's tokens and is not scored. One that a chat template writes itself stays",
    )
    train_tokens: Annotated[int, Flag()] = Field(default=8192, gt=0, description="training tokens of a domain, at most")
    validation_tokens: Annotated[int, Flag()] = Field(default=4096, gt=0, description="validation tokens, at most")
    block_size: Annotated[int, Flag()] = Field(default=256, ge=8, description="length of a packed block in tokens")
    seed: int = Field(default=0, ge=0, description="seed of the split by document and of the order of documents")
    stream: Annotated[bool, Flag(), LATER] = Field(
        default=False,
        description="sequence: one training run over all domains, which blend into one another; measured where each "
        "domain's share ends",
    )
    stream_blend: Annotated[float, LATER] = Field(
        default=0.5,
        ge=0,
        le=1,
        description="stream: rows in which one domain turns into the next, as a share of the smaller one's rows",
    )

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
        if not self.stream and self.stream_blend != type(self).model_fields["stream_blend"].default:
            raise ValueError("stream_blend is given without stream: set data.stream=true (--stream)")
        if "classify" in tasks.values() and self.beginning_of_text != "auto":
            raise ValueError("beginning_of_text is for text and instructions: leave it out of a classifier's plan")
        for domain in self.measured:
            own = ("template", "prompt_column", "completion_column")
            given = [field for field in own if getattr(domain, field) is not None]
            if given and self.task_of(domain) != "instruct":
                raise ValueError(f"domains: {domain.name}: {given[0]} is for task instruct")
        for field in () if "instruct" in tasks.values() else ("template", "packing", "end_of_text"):
            if getattr(self, field) != type(self).model_fields[field].default:
                advice = "set data.task=instruct (--task instruct)"
                raise ValueError(f"{field} is for task instruct, and no domain has it: {advice}")
        return self

    @property
    def measured(self) -> tuple[DomainConfig, ...]:
        """The domains that are trained on, in their order, and those that are only watched."""
        return (*self.domains, *self.watched)

    def task_of(self, domain: DomainConfig) -> Task:
        """Return what a domain's rows are for: its own task, else the plan's."""
        return domain.task or self.task

    def template_of(self, domain: DomainConfig) -> Template:
        """Return how a domain's prompts and completions are written: its own template, else the plan's."""
        return domain.template or self.template


class Plan(Section):
    """Everything that decides what a run computes."""

    model: ModelConfig = Field(default_factory=lambda: ModelConfig())
    data: DataConfig = Field(default_factory=lambda: DataConfig())
    methods: Annotated[
        tuple[MethodConfig, ...],
        BeforeValidator(as_list),
        Flag("method", help="Method, such as gain-ffn or lora:rank=16,lr=2e-4,label=lora16; repeatable."),
    ] = Field(
        default=(MethodConfig(name="gain-ffn", label="gain-ffn"),), min_length=1, description="all start from one base"
    )
    train: TrainConfig = Field(default_factory=lambda: TrainConfig())
    evaluate: EvaluateConfig = Field(default_factory=lambda: EvaluateConfig())
    classify: ClassifyConfig = Field(default_factory=lambda: ClassifyConfig())

    @property
    def classifies(self) -> bool:
        """Whether the plan trains a classifier."""
        return self.data.task_of(self.data.domains[0]) == "classify"

    @model_validator(mode="before")
    @classmethod
    def _base_of_a_classifier(cls, values: Any) -> Any:
        """Take an encoder as the base of a classifier where the plan names none."""
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
    def _best_without_end(self) -> Plan:
        if self.train.keep == "best":
            for method, option in product(self.methods, ("penalty", "renormalize", "intruders")):
                if getattr(method, option) is not None:
                    raise ValueError(
                        f"train.keep=best: {method.label} has {option}, which works on the weights after the last "
                        "update; leave one of them out"
                    )
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
    """Tell whether a plan's data, checked or not, are a classifier's."""
    if isinstance(data, DataConfig):
        return data.task_of(data.domains[0]) == "classify"
    if not isinstance(data, Mapping):
        return False
    domains = as_list(data.get("domains"))
    sections = [data, *(domains if isinstance(domains, list | tuple) else ())]
    return any(isinstance(section, Mapping) and section.get("task") == "classify" for section in sections)


def explain(error: ValidationError, origin: str, plan: type[BaseModel]) -> ConfigError:
    """Return an error with a line for each mistake: its key and the nearest known one; `plan` is the plan's class."""
    lines, details = [], error.errors()
    for detail in details:
        if any(other["loc"][: len(detail["loc"])] == detail["loc"] != other["loc"] for other in details):
            continue  # a list called too short only because one of its entries is wrong
        key = ".".join(str(part) for part in detail["loc"])
        if detail["type"] == "extra_forbidden":
            unknown, known = str(detail["loc"][-1]), list(_section(plan, detail["loc"]).model_fields)
            ours = OTHER_WORDS.get(unknown)
            meant = [ours] if ours in known else get_close_matches(unknown, known, n=1)
            advice = f"did you mean {meant[0]!r}?" if meant else f"known keys: {', '.join(known)}"
            lines.append(f"{origin}: unknown key {key!r}; {advice}")
            continue
        value = detail["input"]
        got = f" (got {value!r})" if isinstance(value, str | int | float | bool | None) and key else ""
        message = detail["msg"].removeprefix("Value error, ")
        lines.append(": ".join(part for part in (origin, key, f"{message}{got}") if part))
    return ConfigError("\n".join(lines))


def _section(plan: type[BaseModel], location: Sequence[str | int]) -> type[BaseModel]:
    """Return the part of a plan to which the last key of a location would belong."""
    section = plan
    for part in location[:-1]:
        field = section.model_fields.get(str(part))
        section = section if field is None else section_of(field.annotation) or section
    return section


def section_of(annotation: Any) -> type[BaseModel] | None:
    """Return the part of a plan that a field holds, itself or in a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(section_of, get_args(annotation))), None)


def build_plan(values: dict[str, Any], origin: str = "plan") -> Plan:
    """Check nested values into a plan; ConfigError names an unknown key or wrong value, with its place in `origin`."""
    try:
        return Plan.model_validate(values)
    except ValidationError as error:
        raise explain(error, origin, Plan) from None


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML that refuses a key twice in a mapping, as YAML's own rules do: PyYAML drops one of them."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Refuse a repeated key before merges (`<<`) are resolved: what they bring may be given again."""
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag.endswith(":merge"):
                continue
            if (key.tag, key.value) in lines:
                first = lines[key.tag, key.value] + 1
                problem = f"the key {key.value!r} stands there twice, first on line {first}; keep one"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            lines[key.tag, key.value] = key.start_mark.line
        return node


def read_values(path: Path, kind: str = "plan") -> dict[str, Any]:
    """Read a YAML plan, or a file of another kind, as nested values, without checking its keys yet."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeyLoader)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such {kind} file") from None
    except OSError as error:
        raise ConfigError(f"{path}: this {kind} cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: not valid YAML ({getattr(error, 'problem', error)})") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a {kind} is a mapping of keys to values")
    return values


def read_plan(plan: Plan | Mapping[str, Any] | str | Path) -> Plan:
    """Return the plan of nested values or a YAML file, or a plan as it is; raises as `build_plan` does."""
    if isinstance(plan, Plan):
        return plan
    return build_plan(dict(plan)) if isinstance(plan, Mapping) else build_plan(read_values(Path(plan)), str(plan))


def read_value(text: str, origin: str) -> Any:
    """Read a value of the command line as YAML; `origin` begins the ConfigError for a text that is none."""
    try:
        value = yaml.load(text, _UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin}: {text!r} is not a YAML value ({getattr(error, 'problem', error)})") from None
    if isinstance(value, str):  # YAML 1.1 reads 1e-3 as a string; a person means the number
        with contextlib.suppress(ValueError):
            value = float(value)
    return value


def apply_overrides(values: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Return `values` with dotted assignments such as 'train.lr=0.005' laid over them; values are read as YAML."""
    result = dict(values)
    for assignment in assignments:
        key, separator, text = assignment.partition("=")
        if not separator or not key:
            raise ConfigError(f"--set {assignment}: write section.key=value, such as train.lr=0.005")
        value = read_value(text, f"--set {assignment}")
        *parents, leaf = key.split(".")
        node = result
        for parent in parents:
            child = node.get(parent)
            node[parent] = dict(child) if isinstance(child, dict) else {}
            node = node[parent]
        node[leaf] = value
    return result


def plan_yaml(plan: Plan) -> str:
    """Return the whole plan as YAML that `build_plan` reads back to an equal plan."""
    return as_yaml(plan.model_dump(mode="json"))


def plan_yaml_documented(plan: Plan) -> str:
    """Return the whole plan as YAML with every key's description above it; reads back to an equal plan."""
    lines = []
    for name, info in Plan.model_fields.items():
        value, dumped = getattr(plan, name), plan.model_dump(mode="json")[name]
        if not isinstance(value, Section):
            lines.extend((f"# {info.description}; see `gaintune methods`", *as_yaml({name: dumped}).splitlines()))
            continue
        lines.append(f"{name}:")
        for key, field in type(value).model_fields.items():
            shown = dumped.get(key, field.default)  # a dump may leave a newer key out at its default
            lines.extend(f"  {line}" for line in (f"# {field.description}", *as_yaml({key: shown}).splitlines()))
    return "\n".join(lines) + "\n"
