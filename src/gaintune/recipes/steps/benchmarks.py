"""Steps that measure benchmarks of trained adapters: scores, paired differences, the rate picked by a target."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import permutations
from typing import Any

import numpy as np
import pandas as pd

import gaintune.evaluate.benchmarks as bench
from gaintune.config import Plan
from gaintune.data import ROW_SUFFIXES, read_table, split_files
from gaintune.errors import AssetError, ConfigError, DataError, one_line
from gaintune.evaluate import wilson
from gaintune.recipes.outcome import Context, PreparedStep, StepOutcome
from gaintune.recipes.scales import ScaleSetup, stem_of
from gaintune.report import NONE, with_interval
from gaintune.results import Interval, bare, in_percent
from gaintune.storage import cache_dir, write_json

SETTINGS = ("fewshot", "limit", "batch_size", "generated_tokens", "seed")
ROWS_ONLY = ("benchmarks", "instruct")  # folders of local copies that hold rows, where the others hold texts too
RUNS_CODE = ("humaneval",)
BY_TEXT = "of several rates the one that improves the learnt domain's held-out text most counts"
BY_TARGET = (
    "of several rates the one with the best target counts: it is chosen and judged on the same rows, so that its "
    "target is flattered, the more so the more rates there are"
)


def benchmarks(settings: dict[str, Any], context: Context) -> PreparedStep:
    """Measure benchmarks of the adapters of the step `of` against their base: `gaintune evaluate --benchmarks`.

    Settings: `of`; `labels` and `after` pick adapters; `tasks`, and `target` for those that the training was for; those
    of a `BenchmarkConfig`; `pick`, target or in_domain, for labels such as lora-lr0.001, of which the one that is best
    on the target's benchmarks, or on the text it was trained on, stands for lora. Numbers, in points of % against the
    base: `LABEL.TASK`; `LABEL.kept` and `LABEL.target`, means over tasks; `A-minus-B.kept` and so on, paired row by
    row. Scores, in %, with Wilson's intervals over rows: `LABEL.TASK.score`, `base.TASK.score`.
    """
    trained, plan = context.trained(settings)
    adapters = trained.last_adapters(settings.pop("labels", None), settings.pop("after", None))
    target, tasks, pick = settings.pop("target", []), settings.pop("tasks", []), settings.pop("pick", None)
    if pick not in (None, "in_domain", "target"):
        raise ConfigError(f"{context.origin}: pick {pick!r}: use in_domain, or target where target names benchmarks")
    if not [*target, *tasks] or (pick == "target" and not target):
        raise ConfigError(f"{context.origin}: name `tasks`, and a `target` where it is to pick")
    config, missing = benchmark_config(settings, [*target, *tasks], plan, context)
    notes = tuple(f"left out, {name}: {why}" for name, why in missing.items())
    if config is None:
        return PreparedStep.left_out(*notes)
    names, wanted = [task.name for task in config.tasks], [bench.as_task(task)["name"] for task in target]
    groups = {"target": [name for name in names if name in wanted]}
    groups["kept"] = [name for name in names if name not in wanted]
    if pick == "target" and not groups["target"]:
        why = "none of the target's benchmarks is to be had, so that none can be picked by them"
        return PreparedStep.left_out(*notes, f"left out: {why}")
    named = {"target": target, "kept": tasks}
    without = {key: "none of its benchmarks is to be had" for key in named if named[key] and not groups[key]}

    def measure(labels: Iterable[str], config: bench.BenchmarkConfig, file: str) -> _Scores:
        folders = {label: adapters[label] for label in labels}
        cache = cache_dir() / "benchmarks"
        report = bench.benchmark_adapters(plan.model, folders, config, cache=cache, progress=context.progress)
        write_json(context.folder / file, report.to_dict())
        return _Scores(report, groups, config)

    def run() -> StepOutcome:
        about, picked = [*notes], {label: label for label in adapters}
        if pick == "in_domain":
            about.append(BY_TEXT)
            picked = _best(adapters, lambda label: -trained.numbers[f"{label}.in_domain"].value)
        elif pick == "target":
            about.append(BY_TARGET)
            of_target = tuple(task for task in config.tasks if task.name in wanted)
            choosing = measure(adapters, config.model_copy(update={"tasks": of_target}), "choosing.json")
            picked = _best(adapters, lambda label: choosing.mean(label, "target"))
            about += [f"{label}: {choosing.mean(label, 'target'):.1f} % of the target" for label in adapters]
        scores = measure(picked.values(), config, "benchmarks.json")
        about += [f"{stem} is {label}, the best by {pick}" for stem, label in picked.items() if stem != label]
        lacking = {f"{stem}.{name}": why for stem in picked for name, why in missing.items()}
        for key, why in without.items():
            lacking |= {f"{stem}.{key}": why for stem in picked}
            lacking |= {f"{one}-minus-{other}.{key}": "likewise" for one, other in permutations(picked, 2)}
        tables = {"Benchmarks, intervals over rows": scores.table(picked)}
        return StepOutcome(scores.numbers(picked), tables, notes=(*about, *scores.about()), without=lacking)

    return PreparedStep(StepOutcome(notes=notes), run)


def benchmark_config(
    settings: dict[str, Any], tasks: Sequence[Any], plan: Plan, context: Context
) -> tuple[bench.BenchmarkConfig | None, dict[str, str]]:
    """Return what to measure (None for nothing), and the tasks that have no rows at this scale, with the reason."""
    given = {key: settings.pop(key) for key in SETTINGS if key in settings}
    context.refuse_unknown(settings)
    setup, common = context.setup, plan.evaluate.model_dump()
    common |= {
        "bootstrap_seed": common.pop("seed"),
        "allow_code_execution": context.allow_code_execution,
        "data": setup.benchmarks,
        "source": "local" if setup.scale == "smoke" else "auto",
        **given,
    }
    kept: list[dict[str, Any]] = []
    missing: dict[str, str] = {}
    for task in (bench.BenchmarkTask.model_validate(bench.as_task(task)) for task in tasks):
        if task.name in RUNS_CODE and not context.allow_code_execution and setup.scale != "paper":
            missing[task.name] = "it runs what the model writes: give --allow-code-execution"
            continue
        try:
            bench.load_suite(bench.read_config({**common, "tasks": [task.model_dump()]}))
        except (AssetError, DataError) as error:
            if setup.scale == "paper" or (isinstance(error, DataError) and not _is_a_text(task.name, setup)):
                raise
            missing[task.name] = f"no rows ({one_line(error)[:160]})"
        else:
            kept.append(task.model_dump())
    return (bench.read_config({**common, "tasks": kept}) if kept else None), missing


def _is_a_text(name: str, setup: ScaleSetup) -> bool:
    """Tell whether the local copy of that name is a domain's text, which may share a benchmark's name."""
    task = bench.offline_task(name)
    path = None if task is None else bench.LocalCopies.of(setup.benchmarks).find(task)
    if path is None or path.parent.name in ROWS_ONLY:
        return False
    train, held_out = split_files(path, ROW_SUFFIXES)
    return all("text" in row.values for file in (*train, *held_out) for row in read_table(file)[:1])


def _best(labels: Iterable[str], merit: Callable[[str], float]) -> dict[str, str]:
    """Return, by each label without its rate, the label with the greatest merit, the first of equals."""
    stems: dict[str, list[str]] = {}
    for label in labels:
        stems.setdefault(stem_of(label), []).append(label)
    return {stem: max(own, key=merit) if len(own) > 1 else own[0] for stem, own in stems.items()}


class _Scores:
    """The scores that count, of the base and of each adapter."""

    def __init__(
        self, report: bench.BenchmarkReport, groups: Mapping[str, Sequence[str]], config: bench.BenchmarkConfig
    ) -> None:
        self._config, self._tasks = config, [task.name for task in config.tasks]
        present = {key: [name for name in group if name in self._tasks] for key, group in groups.items()}
        self._groups = {key: group for key, group in present.items() if group}
        self._scores = {label: self._counting(scores) for label, scores in report.adapted.items()}
        self._bases = {label: self._counting(bench.base_of(report, label)) for label in report.adapted}
        self._scores["base"] = self._counting(report.base)

    def _counting(self, scores: Sequence[bench.BenchmarkScore]) -> dict[str, bench.BenchmarkScore]:
        return {task: bench.counting_score(scores, task) for task in self._tasks}

    def mean(self, label: str, group: str) -> float:
        """Return a model's mean score over a group's tasks, in %."""
        return 100.0 * float(np.mean([self._scores[label][task].value for task in self._groups[group]]))

    def difference(self, label: str, against: str, tasks: Sequence[str]) -> Interval:
        """Return the mean over tasks of paired differences, in points of %; the base in the adapter's precision."""
        other = self._bases[label] if against == "base" else self._scores[against]
        return bench.mean_difference([(other[task], self._scores[label][task]) for task in tasks], self._config)

    def numbers(self, labels: Mapping[str, str]) -> dict[str, Interval]:
        """Return every number by the name that a claim uses; `labels` are adapters by their names in numbers."""
        numbers: dict[str, Interval] = {}
        for name, label in labels.items():
            numbers |= {f"{name}.{task}": self.difference(label, "base", [task]) for task in self._tasks}
        for name, label in {"base": "base", **labels}.items():
            for task, score in self._scores[label].items():
                numbers[f"{name}.{task}.score"] = in_percent(self._share(score))
        for group, tasks in self._groups.items():
            for name, label in labels.items():
                numbers[f"{name}.{group}"] = self.difference(label, "base", tasks)
            for one, other in permutations(labels, 2):
                numbers[f"{one}-minus-{other}.{group}"] = self.difference(labels[one], labels[other], tasks)
        return numbers

    def _share(self, score: bench.BenchmarkScore) -> Interval:
        """Return a score with Wilson's interval where it is a share of right rows, else without one."""
        right = sum(score.items)
        if not score.items or not {*score.items} <= {0, 1} or not math.isclose(right / len(score.items), score.value):
            return bare(score.value)  # graded rows, or a mean over tasks of unequal sizes
        return wilson(int(right), len(score.items), self._config.confidence)

    def table(self, labels: Mapping[str, str]) -> pd.DataFrame:
        """Return a row for each task and mean: the base's score, and each adapter's difference to it."""

        def row(score: float, tasks: Sequence[str]) -> list[str]:
            differences = [with_interval(self.difference(label, "base", tasks)) for label in labels.values()]
            return [f"{score:.1f}", *differences]

        rows: dict[str, list[str]] = {}
        for task, score in self._scores["base"].items():
            rows[f"{task} ({score.metric}, {score.rows:,} rows)"] = row(100.0 * score.value, [task])
        for group, tasks in self._groups.items():
            if len(tasks) > 1:
                rows[f"Mean, {group}"] = row(self.mean("base", group), tasks)
        heads = ["Base, %", *(f"{name}, points" for name in labels)]
        return pd.DataFrame.from_dict(rows, orient="index", columns=heads) if rows else pd.DataFrame({NONE: []})

    def about(self) -> list[str]:
        """Say where the rows of each task come from, and how the model was prompted."""
        lines = []
        for task, score in self._scores["base"].items():
            facts = score.facts
            parts = [f"{facts.split} rows of {facts.source}", f"{facts.fewshot} worked examples", *facts.notes]
            lines.append(f"{task}: {'; '.join(parts)}")
        return lines
