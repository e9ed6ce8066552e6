"""What a recipe is: an experiment as data, checked when it is read, with unknown keys refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from gaintune.config import NAME, Section, as_list, explain, read_values

Scale = Literal["smoke", "small", "paper"]
SCALES: tuple[Scale, ...] = ("smoke", "small", "paper")


class Expectation(Section):
    """What a claim says of its number: a bound, or both."""

    above: float | None = Field(default=None, description="the number is greater")
    below: float | None = Field(default=None, description="the number is smaller")

    @model_validator(mode="after")
    def _says_something(self) -> Expectation:
        if self.above is None and self.below is None:
            raise ValueError("say above, below, or both")
        if self.bounds[0] >= self.bounds[1]:
            raise ValueError(f"no number is {self}")
        return self

    @property
    def bounds(self) -> tuple[float, float]:
        """The open interval that the number is said to lie in."""
        return (-math.inf if self.above is None else self.above, math.inf if self.below is None else self.below)

    def __str__(self) -> str:
        parts = [f"above {self.above:g}"] if self.above is not None else []
        return " and ".join([*parts, *([f"below {self.below:g}"] if self.below is not None else [])])


class Claim(Section):
    """What a paper says, and the number that decides it."""

    says: str = Field(description="the claim in one sentence")
    number: str = Field(description="name of a number that a step gives, such as run.gain-ffn.backward_transfer")
    expect: Expectation = Field(description="where the number lies if the claim is true")
    bound: Literal["paper", "ours"] = Field(
        default="paper", description="whose the bound is: the paper's words give it, or it was chosen for them"
    )


class Step(Section):
    """One stage of a recipe; what `settings` may hold depends on what it does."""

    name: str = Field(description="name of its folder, and the beginning of the names of its numbers")
    do: str = Field(description="what it does: one of the kinds in `recipes.kinds`")
    settings: dict[str, Any] = Field(default_factory=dict, description="of that kind")

    @model_validator(mode="after")
    def _plain_name(self) -> Step:
        if not NAME.fullmatch(self.name):
            raise ValueError(f"{self.name!r} is not a usable name: use letters, digits, dot, dash and underscore")
        return self


class Recipe(Section):
    """One experiment of a paper."""

    id: str = Field(description="its name in the list, such as G2")
    title: str = Field(description="what it is, in a few words")
    source: str = Field(description="paper, and table, figure or section")
    asks: str = Field(description="the question, and how the steps answer it")
    model: str = Field(description="the paper's model, a Hub id: the base at scale paper")
    steps: Annotated[tuple[Step, ...], BeforeValidator(as_list)] = Field(min_length=1, description="in order")
    scales: dict[Scale, dict[str, dict[str, Any]]] = Field(
        default_factory=dict, description="settings laid over a step's at a scale, by the step's name"
    )
    claims: tuple[Claim, ...] = Field(default=(), description="what is decided at the end")

    @model_validator(mode="after")
    def _known_names(self) -> Recipe:
        names = [step.name for step in self.steps]
        if len(set(names)) != len(names):
            raise ValueError(f"steps: every name must be different, got {', '.join(names)}")
        for scale, over in self.scales.items():
            for name in over:
                if name not in names:
                    raise ValueError(f"scales.{scale}: no step is called {name!r}; there are {', '.join(names)}")
        for claim in self.claims:
            if claim.number.split(".")[0] not in names:
                raise ValueError(f"claims: {claim.number!r} does not begin with the name of a step")
        return self

    def settings(self, step: Step, scale: Scale) -> dict[str, Any]:
        """A step's settings at a scale."""
        return laid_over(step.settings, self.scales.get(scale, {}).get(step.name, {}))


def laid_over(values: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Nested values with others laid over them, key by key; lists are replaced whole."""
    result = dict(values)
    for key, value in over.items():
        held = result.get(key)
        result[key] = laid_over(held, value) if isinstance(held, dict) and isinstance(value, dict) else value
    return result


def read_recipe(path: Path) -> Recipe:
    """A recipe from its YAML file.

    Raises:
        ConfigError: the file cannot be read, or a key or value is wrong.
    """
    try:
        return Recipe.model_validate(read_values(path, "recipe"))
    except ValidationError as error:
        raise explain(error, str(path), Recipe) from None
