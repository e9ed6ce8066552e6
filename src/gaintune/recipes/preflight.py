"""Look at the Hub and the disk before a recipe begins: what it reads from there, and what stands in its way."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gaintune.config import ModelConfig, as_domain, as_list
from gaintune.data import CATALOGUE, GLUE, QUESTION_SETS, ROW_SUFFIXES
from gaintune.errors import AssetError, ConfigError
from gaintune.evaluate.benchmarks import LocalCopies, as_task, hub_data_sets, offline_task
from gaintune.models import EMBEDDED, downloaded_files, is_cached, is_hub_id
from gaintune.recipes.scales import ScaleSetup, names_in
from gaintune.recipes.schema import Recipe, Step
from gaintune.recipes.steps.answers import local_questions
from gaintune.recipes.steps.classify import FOLDERS
from gaintune.storage import check_terms

logger = logging.getLogger(__name__)

SECONDS = 20.0  # the longest wait for one answer of the Hub
ROW_FILES = (".parquet", ".json", ".jsonl", ".csv", ".txt", ".arrow", ".gz", ".zst", ".zip")  # of a data set
COPIES = 2  # a data set lies on the disk as its files and, for reading, as Arrow
FULL_WEIGHTS, FULL_CHECKPOINT = 4, 12  # bytes a parameter: fp32 weights, and these with AdamW's two moments


@dataclass(frozen=True)
class HubNeed:
    """A repository of the Hub that a recipe reads.

    Attributes:
        instead: advice on what to give in its place.
        model: settings of a base; None for a data set.
        configuration: of a data set; None for its only one.
        kept: whether its files stay on the disk, where others are read while they are downloaded.
        spare: whether the embedded package can take its place.
    """

    name: str
    instead: str
    model: ModelConfig | None = None
    configuration: str | None = None
    kept: bool = True
    spare: bool = False

    @property
    def kind(self) -> Literal["model", "dataset"]:
        """The kind of repository, as the Hub's client names it."""
        return "dataset" if self.model is None else "model"

    @property
    def address(self) -> str:
        """The page of the repository."""
        from huggingface_hub import constants

        return f"{constants.ENDPOINT}/{'datasets/' if self.model is None else ''}{self.name}"


def check_hub(recipe: Recipe, setup: ScaleSetup, folder: Path) -> list[str]:
    """Check that a recipe can read all it needs from the Hub, and has room on the disk; download nothing.

    Returns:
        A line for each repository, with what is left to download.

    Raises:
        ConfigError: repositories that are gated or missing, all of them in one message, or too little room on the disk.
        AssetError: the Hub is not reached, and its cache lacks something.
        TermsError: terms of an embedded base are not accepted yet.
    """
    run = [step for step in recipe.steps if not setup.why_not(recipe.settings(step, setup.scale))]
    for model in (_model_of(recipe, step, setup) for step in run):
        if model is not None and model.name in EMBEDDED:
            check_terms(EMBEDDED[model.name])
    needs = hub_needs(recipe, setup)
    answers: dict[tuple[str, str], Any] = {}  # by kind and name: a data set has many configurations
    refused: dict[str, None] = {}
    absent: dict[str, None] = {}
    for need in needs:
        key, reached = (need.kind, need.name), None not in answers.values()
        if key not in answers:  # a Hub that was not reached once is not waited for again
            answers[key] = _information(need) if reached else None
        if isinstance(answers[key], str) and not need.spare:
            refused[f"{answers[key]}, or {need.instead}"] = None
        elif answers[key] is None and not need.spare and not _cached(need):
            absent[f"{need.kind} {need.name}: {need.instead}"] = None
    if refused:
        raise ConfigError("\n  ".join([f"recipe {recipe.id} cannot read all it needs from the Hub:", *refused]))
    if absent:
        head = f"recipe {recipe.id}: the Hub is not reached (check the network, and HF_HUB_OFFLINE); not in its cache:"
        raise AssetError("\n  ".join([head, *absent]))
    known = {key: answer for key, answer in answers.items() if answer is not None and not isinstance(answer, str)}
    sizes: dict[str, int] = {}
    for name, kind, configuration, kept in dict.fromkeys((n.name, n.kind, n.configuration, n.kept) for n in needs):
        if (kind, name) in known:
            size = _bytes_to_download(known[kind, name], kind, name, configuration) if kept else 0
            sizes[f"{kind} {name}"] = sizes.get(f"{kind} {name}", 0) + size
    written = _full_weights(recipe, setup, known)
    _check_space(recipe, sizes, written, folder)
    lines = [f"{what}: {size / 1e9:.2f} GB to download" for what, size in sizes.items()]
    return [*lines, f"weights of full fine-tuning: {written / 1e9:.2f} GB"] if written else lines


def hub_needs(recipe: Recipe, setup: ScaleSetup) -> list[HubNeed]:
    """Return what the steps of a recipe read from the Hub, once each.

    Raises:
        ConfigError: settings of a step that its plan refuses, or a benchmark that lm-eval does not know.
    """
    needs = (need for step in recipe.steps for need in _needs_of(recipe, step, setup))
    return list(dict.fromkeys(needs))


def _needs_of(recipe: Recipe, step: Step, setup: ScaleSetup) -> Iterator[HubNeed]:
    settings = recipe.settings(step, setup.scale)
    if setup.why_not(settings):
        return
    model = _model_of(recipe, step, setup)
    if model is not None and is_hub_id(model.name):
        yield HubNeed(model.name, "give a local folder: --set model.name=FOLDER", model)
    for domain in (domain for domains in _texts_of(settings, step, setup).values() for domain in domains):
        source = CATALOGUE[domain["source"]].hub if domain["source"] in CATALOGUE else None
        if source is not None:
            yield HubNeed(
                source.path, _copy(domain["name"]), configuration=source.configuration, kept=not source.streaming
            )
    if setup.scale != "paper":  # elsewhere a step without rows is left out
        return
    sources = []
    if step.do == "classify":
        sources = [
            (name, GLUE.get(name))
            for name in names_in(settings, "tasks")
            if not setup.local(name, FOLDERS, ROW_SUFFIXES)
        ]
    elif step.do == "answers":
        names = [settings.get("learn"), *settings.get("ask", ())]
        sources = [(name, QUESTION_SETS.get(name)) for name in names if name and local_questions(setup, name) is None]
    else:
        yield from _benchmarks([*settings.get("target", ()), *settings.get("tasks", ())], setup)
    for name, source in sources:
        if source is not None:
            yield HubNeed(source.path, _copy(name), configuration=source.configuration)


def _texts_of(settings: Mapping[str, Any], step: Step, setup: ScaleSetup) -> dict[str, list[dict[str, Any]]]:
    """Return a plan's entries for the texts of a step; those that `--set` gives replace the recipe's."""
    overrides = [over.get("data") for over in (setup.overrides, setup.overrides.get(step.name, {}))]
    given = {key: value for over in overrides if isinstance(over, Mapping) for key, value in over.items()}
    texts = {key: setup.domains(settings.get(key, ())) for key in ("domains", "watched", "texts")}
    for key in ("domains", "watched") if "domains" in settings else ():
        if key in given:
            texts[key] = [as_domain(domain) for domain in as_list(given[key])]
    return texts


def _model_of(recipe: Recipe, step: Step, setup: ScaleSetup) -> ModelConfig | None:
    """Return the base of a step that brings one; a step on another's adapters has that step's."""
    settings = recipe.settings(step, setup.scale)
    if recipe.model == "none" or "of" in settings:
        return None
    named: dict[str, Any] = {"name": setup.base(settings.get("base"))}
    own = setup.overrides.get(step.name, {})
    for over in (settings.get("model"), setup.overrides.get("model"), own.get("model")):  # its plan checks other keys
        named |= {key: str(over[key]) for key in ("name", "revision") if isinstance(over, Mapping) and over.get(key)}
    return ModelConfig(**named)


def _benchmarks(tasks: Sequence[Any], setup: ScaleSetup) -> Iterator[HubNeed]:
    copies = LocalCopies.of(setup.benchmarks)
    for name in (as_task(task)["name"] for task in tasks):
        offline = offline_task(name)
        if offline is not None and copies.find(offline):
            continue
        spare = offline is not None and offline.embedded is not None
        instead = f"leave the benchmark {name} out" if offline is None else _copy(name)
        for path, configuration in sorted(hub_data_sets(name), key=str):
            yield HubNeed(path, instead, configuration=configuration, spare=spare)


def _copy(name: str) -> str:
    return f"give --data FOLDER with a local copy called {name}"


def _information(need: HubNeed) -> Any:
    """Return the Hub's information on a repository, a message if it is gated or missing, or None without a Hub."""
    from huggingface_hub import HfApi
    from huggingface_hub import errors as hub

    api, what = HfApi(), f"{need.kind} {need.name}"
    revision = None if need.model is None else need.model.revision
    try:
        options: dict[str, Any] = {"repo_type": need.kind, "revision": revision, "timeout": SECONDS}
        information = api.repo_info(need.name, files_metadata=True, **options)
        if information.gated:  # anybody may look it up, but not download it
            api.auth_check(need.name, repo_type=need.kind)
        return information
    except hub.GatedRepoError:
        return f"{what} is gated: accept its license at {need.address} and run `hf auth login`"
    except hub.RevisionNotFoundError:
        return f"{what} has no revision {revision!r}: correct model.revision"
    except (hub.RepositoryNotFoundError, hub.HFValidationError):
        return f"{what} is not on the Hub, or not for you to see: check {need.address}, run `hf auth login`"
    except Exception as error:  # the hub's client lets errors of two HTTP libraries through
        logger.debug("no answer about %s: %s", what, type(error).__name__)
        return None


def _cached(need: HubNeed) -> bool:
    """Return whether the Hub's cache holds what a recipe needs of a repository."""
    if need.model is not None:
        return is_cached(need.model)
    from datasets import load_dataset_builder

    try:
        load_dataset_builder(need.name, need.configuration)
    except Exception:  # of the same HTTP libraries, and of `datasets`
        return False
    return need.kept


def _bytes_to_download(information: Any, kind: str, name: str, configuration: str | None) -> int:
    """Return how many bytes of a repository go onto the disk and are not there yet."""
    from huggingface_hub import try_to_load_from_cache

    sizes = {file.rfilename: file.size or 0 for file in information.siblings or ()}
    if kind == "model":
        wanted, copies = downloaded_files(list(sizes)), 1
    else:
        rows = [file for file in sizes if file.endswith(ROW_FILES)]
        wanted, copies = [file for file in rows if configuration in Path(file).parts[:-1]] or rows, COPIES
    options: dict[str, Any] = {"repo_type": kind, "revision": information.sha}
    return sum(
        copies * sizes[file] for file in wanted if not isinstance(try_to_load_from_cache(name, file, **options), str)
    )


def _full_weights(recipe: Recipe, setup: ScaleSetup, known: Mapping[tuple[str, str], Any]) -> int:
    """Return how many bytes full fine-tuning keeps: the weights after each stage, and its largest checkpoint."""
    kept = largest = 0
    for step in recipe.steps:
        settings, model = recipe.settings(step, setup.scale), _model_of(recipe, step, setup)
        weights = None if model is None else getattr(known.get(("model", model.name)), "safetensors", None)
        fulls = sum(
            (method if isinstance(method, str) else method.get("name")) == "full"
            for method in settings.get("methods", ())
        )
        if fulls and weights and step.do in ("sequence", "separately", "answers", "classify"):
            stages = len(_texts_of(settings, step, setup)["domains"]) or len(settings.get("tasks", ())) or 1
            kept += fulls * stages * len(settings.get("seeds", (0,))) * weights.total * FULL_WEIGHTS
            largest = max(largest, weights.total * FULL_CHECKPOINT)
    return kept + largest


def _check_space(recipe: Recipe, sizes: Mapping[str, int], written: int, folder: Path) -> None:
    """Refuse to begin where a disk has too little room for the downloads and the run."""
    from huggingface_hub import constants

    disks: dict[int, tuple[Path, list[tuple[str, int]]]] = {}
    parts = [(Path(constants.HF_HUB_CACHE), what, size) for what, size in sizes.items()]
    for path, what, size in (*parts, (folder, "weights of full fine-tuning", written)):
        there = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
        disks.setdefault(there.stat().st_dev, (there, []))[1].append((what, size))
    for path, shares in disks.values():
        needed, free = sum(size for _, size in shares), shutil.disk_usage(path).free
        if needed > free:
            largest = sorted(shares, key=lambda share: -share[1])[:5]
            listed = ", ".join(f"{what} {size / 1e9:.2f} GB" for what, size in largest if size)
            raise ConfigError(
                f"recipe {recipe.id} needs {needed / 1e9:.2f} GB on the disk of {path}, which has {free / 1e9:.2f} GB "
                f"left ({listed}); nothing was downloaded. Free some, or move the cache (HF_HOME) or the run"
            )
