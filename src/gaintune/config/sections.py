"""The base of all parts of a plan, and every part but the data: model, method, training, measuring, classifying."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class Section(BaseModel):
    """A frozen part of the plan; a key that is not a field is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelConfig(Section):
    """Which base model, and in which numbers."""

    name: str = Field(default="demo", description="hub id, local folder, .gguf file, or 'demo' (SmolLM2-135M-Instruct)")
    revision: str | None = Field(default=None, description="hub revision: a branch, tag or commit")
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        default="auto",
        description="numbers of the base; auto is bf16 on CUDA and on CPUs with AVX-512-BF16 or AMX, else fp32",
    )
    quantization: Literal["4bit", "8bit"] | None = Field(default=None, description="load the base through bitsandbytes")
    device: str = Field(default="auto", description="auto, cpu, cuda or cuda:N")
    trust_remote_code: bool = Field(default=False, description="run Python code that comes with the model")


class TrainConfig(Section):
    """One adaptation: optimizer, schedule and bookkeeping."""

    lr: float | None = Field(
        default=None, gt=0, description="peak learning rate of every method; a method's own lr wins"
    )
    epochs: int = Field(default=1, gt=0, description="passes over the training blocks")
    batch_size: int = Field(default=4, gt=0, description="blocks in a forward pass, on each device")
    gradient_accumulation: int = Field(default=1, gt=0, description="forward passes added up before an update")
    schedule: Literal["constant", "cosine"] = Field(default="constant", description="learning rate after the warm-up")
    warmup_ratio: float = Field(
        default=0.03, ge=0, lt=1, description="share of the steps in which the rate rises from 0"
    )
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's decay; never applied to gains")
    betas: tuple[float, float] = Field(default=(0.9, 0.999), description="AdamW's two averages")
    clip: float = Field(default=1.0, gt=0, description="largest norm of the gradient")
    gradient_checkpointing: bool = Field(
        default=False, description="recompute activations: less memory, about 30 % slower"
    )
    seed: int = Field(default=0, ge=0, description="seed of start values, order of blocks and dropout")
    checkpoint_steps: int = Field(default=50, gt=0, description="steps between checkpoints inside a stage")
    snapshot_steps: int | None = Field(
        default=None,
        gt=0,
        description="steps between copies of the adapter that are kept beside it, for `gaintune retention`; none are "
        "kept unless given",
    )
    trackers: tuple[str, ...] = Field(default=(), description="tensorboard, wandb and the other Trainer trackers")


class EvaluateConfig(Section):
    """How uncertainty is measured."""

    batch_size: int = Field(default=4, gt=0, description="blocks in a forward pass")
    bootstrap_samples: int = Field(default=2000, gt=0, description="resamples behind an interval")
    confidence: float = Field(default=0.95, gt=0, lt=1, description="coverage of an interval")
    seed: int = Field(default=0, ge=0, description="seed of the resampling")


class ClassifyConfig(Section):
    """How labelled rows become a classifier; `validation_rows` also limits the questions of `evaluate --choices`."""

    max_length: int = Field(default=128, ge=4, description="longest row, in tokens; longer ones are cut, and counted")
    train_rows: int | None = Field(
        default=None, gt=0, description="training rows of a domain, drawn in an order the seed decides; all of them"
    )
    validation_rows: int | None = Field(
        default=None, gt=0, description="validation rows of a domain, drawn likewise; all of them"
    )
    head_lr: float | None = Field(
        default=None, gt=0, description="peak learning rate of the new head; the method's, but at most 0.001"
    )


class MethodConfig(Section):
    """One way to adapt; None stands for the method's own default in the catalogue."""

    name: str = Field(description="catalogue name, see `gaintune methods`")
    label: str = Field(
        default="",
        description="name in tables and folders; the method's name and what is added to it unless given",
    )
    lr: float | None = Field(default=None, gt=0, description="peak learning rate")
    rank: int | None = Field(default=None, gt=0, description="rank of a low-rank method; the average one of adalora")
    alpha: float | None = Field(
        default=None, gt=0, description="scale of a low-rank method; the update is alpha / rank * BA"
    )
    targets: str | tuple[str, ...] | None = Field(
        default=None, description="module name endings, 'all-linear', or 'output-projection' (where GAIN acts)"
    )
    lr_ratio: float | None = Field(default=None, gt=0, description="lora+: rate of B as a multiple of the rate")
    orthogonality: float | None = Field(
        default=None, ge=0, description="adalora: weight of the term that keeps its directions orthogonal"
    )
    preserved: float | None = Field(
        default=None, gt=0, lt=1, description="osf: share of every weight's singular directions that stays fixed"
    )
    gate_bias: float | None = Field(
        default=None, description="disel: start of the gates' bias; they start near sigmoid of it"
    )
    gate_lr_ratio: float | None = Field(
        default=None, gt=0, description="disel: rate of the gates as a multiple of the rate"
    )
    gate_rank: int | None = Field(default=None, gt=0, description="disel: rank of the gates' matrix; full unless given")
    penalty: Literal["l2", "ewc"] | None = Field(
        default=None,
        description="pull toward the weights after the previous domain: l2 (all alike) or ewc (by the diagonal Fisher "
        "information of the earlier domains)",
    )
    penalty_strength: float | None = Field(
        default=None, ge=0, description="strength of the pull: half of it times the squared distance; 0 is none"
    )
    ewc_rows: int | None = Field(
        default=None, gt=0, description="ewc: rows of a domain that its Fisher information is estimated on; all of them"
    )
    replay: float = Field(
        default=0.0, ge=0, description="rows of earlier domains mixed into a domain's, as a ratio to its own rows"
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

    @field_validator("label")
    @classmethod
    def _plain_label(cls, value: str) -> str:
        if not NAME.fullmatch(value):
            raise ValueError(f"{value!r} is not a usable label: use letters, digits, dot, dash and underscore")
        return value

    @model_validator(mode="after")
    def _whole_penalty(self) -> MethodConfig:
        if self.penalty is None and self.penalty_strength is not None:
            raise ValueError("penalty_strength is given without a penalty: add penalty=l2 or penalty=ewc")
        if self.penalty != "ewc" and self.ewc_rows is not None:
            raise ValueError("ewc_rows is given without penalty=ewc")
        return self


def _label(values: dict[str, Any]) -> str:
    """The label of a method that was given none, such as lora-ewc: a method may stand beside itself with a penalty."""
    parts = [str(values.get("name", "")).replace("+", "-plus")]
    if values.get("penalty"):
        parts.append(str(values["penalty"]))
    if str(values.get("replay") or 0) not in {"0", "0.0"}:
        parts.append("replay")
    return "-".join(parts)
