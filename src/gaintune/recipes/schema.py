"""Recipes: an experiment as data, checked when it is read; the papers' own are the files of `experiments/`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from gaintune.config import LATER, NAME, Section, as_list, explain, read_values
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
    scale: Annotated[Scale | None, LATER] = Field(
        default=None, description="the one scale at which it is decided; every scale if none"
    )
    model: Annotated[str | None, LATER] = Field(
        default=None, description="the one model it is about, a Hub id; every model if none"
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


class FurtherModel(Section):
    """Another model of the paper's table; at scale paper every step is repeated on it."""

    model: str = Field(description="Hub id")
    label: str = Field(description="short name after the @ in the names of its steps and numbers")
    settings: dict[str, Any] = Field(
        default_factory=dict, description="laid over those of the steps that train, such as its own order of domains"
    )

    @field_validator("label")
    @classmethod
    def _one_word(cls, label: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", label):
            raise ValueError(f"{label!r} is not a usable label: use letters, digits, dash and underscore")
        return label


class Recipe(Section):
    """One experiment of a paper."""

    id: str = Field(description="its name in the list, such as G2")
    title: str = Field(description="the experiment in a few words")
    source: str = Field(description="paper, and table, figure or section")
    asks: str = Field(description="the question, and how the steps answer it")
    differs: Annotated[tuple[str, ...], LATER] = Field(
        default=(), description="what is not as in the paper, or not known from its text"
    )
    model: str = Field(description="the paper's model, a Hub id: the base at scale paper")
    models: Annotated[tuple[FurtherModel, ...], LATER] = Field(
        default=(), description="the other models of the paper's table"
    )
    table: Annotated[dict[str, str], LATER] = Field(
        default_factory=dict, description="columns of the table over models: head, and the first model's number"
    )
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
        named = {"claims": [claim.number for claim in self.claims], "table": self.table.values()}
        for key, number in ((key, number) for key, numbers in named.items() for number in numbers):
            if number.split(".")[0] not in names:
                raise ValueError(f"{key}: {number!r} does not begin with the name of a step")
        labels, known = ([getattr(further, key) for further in self.models] for key in ("label", "model"))
        if len(set(labels)) != len(labels):
            raise ValueError(f"models: every label must be different, got {', '.join(labels)}")
        if strange := [claim for claim in self.claims if claim.model not in (None, self.model, *known)]:
            raise ValueError(f"claims: {strange[0].says!r} is about {strange[0].model!r}, which is none of the models")
        based = [step.name for step in self.steps if "base" in step.settings]
        if labels and based:
            raise ValueError(f"models: step {based[0]} names a base of its own: leave that, or the models, out")
        return self

    def settings(self, step: Step, scale: Scale) -> dict[str, Any]:
        """Return a step's settings at a scale."""
        return laid_over(step.settings, self.scales.get(scale, {}).get(step.name, {}))

    def at(self, scale: Scale, models: Sequence[str] = (), *, one_base: bool = False) -> Recipe:
        """Return the recipe as it runs at a scale: steps and claims for each model, and only the scale's claims.

        The first model's steps keep their names; those of another are STEP@LABEL. At scale small, and with `one_base`,
        there is one base, and `models` of the result is empty. `models` picks some, by label or Hub id.

        Raises:
            ConfigError: an unknown model, or a choice of models where there is one base.
        """
        labels = {self.model: "", **{further.model: further.label for further in self.models}}
        known = {name: model for model, label in labels.items() for name in (model, label) if name}
        if unknown := [name for name in models if name not in known]:
            raise ConfigError(f"recipe {self.id}: no model {unknown[0]!r}; there are {', '.join(known)}")
        claims = [claim for claim in self.claims if claim.scale in (None, scale)]
        if one_base:  # of the user's own, about which no claim on one of the paper's models says anything
            claims = [claim for claim in claims if claim.model is None]
        one_base = one_base or scale == "small"
        if models and one_base:
            raise ConfigError(f"recipe {self.id}: models are chosen at scale paper, without --set model.name")
        chosen = {known[name] for name in models} or ({self.model} if one_base else {*labels})
        others = [further for further in self.models if further.model in chosen]
        first = self.model in chosen
        steps = [*self.steps] if first else []
        judged = [claim for claim in claims if first and claim.model in (None, self.model)]
        for further in others:
            steps += [_step_on(further, step) for step in self.steps]
            judged += [_claim_on(further, claim) for claim in claims if claim.model in (None, further.model)]
        scales = {
            key: over | {f"{name}@{further.label}": own for further in others for name, own in over.items()}
            for key, over in self.scales.items()
        }
        gone = ", ".join(model for model in labels if model not in chosen)
        differs = (*self.differs, *([f"left out here, models of the paper: {gone}"] if gone else []))
        own = {"steps": tuple(steps), "claims": tuple(judged), "scales": scales, "models": tuple(others)}
        return self.model_copy(update={**own, "differs": differs})


def number_on(label: str, number: str) -> str:
    """Return the name of a number for a further model: its step's name gets the model's label."""
    step, _, rest = number.partition(".")
    return f"{step}@{label}.{rest}"


def _claim_on(further: FurtherModel, claim: Claim) -> Claim:
    """Repeat a claim on a further model."""
    number = number_on(further.label, claim.number)
    return claim.model_copy(update={"says": f"{claim.says} ({further.label})", "number": number})


def _step_on(further: FurtherModel, step: Step) -> Step:
    """Repeat a step on a further model; the earlier steps that it names are those of this model."""
    settings = dict(step.settings)
    if "of" in settings:
        settings["of"] = f"{settings['of']}@{further.label}"
    if "differences" in settings:
        pairs: Mapping[str, Sequence[str]] = settings["differences"]
        settings["differences"] = {
            name: [number_on(further.label, number) for number in pair] for name, pair in pairs.items()
        }
    elif "of" not in settings:
        settings = {**laid_over(settings, further.settings), "base": further.model}
    elif "domains" in settings:  # it measures texts of its own
        model = {key: further.settings[key] for key in ("model",) if key in further.settings}
        settings = {**laid_over(settings, model), "base": further.model}
    return step.model_copy(update={"name": f"{step.name}@{further.label}", "settings": settings})


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
