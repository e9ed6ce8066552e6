"""What a scale gives a recipe: a base, texts under the papers' names, and budgets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gaintune.config import Plan, build_plan
from gaintune.data import CATALOGUE, ROW_SUFFIXES, SUFFIXES, advice_on, holds_questions
from gaintune.errors import ConfigError
from gaintune.recipes import smoke
from gaintune.recipes.schema import Scale, laid_over
from gaintune.storage import sha256_file

TEXTS = (".", "domains", "instruct", "glue")
"""Where local copies of texts are looked for, inside the folder of `--data`."""

PLAN_SECTIONS = ("model", "data", "train", "evaluate", "classify")

STAND_INS = {"pubmedqa": "medical", "wikitext": "manual", "finphrase": "law", "pg19": "scripture", "medqa": "code"}
"""The embedded text that takes a paper's domain's place at scale small; the other domains have none."""

BUDGETS: dict[Scale, dict[str, dict[str, Any]]] = {
    # 200K tokens, 200 steps an epoch, 5 epochs (GAIN, section 4): 4 blocks of 250 tokens a step
    "paper": {
        "data": {"train_tokens": 200_000, "validation_tokens": 51_200, "block_size": 250},
        "train": {"batch_size": 4, "epochs": 5},
    },
    "small": {
        "data": {"train_tokens": 4_096, "validation_tokens": 1_024, "block_size": 256},
        "train": {"batch_size": 2},
    },
    "smoke": {
        "data": {"train_tokens": 256, "validation_tokens": 128, "block_size": 32},
        "train": {"batch_size": 4, "epochs": 1},
        "evaluate": {"bootstrap_samples": 50},
        "model": {"dtype": "fp32", "device": "cpu"},
    },
}


@dataclass(frozen=True)
class World:
    """Base, texts and budgets of one run of a recipe.

    Attributes:
        scale: which one.
        model: Hub id, folder or name of the base.
        data: folder of local copies, holding a file or folder for each name that a recipe uses; None for none.
        overrides: nested plan values laid over everything, from the command line.
    """

    scale: Scale
    model: str
    data: Path | None
    overrides: Mapping[str, Any]

    def plan(self, settings: Mapping[str, Any], *, origin: str) -> Plan:
        """A plan from a step's settings: `domains`, `watched`, `methods`, and sections of a plan.

        Raises:
            ConfigError: a key that is none of these, a value that a plan refuses, or a domain that is not to be had.
        """
        known = ("base", "domains", "watched", "methods", *PLAN_SECTIONS)
        if unknown := [key for key in settings if key not in known]:
            raise ConfigError(f"{origin}: unknown key {unknown[0]!r}; known keys: {', '.join(known)}")
        values: dict[str, Any] = {"model": {"name": self.base(settings.get("base"))}}
        for over in (BUDGETS[self.scale], {key: settings[key] for key in PLAN_SECTIONS if key in settings}):
            values = laid_over(values, dict(over))
        asked = {key: settings[key] for key in ("domains", "watched") if key in settings}
        for name in (each for names in asked.values() for each in self.missing(names) if each not in CATALOGUE):
            raise ConfigError(
                f"{origin}: domain {name!r} is no name of the catalogue, and has no source; {advice_on(name)}"
            )
        named = {key: self.domains(names) for key, names in asked.items()}
        if not named.get("domains"):
            raise ConfigError(f"{origin}: none of its domains is to be had; give --data FOLDER with local copies")
        values = laid_over(values, {"data": named})
        if "methods" in settings:
            values["methods"] = settings["methods"]
        return build_plan(laid_over(values, dict(self.overrides)), origin)

    @property
    def benchmarks(self) -> list[Path] | None:
        """Folders of local copies that may hold rows of benchmarks; None where there are no local copies."""
        if self.data is None:
            return None
        places = (self.data / "benchmarks", self.data / "instruct", self.data, self.data / "domains")
        return [each for each in places if each.is_dir()]

    def has_base(self, asked: str | None) -> bool:
        """Whether there is a base for another of the paper's models; scale small has one base alone."""
        return asked is None or self.scale != "small"

    def base(self, asked: str | None) -> str:
        """The base for a step that asks for another model than the recipe's."""
        if asked is None or self.scale == "small":
            return self.model
        return (
            asked if self.scale == "paper" else str(smoke.base(Path(self.model).with_name(asked.replace("/", "-")), 1))
        )

    def domains(self, names: Sequence[str | Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The domains of a plan for the papers' names; those that have no text here are left out (`missing`)."""
        found = (self._domain(name) for name in names)
        return [domain for domain in found if domain is not None]

    def missing(self, names: Sequence[str | Mapping[str, Any]]) -> list[str]:
        """Which names have no text here."""
        return [_name_of(name) for name in names if self._domain(name) is None]

    def _domain(self, asked: str | Mapping[str, Any]) -> dict[str, Any] | None:
        values = {"name": asked} if isinstance(asked, str) else dict(asked)
        name = str(values["name"])
        source = values.get("source") or self._source(name)
        if source in CATALOGUE:  # it brings its own columns
            values = {key: value for key, value in values.items() if not key.endswith("_column")}
        return None if source is None else {**values, "source": str(source)}

    def _source(self, name: str) -> str | Path | None:
        if local := self.local(name, TEXTS):
            return local[0]
        if self.scale == "paper":
            return name
        return STAND_INS.get(name) if self.scale == "small" else None

    def local(self, name: str, folders: Sequence[str], suffixes: Sequence[str] = SUFFIXES) -> list[Path]:
        """Local copies of that name, the likeliest first: in each folder a folder or file called so, or a file with
        one of the suffixes; none where there are no local copies."""
        if self.data is None:
            return []
        names = (name, *(f"{name}{suffix}" for suffix in suffixes))
        found = [self.data / folder / each for folder in folders for each in names]
        return [place for place in found if place.exists()]


def _name_of(asked: str | Mapping[str, Any]) -> str:
    return asked if isinstance(asked, str) else str(asked["name"])


def world_of(scale: Scale, model: str, data: Path | None, overrides: Mapping[str, Any], scratch: Path) -> World:
    """The world of a scale; a smoke run's is made in `scratch`.

    Args:
        scale: paper, small or smoke.
        model: the paper's model.
        data: folder of local copies, or None.
        overrides: nested plan values laid over everything.
        scratch: where a smoke run's model and texts are put.

    Raises:
        ConfigError: a folder of local copies that is not there.
    """
    if data is not None and not data.is_dir():
        raise ConfigError(f"--data {data}: no such folder; it holds local copies under the papers' names")
    if scale == "smoke":
        return World(scale, str(smoke.base(scratch / "base")), smoke.texts(scratch / "data"), overrides)
    return World(scale, "demo" if scale == "small" else model, data, overrides)


LABELLED = ("glue", ".", "domains")
QUESTIONS = ("questions", "benchmarks", ".", "domains", "glue")


def labelled_rows(world: World, task: str) -> str | None:
    """The source of a classification task: its local copy, at scale paper else its name on the Hub; None for none."""
    local = next(iter(world.local(task, LABELLED, ROW_SUFFIXES)), None)
    return str(local) if local is not None else task if world.scale == "paper" else None


def content_of(place: Path) -> dict[str, str]:
    """A hash of every file of a local copy, by its place inside."""
    files = [place] if place.is_file() else [file for file in sorted(place.rglob("*")) if file.is_file()]
    return {file.relative_to(place).as_posix(): sha256_file(file) for file in files}


def questions(world: World, name: str) -> Path | None:
    """The local copy of a set of questions: the first file or folder of its name that holds questions."""
    return next(filter(holds_questions, world.local(name, QUESTIONS, ROW_SUFFIXES)), None)
