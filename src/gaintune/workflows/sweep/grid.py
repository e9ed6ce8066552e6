"""The grid of a sweep: methods, rates, orders, seeds, ranks and budgets as plain data, and the runs it plans."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Discriminator, Field, Tag, ValidationError, model_validator

from gaintune.config import MethodConfig, Plan, Section, apply_overrides, as_list, explain, read_values
from gaintune.methods import check_method, prepare_method
from gaintune.storage import as_yaml

Rate = Annotated[float, Field(gt=0)]
Rates = Annotated[tuple[Rate, ...], BeforeValidator(lambda value: [value] if isinstance(value, int | float) else value)]


class Grid(Section):
    """Plan of many runs: every method at each of its rates and ranks, in every order, with every seed and budget."""

    plan: Plan = Field(default_factory=lambda: Plan(), description="what all runs have in common")
    methods: Annotated[tuple[MethodConfig, ...], BeforeValidator(as_list)] = Field(
        default=(), description="each is run by itself; the plan's unless given"
    )
    rates: Annotated[
        Annotated[Rates, Tag("every method")] | Annotated[dict[str, Rates], Tag("by label")],
        Discriminator(lambda value: "by label" if isinstance(value, Mapping) else "every method"),
    ] = Field(
        default=(),
        description="learning rates: of every method, or a list for each by its label. A method's own lr wins; one "
        "that has neither is run at its default",
    )
    orders: Annotated[
        Annotated[int, Tag("how many")] | Annotated[tuple[tuple[str, ...], ...], Tag("lists")],
        Discriminator(lambda value: "lists" if isinstance(value, list | tuple) else "how many"),
    ] = Field(
        default=1,
        description="orders of the plan's domains: lists of names, or how many: the plan's own, then random ones",
    )
    order_seed: int = Field(default=0, ge=0, description="seed of the random orders")
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        default=(), description="seeds of training; the plan's unless given. The split has its own, plan.data.seed"
    )
    ranks: tuple[Annotated[int, Field(gt=0)], ...] = Field(
        default=(), description="ranks of the methods that have one; a method's own rank wins"
    )
    budgets: tuple[Annotated[int, Field(gt=0)], ...] = Field(
        default=(), description="training budgets of a domain, in tokens; the plan's unless given"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Grid:
        if self.methods and "methods" in self.plan.model_fields_set:
            raise ValueError("methods: given in the grid and in its plan; leave plan.methods out")
        labels = [method.label for method in self.every_method]
        if len(set(labels)) != len(labels):
            raise ValueError(f"methods: every label must be different, got {', '.join(labels)}")
        if isinstance(self.rates, dict):
            for label in self.rates:
                if label not in labels:
                    raise ValueError(f"rates: no method is called {label!r}; the methods are {', '.join(labels)}")
        for name in ("seeds", "ranks", "budgets"):
            values = getattr(self, name)
            if len(set(values)) != len(values):
                raise ValueError(f"{name}: a value stands there twice in {', '.join(map(str, values))}")
        if self.plan.classifies:
            raise ValueError("plan: a sweep runs sequences, and these measure perplexity, which a classifier has not")
        names = [domain.name for domain in self.plan.data.domains]
        if isinstance(self.orders, int):
            if not 1 <= self.orders <= math.factorial(len(names)):
                raise ValueError(f"orders: {len(names)} domains have {math.factorial(len(names)):,}, not {self.orders}")
            return self
        if not self.orders or len(set(self.orders)) != len(self.orders):
            raise ValueError("orders: give at least one, and each only once")
        for order in self.orders:
            if sorted(order) != sorted(names):
                listed = f"{', '.join(order)} is not an order of the plan's domains ({', '.join(names)})"
                raise ValueError(f"orders: {listed}")
        return self

    @property
    def every_method(self) -> tuple[MethodConfig, ...]:
        """The grid's methods, else the plan's."""
        return self.methods or self.plan.methods

    @property
    def every_order(self) -> tuple[tuple[str, ...], ...]:
        """The orders of the domains, random ones included; a seed with more orders begins with the same orders."""
        if not isinstance(self.orders, int):
            return self.orders
        own = tuple(domain.name for domain in self.plan.data.domains)
        orders, generator = {own: None}, random.Random(self.order_seed)
        while len(orders) < self.orders:
            orders[tuple(generator.sample(own, len(own)))] = None
        return tuple(orders)

    def rates_of(self, method: MethodConfig) -> tuple[float, ...]:
        """Return the rates a method is run at."""
        given = self.rates.get(method.label, ()) if isinstance(self.rates, dict) else self.rates
        if method.lr is not None or not given:
            return (prepare_method(method, self.plan.model, self.plan.train).lr,)
        return given

    def ranks_of(self, method: MethodConfig) -> tuple[int | None, ...]:
        """Return the ranks a method is run at; (None,) where it has none or its default is meant."""
        if not self.ranks or method.rank is not None or "rank" not in check_method(method).options:
            return (method.rank,)
        return self.ranks


@dataclass(frozen=True)
class PlannedRun:
    """One run of a grid: its settings, and the whole plan.

    `id` is a hash of the plan: the same settings have the same id in any grid. `label` and `method` are the method's,
    `rank` is None where it has none or its default is meant, `order` counts the grid's orders from 0, and `budget` is
    the number of training tokens of a domain.
    """

    id: str
    label: str
    method: str
    rank: int | None
    lr: float
    order: int
    domains: tuple[str, ...]
    seed: int
    budget: int
    plan: Plan


def plan_id(plan: Plan) -> str:
    """Return 16 hexadecimal digits for a plan. Keys at their default do not count, so a new option changes no old id.

    All others count, also keys that only decide intervals or trackers, since a run's files depend on them.
    """
    values = plan.model_dump(mode="json", exclude_defaults=True)
    values = {name: value for name, value in values.items() if value}  # a section at its defaults is empty, or absent
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def read_grid(grid: Grid | Mapping[str, Any] | str | Path, assignments: Sequence[str] = ()) -> Grid:
    """Read a grid from nested values or a YAML file and apply `--set` assignments; a `Grid` stays as it is.

    A ConfigError names an unknown key or a value of the wrong kind with its position.
    """
    if isinstance(grid, Grid):
        return grid
    origin, values = ("grid", dict(grid)) if isinstance(grid, Mapping) else (str(grid), read_values(Path(grid)))
    try:
        return Grid.model_validate(apply_overrides(values, assignments))
    except ValidationError as error:
        raise explain(error, origin, Grid) from None


def grid_yaml(grid: Grid) -> str:
    """Write a grid with all its settings and defaults as YAML, which `read_grid` reads back to the same runs."""
    values = grid.model_dump(mode="json")
    del values["plan"]["methods"]  # the grid has them, and only one of the two may have them
    values["methods"] = [method.model_dump(mode="json") for method in grid.every_method]
    return as_yaml(values)


def planned_runs(grid: Grid) -> tuple[PlannedRun, ...]:
    """Plan every run of a grid, without duplicates, in an order that begins with one seed of every method.

    ConfigError for a method that does not exist, has no such option, or cannot work on the plan's base.
    """
    plan = grid.plan
    domains = {domain.name: domain for domain in plan.data.domains}
    for method in grid.every_method:
        prepare_method(method, plan.model, plan.train)
    variants = [
        (method.model_copy(update={"rank": rank, "lr": lr}), lr)
        for method in grid.every_method
        for rank in grid.ranks_of(method)
        for lr in grid.rates_of(method)
    ]
    repeated = itertools.product(
        grid.budgets or (plan.data.train_tokens,), grid.seeds or (plan.train.seed,), enumerate(grid.every_order)
    )
    runs: dict[str, PlannedRun] = {}
    for (budget, seed, (index, order)), (method, lr) in itertools.product(repeated, variants):
        values = plan.model_dump()
        values["data"] |= {"domains": [domains[name] for name in order], "train_tokens": budget}
        values["train"] |= {"seed": seed, "lr": None}
        try:
            own = Plan.model_validate({**values, "methods": [method]})
        except ValidationError as error:  # such as a budget of less than one block
            raise explain(error, "grid", Plan) from None
        run = PlannedRun(plan_id(own), method.label, method.name, method.rank, lr, index, order, seed, budget, own)
        runs.setdefault(run.id, run)
    return tuple(runs.values())
