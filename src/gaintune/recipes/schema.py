"""Recipes: an experiment as data, checked when it is read; the papers' own are the files of `experiments/`."""

from __future__ import annotations

import math
import re
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from gaintune.config import NAME, Section, as_list, explain, read_values
from gaintune.errors import ConfigError

Scale = Literal["smoke", "small", "paper"]
SCALES: tuple[Scale, ...] = ("smoke", "small", "paper")


class Expectation(Section):
    """Bounds that a claim sets to a number: a lower one, an upper one, or both."""

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
        """The ends of the open interval."""
        return (-math.inf if self.above is None else self.above, math.inf if self.below is None else self.below)

    def __str__(self) -> str:
        ends = {"above": self.above, "below": self.below}
        return " and ".join(f"{side} {end:g}" for side, end in ends.items() if end is not None)


class Claim(Section):
    """A statement of a paper, and the number that decides it."""

    says: str = Field(description="the claim in one sentence")
    number: str = Field(description="name of a number that a step gives, such as run.gain-ffn.backward_transfer")
    expect: Expectation = Field(description="where the number lies if the claim is true")
    bound: Literal["paper", "ours"] = Field(
        default="paper", description="who set the bound: the paper's own words, or gaintune for lack of a number there"
    )

    @property
    def expected(self) -> str:
        """The bounds, and whether they are ours."""
        return f"{self.expect}{', a bound of ours' if self.bound == 'ours' else ''}"


class Step(Section):
    """One stage of a recipe; its kind decides what `settings` may hold."""

    name: str = Field(description="name of its folder, and first part of the names of its numbers")
    do: str = Field(description="kind of step: a key of `recipes.steps.KINDS`")
    settings: dict[str, Any] = Field(default_factory=dict, description="of that kind")

    @model_validator(mode="after")
    def _plain_name(self) -> Step:
        if not NAME.fullmatch(self.name):
            raise ValueError(f"{self.name!r} is not a usable name: use letters, digits, dot, dash and underscore")
        return self


class Recipe(Section):
    """One experiment of a paper."""

    id: str = Field(description="its name in the list, such as G2")
    title: str = Field(description="the experiment in a few words")
    source: str = Field(description="paper, and table, figure or section")
    asks: str = Field(description="the question, and how the steps answer it")
    model: str = Field(description="the paper's model, a Hub id: the base at scale paper")
    steps: Annotated[tuple[Step, ...], BeforeValidator(as_list)] = Field(min_length=1, description="in order")
    scales: dict[Scale, dict[str, dict[str, Any]]] = Field(
        default_factory=dict, description="settings laid over a step's at a scale, by the step's name"
    )
    claims: tuple[Claim, ...] = Field(default=(), description="statements to decide at the end")

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
        """Return a step's settings at a scale."""
        return laid_over(step.settings, self.scales.get(scale, {}).get(step.name, {}))


def laid_over(values: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Lay nested values over others, key by key; lists are replaced whole."""
    result = dict(values)
    for key, value in over.items():
        held = result.get(key)
        result[key] = laid_over(held, value) if isinstance(held, dict) and isinstance(value, dict) else value
    return result


def read_recipe(path: Path) -> Recipe:
    """Read a recipe from its YAML file.

    Raises:
        ConfigError: the file cannot be read, or a key or value is wrong.
    """
    try:
        return Recipe.model_validate(read_values(path, "recipe"))
    except ValidationError as error:
        raise explain(error, str(path), Recipe) from None


def recipes() -> dict[str, Recipe]:
    """Return the recipes by id, in the order G1 to G19, D1 to D5; others by name after them."""
    folder = Path(str(files("gaintune.recipes") / "experiments"))
    by_id = {recipe.id: recipe for recipe in map(read_recipe, folder.glob("*.yaml"))}

    def order(name: str) -> tuple[int, int, str]:
        paper = re.fullmatch(r"([GD])(\d+)", name)
        return ("GD".index(paper[1]), int(paper[2]), name) if paper else (2, 0, name)

    return {name: by_id[name] for name in sorted(by_id, key=order)}


def recipe_named(name: str) -> Recipe:
    """Return a recipe by its id, in capitals or not, or read one from a YAML file.

    Raises:
        ConfigError: there is none of that id, or the file cannot be read as a recipe.
    """
    if Path(name).suffix in (".yaml", ".yml"):
        return read_recipe(Path(name))
    known = {recipe.id.upper(): recipe for recipe in recipes().values()}
    if name.upper() not in known:
        there = ", ".join(recipe.id for recipe in known.values())
        raise ConfigError(f"no recipe {name!r}; there are {there} (`gaintune recipe list`), or name a .yaml file")
    return known[name.upper()]
