"""Steps that ask benchmarks of what others trained: scores, paired differences, the rate picked by a target."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from gaintune.config import Plan
from gaintune.data import ROW_SUFFIXES, read_table, split_files
from gaintune.errors import AssetError, ConfigError, DataError, one_line
from gaintune.evaluate.benchmarks import (
    BenchmarkConfig,
    BenchmarkReport,
    BenchmarkScore,
    BenchmarkTask,
    Places,
    as_task,
    base_of,
    benchmark_adapters,
    counting_score,
    load_suite,
    mean_difference,
    offline_task,
    read_config,
)
from gaintune.recipes.differences import stem_of
from gaintune.recipes.outcome import Context, Outcome, last_of_each
from gaintune.recipes.world import World
from gaintune.report import NONE, with_interval
from gaintune.results import Interval
from gaintune.storage import cache_dir, write_json

CONFIG = ("fewshot", "limit", "batch_size", "generated_tokens", "seed")
OF_BENCHMARKS = ("benchmarks", "instruct")
"""Folders of local copies that hold rows, where the others hold texts too."""
RUNS_CODE = ("humaneval",)
BY_TEXT = "of several rates the one that improves the learnt domain's held-out text most counts"
BY_TARGET = (
    "of several rates the one with the best target counts: it is chosen and judged on the same rows, so that its "
    "target is flattered, the more so the more rates there are"
)


def benchmarks(settings: dict[str, Any], context: Context) -> Outcome:
    """`gaintune evaluate --benchmarks` for the adapters of the step `of`, each against its base.

    Settings: `of`; `labels` and `after` pick adapters; `tasks`, and `target` for those that the training was for; those
    of a `BenchmarkConfig`; `pick`, target or in_domain, for labels such as lora-lr0.001, of which the one that is best
    on the target's benchmarks, or on the text that was learnt, stands for lora. Numbers, in points of % against the
    base: `LABEL.TASK`; `LABEL.kept` and `LABEL.target`, means over tasks; `A-minus-B.kept` and so on, paired row by
    row. Scores, in %: `LABEL.TASK.score`, `base.TASK.score`.
    """
    trained, plan = context.trained(settings)
    adapters = last_of_each(trained, settings.pop("labels", None), settings.pop("after", None))
    target, tasks, pick = settings.pop("target", []), settings.pop("tasks", []), take_pick(settings, context)
    config, missing = asked_config(settings, [*target, *tasks], plan, context)
    notes = tuple(f"left out, {name}: {why}" for name, why in missing.items())
    if config is None:
        return Outcome(notes=notes, left_out=True)
    names, wanted = [task.name for task in config.tasks], [as_task(each)["name"] for each in target]
    groups = {"target": [name for name in names if name in wanted]}
    groups["kept"] = [name for name in names if name not in wanted]
    model, cache = plan.model, cache_dir() / "benchmarks"

    def asked(labels: Iterable[str], about: BenchmarkConfig, file: str) -> _Found:
        folders = {label: adapters[label] for label in labels}
        report = benchmark_adapters(model, folders, about, cache=cache, progress=context.progress)
        write_json(context.folder / file, report.to_dict())
        there = [task.name for task in about.tasks]
        members = {key: [name for name in group if name in there] for key, group in groups.items()}
        return _Found(report, there, {key: group for key, group in members.items() if group}, about)

    picked = {label: label for label in adapters}
    if pick == "in_domain":
        notes += (BY_TEXT,)
        picked = _best(adapters, lambda label: -trained.numbers[f"{label}.in_domain"].value)
    elif pick == "target" and groups["target"]:
        notes += (BY_TARGET,)
        of_target = config.model_copy(update={"tasks": tuple(task for task in config.tasks if task.name in wanted)})
        choosing = asked(adapters, of_target, "choosing.json")  # of what is not picked no other question is asked
        picked = _best(adapters, lambda label: choosing.mean(label, "target"))
        notes += tuple(f"{label}: {choosing.mean(label, 'target'):.1f} % of the target" for label in adapters)
    elif pick == "target":
        why = "none of the target's benchmarks is to be had, so that none can be picked by them"
        return Outcome(notes=(*notes, f"left out: {why}"), left_out=True)
    found = asked(picked.values(), config, "benchmarks.json")
    found.rename({label: stem for stem, label in picked.items()})
    labels = list(picked)
    notes += tuple(f"{stem} is {label}, the best by {pick}" for stem, label in picked.items() if stem != label)
    numbers = found.numbers(labels)
    without = {f"{label}.{name}": why for label in labels for name, why in missing.items()}
    for key, asked in (("target", target), ("kept", tasks)):
        if asked and not groups[key]:
            without |= {f"{label}.{key}": "none of its benchmarks is to be had" for label in labels}
            without |= {f"{one}-minus-{other}.{key}": "likewise" for one in labels for other in labels if one != other}
    return Outcome(
        numbers,
        {"Benchmarks, intervals over rows": found.table(labels)},
        notes=(*notes, *found.about()),
        without=without,
    )


def asked_config(
    settings: dict[str, Any], tasks: Sequence[Any], plan: Plan, context: Context
) -> tuple[BenchmarkConfig | None, dict[str, str]]:
    """What is asked, and the tasks that this scale has no rows for, each with the reason."""
    given = {key: settings.pop(key) for key in CONFIG if key in settings}
    context.refuse_unknown(settings)
    world, uncertainty = context.world, plan.evaluate
    local = world.benchmarks
    common: dict[str, Any] = {
        "batch_size": uncertainty.batch_size,
        "bootstrap_samples": uncertainty.bootstrap_samples,
        "confidence": uncertainty.confidence,
        "bootstrap_seed": uncertainty.seed,
        "allow_code_execution": context.allow_code_execution,
        "data": [] if local is None else [str(each) for each in local],
        "source": "local" if world.scale == "smoke" else "auto",
        **given,
    }
    kept: list[dict[str, Any]] = []
    missing: dict[str, str] = {}
    for task in tasks:
        asked = BenchmarkTask.model_validate(as_task(task))
        if asked.name in RUNS_CODE and not context.allow_code_execution and world.scale != "paper":
            missing[asked.name] = "it runs what the model writes: give --allow-code-execution"
            continue
        try:
            load_suite(read_config({**common, "tasks": [asked.model_dump()]}))
        except (AssetError, DataError) as error:
            if world.scale == "paper" or (isinstance(error, DataError) and not _is_a_text(asked.name, world)):
                raise
            missing[asked.name] = f"no rows ({one_line(error)[:160]})"
            continue
        kept.append(asked.model_dump())
    return (read_config({**common, "tasks": kept}) if kept else None), missing


def _is_a_text(name: str, world: World) -> bool:
    """Whether what lies under a benchmark's name is a domain's text, which may be called the same, and no broken rows.

    Raises:
        DataError: it cannot be read.
    """
    task = offline_task(name)
    path = None if task is None else Places.of([str(each) for each in world.benchmarks or ()]).find(task)
    if path is None or path.parent.name in OF_BENCHMARKS:
        return False
    train, held_out = split_files(path, ROW_SUFFIXES)
    return all("text" in row.values for file in (*train, *held_out) for row in read_table(file)[:1])


def take_pick(settings: dict[str, Any], context: Context) -> str | None:
    """Take `pick` out of the settings; ConfigError for a way to pick that there is not."""
    pick = settings.pop("pick", None)
    if pick not in (None, "in_domain", "target"):
        raise ConfigError(f"{context.origin}: pick {pick!r}: use in_domain, or target where target names benchmarks")
    return pick


def _best(labels: Iterable[str], merit: Callable[[str], float]) -> dict[str, str]:
    """By each label without its rate the one with the greatest merit, the first of equals."""
    best: dict[str, str] = {}
    for label in labels:
        stem = stem_of(label)
        if stem not in best or merit(label) > merit(best[stem]):
            best[stem] = label
    return best


class _Found:
    """The scores that count, of the base and of each adapter."""

    def __init__(
        self,
        report: BenchmarkReport,
        tasks: Sequence[str],
        groups: Mapping[str, Sequence[str]],
        config: BenchmarkConfig,
    ) -> None:
        self.groups = groups
        self._tasks = tasks
        self._config = config
        self._scores = {label: self._counting(scores) for label, scores in report.adapted.items()}
        self._bases = {label: self._counting(base_of(report, label)) for label in report.adapted}
        self._scores["base"] = self._counting(report.base)

    def rename(self, names: Mapping[str, str]) -> None:
        """Let adapters stand under other names too."""
        self._scores |= {new: self._scores[old] for old, new in names.items()}
        self._bases |= {new: self._bases[old] for old, new in names.items()}

    def mean(self, label: str, group: str) -> float:
        """Mean score of a model over a group's tasks, in %."""
        return 100.0 * float(np.mean([self._scores[label][task].value for task in self.groups[group]]))

    def difference(self, label: str, against: str, tasks: Sequence[str]) -> Interval:
        """Mean over tasks of the paired differences of two models in points of %; the base's in the model's numbers."""
        other = self._bases[label] if against == "base" else self._scores[against]
        return mean_difference([(other[task], self._scores[label][task]) for task in tasks], self._config)

    def _counting(self, scores: Sequence[BenchmarkScore]) -> dict[str, BenchmarkScore]:
        return {task: counting_score(scores, task) for task in self._tasks}

    def numbers(self, labels: Sequence[str]) -> dict[str, Interval]:
        """Every number by the name that a claim uses."""
        numbers: dict[str, Interval] = {}
        for label in labels:
            for task in self._tasks:
                numbers[f"{label}.{task}"] = self.difference(label, "base", [task])
        for label in ("base", *labels):
            for task in self._tasks:
                score = self._scores[label][task]
                numbers[f"{label}.{task}.score"] = Interval(100.0 * score.value, None, None)
        for group, tasks in self.groups.items():
            for label in labels:
                numbers[f"{label}.{group}"] = self.difference(label, "base", tasks)
            for one in labels:
                for other in labels:
                    if one != other:
                        numbers[f"{one}-minus-{other}.{group}"] = self.difference(one, other, tasks)
        return numbers

    def table(self, labels: Sequence[str]) -> pd.DataFrame:
        """A row for each task and mean: the base's score, and each adapter's difference to it."""
        rows: dict[str, list[str]] = {}
        for task in self._tasks:
            score = self._scores["base"][task]
            differences = [with_interval(self.difference(label, "base", [task])) for label in labels]
            rows[f"{task} ({score.metric}, {score.rows:,} rows)"] = [f"{100.0 * score.value:.1f}", *differences]
        for group, tasks in self.groups.items():
            if len(tasks) > 1:
                differences = [with_interval(self.difference(label, "base", tasks)) for label in labels]
                rows[f"Mean, {group}"] = [f"{self.mean('base', group):.1f}", *differences]
        heads = ["Base, %", *(f"{label}, points" for label in labels)]
        return pd.DataFrame.from_dict(rows, orient="index", columns=heads) if rows else pd.DataFrame({NONE: []})

    def about(self) -> list[str]:
        """Where the rows of each task are from and how they were asked."""
        told = []
        for task in self._tasks:
            facts = self._scores["base"][task].facts
            parts = [f"{facts.split} rows of {facts.source}", f"{facts.fewshot} worked examples", *facts.notes]
            told.append(f"{task}: {'; '.join(parts)}")
        return told
