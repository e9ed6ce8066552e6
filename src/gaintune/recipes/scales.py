"""The three scales of a recipe: the base, texts and budgets that each brings, and what it leaves out of the paper's."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from gaintune.config import MethodConfig, Plan, TrainConfig, build_plan
from gaintune.data import CATALOGUE, SUFFIXES, advice_on
from gaintune.errors import ConfigError
from gaintune.evaluate.benchmarks import as_task
from gaintune.models import EMBEDDED
from gaintune.progress import plural
from gaintune.recipes import smoke
from gaintune.recipes.schema import Recipe, Scale, Step, laid_over
from gaintune.storage import rows_per_update

TEXTS = (".", "domains", "instruct", "glue")  # folders inside `--data` with local copies of texts
PLAN_SECTIONS = ("model", "data", "train", "evaluate", "classify")

STAND_INS = {"pubmedqa": "medical", "wikitext": "manual", "finphrase": "law", "pg19": "scripture", "medqa": "code"}
"""The embedded text that replaces a paper's domain at scale small; the other domains of the Hub have none."""

BUDGETS: dict[Scale, dict[str, dict[str, Any]]] = {
    # 200K tokens, 200 steps an epoch, 5 epochs (GAIN, section 4): 4 blocks of 250 tokens a step
    "paper": {
        "data": {"train_tokens": 200_000, "validation_tokens": 51_200, "block_size": 250},
        "train": {"batch_size": 4, "gradient_accumulation": 1, "epochs": 5},
    },
    "small": {"data": {"train_tokens": 4096, "validation_tokens": 1024, "block_size": 256}, "train": {"batch_size": 2}},
    "smoke": {
        "data": {"train_tokens": 256, "validation_tokens": 128, "block_size": 32},
        "train": {"batch_size": 4, "epochs": 1},
        "evaluate": {"bootstrap_samples": 50},
        "model": {"dtype": "fp32", "device": "cpu"},
    },
}

Domain = str | Mapping[str, Any]  # a name, or a mapping with `name`


@dataclass(frozen=True)
class ScaleSetup:
    """Base, texts and budgets of one run of a recipe.

    Attributes:
        scale: paper, small or smoke.
        model: Hub id, folder or name of the base.
        data: folder of local copies, with a file or folder for each name that a recipe uses; None for none.
        overrides: nested plan values laid over everything, from the command line.
    """

    scale: Scale
    model: str
    data: Path | None
    overrides: Mapping[str, Any]

    @classmethod
    def make(
        cls, scale: Scale, model: str, data: Path | None, overrides: Mapping[str, Any], scratch: Path
    ) -> ScaleSetup:
        """Set up a scale for the paper's model; a smoke run's base and texts are written to `scratch`.

        Raises:
            ConfigError: the folder of local copies does not exist.
        """
        if data is not None and not data.is_dir():
            raise ConfigError(f"--data {data}: no such folder; it holds local copies under the papers' names")
        if scale == "smoke":
            return cls(scale, str(smoke.base(scratch / "base")), smoke.texts(scratch / "data"), overrides)
        return cls(scale, "demo" if scale == "small" else model, data, overrides)

    def plan(self, settings: Mapping[str, Any], *, origin: str) -> Plan:
        """Build a plan from a step's settings: `domains`, `watched`, `methods`, and sections of a plan.

        Raises:
            ConfigError: an unknown key, a value that a plan refuses, or a domain that has no source.
        """
        known = ("base", "domains", "watched", "methods", *PLAN_SECTIONS)
        if unknown := [key for key in settings if key not in known]:
            raise ConfigError(f"{origin}: unknown key {unknown[0]!r}; known keys: {', '.join(known)}")
        listed = {key: settings[key] for key in ("domains", "watched") if key in settings}
        for name in (name for domains in listed.values() for name in self.missing(domains) if name not in CATALOGUE):
            raise ConfigError(
                f"{origin}: domain {name!r} is no name of the catalogue, and has no source; {advice_on(name)}"
            )
        data = {key: self.domains(domains) for key, domains in listed.items()}
        if not data.get("domains"):
            raise ConfigError(f"{origin}: none of its domains has a text; give --data FOLDER with local copies")
        values: dict[str, Any] = {"model": {"name": self.base(settings.get("base"))}}
        sections = {key: settings[key] for key in PLAN_SECTIONS if key in settings}
        methods = {"methods": settings["methods"]} if "methods" in settings else {}
        for over in (BUDGETS[self.scale], sections, {"data": data}, methods):
            values = laid_over(values, over)
        if self.scale == "paper":
            values = self.with_fixed_updates(values)
        else:  # a step's quantization is for the paper's large models
            values["model"].pop("quantization", None)
        values = laid_over(values, dict(self.overrides))
        return build_plan(values, origin)

    def with_fixed_updates(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return a plan's values with `train.effective_batch`, the rows of an update, set from their own batch.

        Then neither another batch on a device nor more processes change these rows. Overrides may give others.
        """
        train, given = values.get("train", {}), self.overrides.get("train", {})
        if not isinstance(given, Mapping) or {"gradient_accumulation", "effective_batch"} & {*given}:
            return dict(values)
        default = TrainConfig.model_fields
        batch, added = (train.get(key, default[key].default) for key in ("batch_size", "gradient_accumulation"))
        kept = {key: value for key, value in train.items() if key != "gradient_accumulation"}
        return {**values, "train": {**kept, "effective_batch": batch * added}}

    @property
    def benchmarks(self) -> list[str]:
        """Folders of local copies that may hold rows of benchmarks."""
        folders = [self.data / name for name in ("benchmarks", "instruct", ".", "domains")] if self.data else []
        return [str(folder) for folder in folders if folder.is_dir()]

    def base(self, model: str | None) -> str:
        """Return the base of a step: the recipe's, unless the step names another that this scale has."""
        if model is None or (self.scale == "small" and model not in EMBEDDED):
            return self.model
        if self.scale != "smoke":
            return model
        seed = zlib.crc32(model.encode())  # each is another model
        return str(smoke.base(Path(self.model).with_name(model.replace("/", "-")), seed))

    def domains(self, domains: Sequence[Domain]) -> list[dict[str, Any]]:
        """Return a plan's entries for the papers' domains, without those that have no text here (`missing`)."""
        return [entry for entry in map(self._domain, domains) if entry is not None]

    def missing(self, domains: Sequence[Domain]) -> list[str]:
        """Return the names of the domains that have no text here."""
        return [d if isinstance(d, str) else str(d["name"]) for d in domains if self._domain(d) is None]

    def why_not(self, settings: Mapping[str, Any]) -> str | None:
        """Say why a step cannot train or measure anything at this scale; None where it can."""
        if self.scale == "small" and settings.get("base") not in (None, *EMBEDDED):
            return f"left out: scale small has the embedded bases alone, and this step asks for {settings['base']}"
        domains = settings.get("domains", ())
        if self.scale == "small" and not self.domains(domains):
            missing = ", ".join(self.missing(domains))
            return f"left out: there is no text for {missing}; give --data FOLDER with a local copy"
        return None

    def text_notes(self, settings: Mapping[str, Any]) -> tuple[str, ...]:
        """Say which of the paper's domains have no text here, and which have another one."""
        domains = [*settings.get("domains", ()), *settings.get("watched", ())]
        missing = ", ".join(self.missing(domains))
        entries = self.domains(domains) if self.scale == "small" else []
        stand_ins = [f"{e['name']} is {e['source']}" for e in entries if e["source"] == STAND_INS.get(e["name"])]
        notes = [f"left out for want of a text (give --data FOLDER): {missing}"] if missing else []
        return (*notes, f"embedded texts stand in: {', '.join(stand_ins)}") if stand_ins else tuple(notes)

    def _domain(self, domain: Domain) -> dict[str, Any] | None:
        values = {"name": domain} if isinstance(domain, str) else dict(domain)
        name = values["name"]
        rows = any(key.endswith("_column") for key in values)  # those of a benchmark are a text where a column is named
        folders = (*TEXTS, "benchmarks") if rows else TEXTS
        embedded = name if name in CATALOGUE and CATALOGUE[name].hub is None else None
        unknown = {"paper": name, "small": STAND_INS.get(name, embedded), "smoke": None}[self.scale]
        source = values.get("source") or next(iter(self.local(name, folders)), unknown)
        if source in CATALOGUE:  # it brings its own columns
            values = {key: value for key, value in values.items() if not key.endswith("_column")}
        return None if source is None else {**values, "source": str(source)}

    def local(self, name: str, folders: Sequence[str], suffixes: Sequence[str] = SUFFIXES) -> list[Path]:
        """Return the local copies of a name, folder by folder: a folder or file of that name, or with a suffix."""
        if self.data is None:
            return []
        paths = [self.data / folder / f"{name}{suffix}" for folder in folders for suffix in ("", *suffixes)]
        return [path for path in paths if path.exists()]


LISTS = ("methods", "domains", "watched", "texts", "tasks", "target", "ranks", "rates", "seeds", "components", "ask")
"""Settings that list what an experiment compares; budgets are none of them."""

TRAINING = ("sequence", "separately", "sweep", "answers")
"""Kinds of steps that train on the budget of a plan."""


def stem_of(label: str) -> str:
    """Return a label without its rate: `lora` of `lora-lr0.001`."""
    return label.partition("-lr")[0]


def names_in(settings: Mapping[str, Any], key: str) -> list[str]:
    """Return the names that a setting lists."""
    value = settings.get(key, ())
    if isinstance(value, Mapping) and key == "rates":
        return [f"{label} at {rate:g}" for label, rates in value.items() for rate in rates]
    entries = [value] if isinstance(value, str | int | float | Mapping) else value
    if key == "methods":
        return [str(MethodConfig.model_validate(entry).label) for entry in entries]
    if key in ("tasks", "target"):
        entries = map(as_task, entries)
    return [str(entry["name"] if isinstance(entry, Mapping) else entry) for entry in entries]


def _listed(settings: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return all names that settings list, once each; methods without their rates."""
    names = {key: names_in(settings, key) for key in LISTS}
    return {key: list(dict.fromkeys(map(stem_of, names[key]) if key == "methods" else names[key])) for key in LISTS}


def dropped(recipe: Recipe, step: Step, scale: Scale) -> dict[str, list[str]]:
    """Return, by setting, the names that a step has at scale paper and not at this one; methods without rates."""
    paper, here = _listed(recipe.settings(step, "paper")), _listed(recipe.settings(step, scale))
    gone = {key: [name for name in paper[key] if name not in here[key]] for key in LISTS}
    return {key: names for key, names in gone.items() if names}


def note_of(recipe: Recipe, step: Step, scale: Scale) -> tuple[str, ...]:
    """Say which names a scale leaves out of a step, which it has instead, and which it adds."""
    at_paper, at_scale = recipe.settings(step, "paper"), recipe.settings(step, scale)
    paper, here, gone = _listed(at_paper), _listed(at_scale), dropped(recipe, step, scale)
    left_out, added = [], []
    for key in LISTS:
        new = ", ".join(name for name in here[key] if name not in paper[key])
        if key in gone:
            left_out.append(f"{key} {', '.join(gone[key])}" + (f" ({new} instead)" if new else ""))
        elif new and key != "methods":
            added.append(f"{key} {new}")
    notes = [f"at scale {scale} left out: {'; '.join(left_out)}"] if left_out else []
    notes += [f"at scale {scale} also: {'; '.join(added)}"] if added else []
    before, after = _rates_by_method(at_paper), _rates_by_method(at_scale)
    other = [label for stem in before if before[stem] != after.get(stem) for label in after.get(stem, ())]
    return (*notes, f"at scale {scale} other rates: {', '.join(other)}") if other else tuple(notes)


def _rates_by_method(settings: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the labels that name a rate, by their method."""
    labels = names_in(settings, "methods")
    stems = dict.fromkeys(stem_of(label) for label in labels if stem_of(label) != label)
    return {stem: [label for label in labels if stem_of(label) == stem != label] for stem in stems}


def budget_note(recipe: Recipe, step: Step, scale: Scale, plan: Plan) -> tuple[str, ...]:
    """Say what a step trains on here, and what it would train on at scale paper."""
    if scale == "paper" or step.do not in TRAINING:
        return ()
    here = plan.model_dump(mode="json", include={"data", "train"})
    settings = recipe.settings(step, "paper")
    given = {key: settings[key] for key in here if key in settings}
    paper = laid_over(here, laid_over(BUDGETS["paper"], given))
    texts_alone = {plan.data.task_of(domain) for domain in plan.data.domains} == {"text"}
    exact = texts_alone and not plan.data.stream and not any(method.replay for method in plan.methods)
    own, papers = _budget(here, exact), _budget(paper, exact)
    return (f"trained here: {own}" + ("" if own == papers else f"; at scale paper: {papers}"),)


def _budget(sections: Mapping[str, Any], exact: bool) -> str:
    """Say what a domain's training takes; its updates are `exact` where its rows are full blocks of its own text."""
    data, train = sections["data"], sections["train"]
    batch = rows_per_update(train) or 1
    updates = ceil(data["train_tokens"] // data["block_size"] / batch) * train["epochs"]
    return (
        f"{data['train_tokens']:,} tokens a domain in blocks of {data['block_size']:,}, {batch} a batch, "
        f"{plural(train['epochs'], 'epoch')} ({'' if exact else 'about '}{plural(updates, 'update')} a domain)"
    )
