"""What an adaptation gains and what it loses while it is trained: every kept snapshot on target, texts and benchmarks.

The DISeL paper (arXiv 2605.19028, section 6, Figures 6 to 9, and appendix III.6): "we track retention at every saved
checkpoint", retention being "the unweighted mean accuracy across the benchmarks", beside the accuracy on the target
task; the adapter "is not merged". Here perplexity is measured too, of the target and of texts that were never learnt:
it needs no benchmark and moves long before an accuracy does.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from gaintune.adapters import adapter_weights, attached, check_adapters
from gaintune.analysis.provenance import Provenance, origin_of, provenance, warn_of_other_texts
from gaintune.config import EvaluateConfig, Plan
from gaintune.data import DomainBlocks, load_domain
from gaintune.errors import ConfigError
from gaintune.evaluate import measure_domain
from gaintune.evaluate.benchmarks import (
    BenchmarkConfig,
    BenchmarkReport,
    BenchmarkScore,
    base_of,
    benchmark_adapters,
    counting_score,
    load_suite,
    mean_difference,
    read_config,
)
from gaintune.methods import Precision, measuring_precision
from gaintune.models import Base, load_base
from gaintune.progress import Progress, Silent
from gaintune.results import Change, DomainLoss, Interval, changes_of, mean_change
from gaintune.storage import canonical_json, read_json, sha256_file, write_json
from gaintune.training import snapshots_of


@dataclass(frozen=True)
class TaskScore:
    """One task's metric; `value` and `stderr` in %."""

    task: str
    metric: str
    value: float
    stderr: float | None
    rows: int


@dataclass(frozen=True)
class Scores:
    """One model's benchmarks.

    Attributes:
        tasks: every task.
        target: mean over the target's tasks in %; None where there is none.
        target_change: its difference to the base in points of %, paired row by row.
        retention: mean over all other tasks in %; None where there is none.
        retention_change: its difference to the base.
    """

    tasks: tuple[TaskScore, ...]
    target: float | None
    target_change: Interval | None
    retention: float | None
    retention_change: Interval | None


@dataclass(frozen=True)
class SnapshotScores:
    """One snapshot of an adaptation.

    Attributes:
        step: updates before it; 0 is the pretrained model.
        losses: by domain.
        scores: of benchmarks; None where none were asked.
    """

    step: int
    losses: Mapping[str, DomainLoss]
    scores: Scores | None = None


@dataclass(frozen=True)
class Trajectory:
    """One adaptation over time.

    Attributes:
        label: what it is called.
        method: its method.
        numbers: what it was trained and is measured in, such as bfloat16.
        base: the pretrained model's losses in the same numbers, by domain.
        snapshots: its snapshots in order; the pretrained model first, where that is what it started from.
    """

    label: str
    method: str
    numbers: str
    base: Mapping[str, DomainLoss]
    snapshots: tuple[SnapshotScores, ...]


@dataclass(frozen=True)
class Retention:
    """Adaptations over time against one base.

    Attributes:
        target: the domains that were learnt.
        texts: the domains that were not.
        base: the pretrained model's losses in its own numbers, and its scores where benchmarks were asked.
        trajectories: one for each adaptation.
        settings: what intervals are made with.
    """

    target: tuple[str, ...]
    texts: tuple[str, ...]
    base: SnapshotScores
    trajectories: tuple[Trajectory, ...]
    settings: EvaluateConfig
    provenance: Provenance = field(repr=False)

    @cached_property
    def _changes(self) -> dict[tuple[str, int, str], Change]:
        """Changes by trajectory, step and domain, with their resamples."""
        changes: dict[tuple[str, int, str], Change] = {}
        for trajectory in self.trajectories:
            for domain, base in trajectory.base.items():
                losses = [snapshot.losses[domain] for snapshot in trajectory.snapshots]
                found = changes_of(base, losses, domain, self.settings)
                for snapshot, change in zip(trajectory.snapshots, found, strict=True):
                    changes[trajectory.label, snapshot.step, domain] = change
        return changes

    def change(self, trajectory: Trajectory, snapshot: SnapshotScores, domains: Sequence[str]) -> Interval | None:
        """Mean change of the perplexity of some domains against the pretrained model in %; None for no domain."""
        if not domains:
            return None
        return mean_change(
            [self._changes[trajectory.label, snapshot.step, domain] for domain in domains], self.settings
        )

    def apart(self, one: Trajectory, other: Trajectory, domains: Sequence[str]) -> Interval:
        """The same at the last snapshots of two adaptations: one minus the other in points of %, paired by blocks."""
        first, second = (
            [self._changes[each.label, each.snapshots[-1].step, domain] for domain in domains] for each in (one, other)
        )
        return mean_change(first, self.settings, less=second)

    def best(self, trajectory: Trajectory) -> SnapshotScores:
        """The snapshot at which the target is best: by its benchmarks where there are any, else by its perplexity."""

        def merit(snapshot: SnapshotScores) -> float:
            if snapshot.scores is not None and snapshot.scores.target is not None:
                return snapshot.scores.target
            change = self.change(trajectory, snapshot, self.target)
            assert change is not None, "a target has a domain"
            return -change.value

        return max(trajectory.snapshots, key=merit)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""

        def plain(figure: Interval | Scores | None) -> dict[str, Any] | None:
            return None if figure is None else asdict(figure)

        def told(trajectory: Trajectory, snapshot: SnapshotScores) -> dict[str, Any]:
            return {
                "step": snapshot.step,
                "target": plain(self.change(trajectory, snapshot, self.target)),
                "texts": plain(self.change(trajectory, snapshot, self.texts)),
                "domains": {
                    domain: {
                        "perplexity": loss.perplexity,
                        "bits_per_byte": loss.bits_per_byte,
                        "change": plain(self.change(trajectory, snapshot, [domain])),
                    }
                    for domain, loss in snapshot.losses.items()
                },
                "benchmarks": plain(snapshot.scores),
            }

        return {
            "target": list(self.target),
            "texts": list(self.texts),
            "base": {
                "perplexity": {domain: loss.perplexity for domain, loss in self.base.losses.items()},
                "benchmarks": plain(self.base.scores),
            },
            "courses": [
                {
                    "label": trajectory.label,
                    "method": trajectory.method,
                    "numbers": trajectory.numbers,
                    "best_step": self.best(trajectory).step,
                    "moments": [told(trajectory, snapshot) for snapshot in trajectory.snapshots],
                }
                for trajectory in self.trajectories
            ],
        }


def survey_retention(
    plan: Plan,
    adapters: Sequence[Path],
    *,
    benchmarks: BenchmarkConfig | Mapping[str, Any] | None = None,
    target_tasks: Sequence[str] = (),
    every: int = 1,
    cache: Path | None = None,
    benchmark_cache: Path | None = None,
    allow_other_base: bool = False,
    progress: Progress | None = None,
) -> Retention:
    """Measure every kept snapshot (`train.snapshot_steps`) of some adaptations on the plan's domains and on benchmarks.

    Args:
        plan: base; `data.domains` are the target, `data.watched` the texts whose retention is asked; give the data
            settings that the adaptations were trained with.
        adapters: adapters with snapshots, or folders of snapshots; see `snapshots_of`.
        benchmarks: a `BenchmarkConfig`, or its values; None for no benchmarks.
        target_tasks: those of its tasks that measure the target, such as gsm8k; all others measure retention.
        every: take every so many-th snapshot of an adaptation, and always the last.
        cache: folder that keeps losses, so that a stopped survey continues; none are kept unless given.
        benchmark_cache: folder that keeps scores of benchmarks, as in `run_benchmarks`; likewise.
        allow_other_base: take adapters that were trained on another base.
        progress: where to show progress; nowhere unless given.

    Raises:
        AdapterError, BaseMismatchError: no snapshots, or a damaged one, or one of another base.
        ConfigError: adapters named twice, tasks that are not among the benchmarks, or a benchmark's own refusals.
        DataError: a domain's text is missing or broken.
    """
    if every < 1:
        raise ConfigError(f"every is {every}: take every snapshot (1), every second one (2), and so on")
    config = None if benchmarks is None else checked_config(benchmarks, target_tasks)
    taken = taken_snapshots([Path(folder) for folder in adapters], every)
    folders = [folder for copies in taken.values() for folder in copies.values()]
    check_adapters(folders, plan.model, allow_other_base=allow_other_base)
    suite = None if config is None else load_suite(config)  # before hours of measuring
    shown = progress or Silent()
    base = load_base(plan.model)
    domains = [load_domain(domain, plan.data, base.tokenizer) for domain in plan.data.measured]
    warn_of_other_texts([next(iter(copies.values())) for copies in taken.values()], domains)
    last = {label: list(copies.values())[-1] for label, copies in taken.items()}
    told = provenance(plan, base, domains, {label: origin_of(folder) for label, folder in last.items()})
    looking = SnapshotLosses(plan, base, domains, cache, allow_other_base, shown)
    first = SnapshotScores(0, looking.at(None, measuring_precision(plan.model), "base"))
    trajectories = []
    for label, copies in taken.items():
        origin = told.adapters[label]
        numbers = measuring_precision(plan.model, origin.method)
        before = looking.at(None, numbers, "base")
        snapshots = [
            SnapshotScores(step, looking.at(folder, numbers, f"{label}, step {step}"))
            for step, folder in copies.items()
        ]
        start = [SnapshotScores(0, before)] if len(origin.domains) == 1 else []  # else it began with an adapter
        trajectories.append(Trajectory(label, origin.method, numbers.name, before, (*start, *snapshots)))
    del looking, base  # benchmarks load bases of their own
    if config is not None:
        report = benchmark_adapters(
            plan.model,
            {f"{label}, step {step}": folder for label, copies in taken.items() for step, folder in copies.items()},
            config,
            cache=benchmark_cache,
            suite=suite,
            allow_other_base=allow_other_base,
            progress=shown,
        )
        tasks = [task.name for task in config.tasks]
        score = partial(scores_of, tasks=tasks, target=target_tasks, config=config)
        first = replace(first, scores=score(report.base, report.base))
        trajectories = [_with_scores(one, report, score) for one in trajectories]
    target = tuple(domain.name for domain in plan.data.domains)
    texts = tuple(domain.name for domain in plan.data.watched)
    return Retention(target, texts, first, tuple(trajectories), plan.evaluate, told)


def taken_snapshots(adapters: Sequence[Path], every: int) -> dict[str, dict[int, Path]]:
    """The snapshots to measure, by label and step: labels of the methods, or folders where those are not enough."""
    names = [str(folder) for folder in adapters]
    if not names or len(set(names)) != len(names):
        raise ConfigError(f"name adapters with snapshots, each once (given: {', '.join(names) or 'none'})")
    copies = [snapshots_of(folder) for folder in adapters]
    labels = [origin_of(next(iter(each.values()))).label for each in copies]
    seen = Counter(labels)
    chosen = {}
    for name, label, each in zip(names, labels, copies, strict=True):
        steps = [*list(each)[every - 1 :: every], list(each)[-1]]
        chosen[label if seen[label] == 1 else name] = {step: each[step] for step in dict.fromkeys(steps)}
    return chosen


class SnapshotLosses:
    """Measures a base and adapters on it, one after another; what is in the cache is not measured again.

    What a method made is measured in the numbers it was trained in: weights trained whole are fp32, and lose small
    steps in the base's bf16.
    """

    def __init__(
        self,
        plan: Plan,
        base: Base,
        domains: Sequence[DomainBlocks],
        cache: Path | None,
        allow_other_base: bool,
        progress: Progress,
    ) -> None:
        self._plan = plan
        self._bases = {measuring_precision(plan.model): base}
        self._domains = domains
        self._cache = cache
        self._allow_other_base = allow_other_base
        self._progress = progress
        self._facts = [base.fingerprint, base.model.device.type, plan.evaluate.batch_size]

    def at(self, adapter: Path | None, numbers: Precision, title: str) -> dict[str, DomainLoss]:
        """Losses by domain of the base with an adapter, or without one, in some numbers."""
        files = {domain.name: self._file(adapter, numbers, domain) for domain in self._domains}
        if all(file is not None and file.exists() for file in files.values()):
            return {name: DomainLoss.from_dict(read_json(file)) for name, file in files.items() if file is not None}
        with contextlib.ExitStack() as stack:
            base = self._in(numbers)
            model: nn.Module = base.model
            if adapter is not None:
                lent = attached(base, adapter, allow_other_base=self._allow_other_base)
                model, _ = stack.enter_context(lent)
            losses = {
                domain.name: measure_domain(
                    model,
                    domain,
                    batch_size=self._plan.evaluate.batch_size,
                    mixed_precision=numbers.mixed,
                    title=f"{title}: measuring {domain.name}",
                    base=self._plan.model.name if adapter is None else None,
                    progress=self._progress,
                )
                for domain in self._domains
            }
        gc.collect()
        for name, file in files.items():
            if file is not None:
                write_json(file, losses[name].to_dict())
        return losses

    def _in(self, numbers: Precision) -> Base:
        """The base in some numbers; those that it is needed in stay."""
        if numbers not in self._bases:
            self._bases[numbers] = load_base(self._plan.model, dtype=numbers.load)
        return self._bases[numbers]

    def _file(self, adapter: Path | None, numbers: Precision, domain: DomainBlocks) -> Path | None:
        if self._cache is None:
            return None
        which = None if adapter is None else sha256_file(adapter_weights(adapter))
        key = canonical_json([*self._facts, numbers.name, which, domain.content_hash])
        return self._cache / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def scores_of(
    base: Sequence[BenchmarkScore], model: Sequence[BenchmarkScore], tasks: Sequence[str], target: Sequence[str],
    config: BenchmarkConfig,
) -> Scores:  # fmt: skip
    """Put together one model's scores of some tasks, `target` among them, beside the base's."""
    pairs = {task: (counting_score(base, task), counting_score(model, task)) for task in tasks}
    kept = [task for task in tasks if task not in target]
    told = []
    for task, (_, score) in pairs.items():
        error = None if score.stderr is None else 100.0 * score.stderr
        told.append(TaskScore(task, score.metric, 100.0 * score.value, error, score.rows))
    values = {each.task: each.value for each in told}
    return Scores(
        tasks=tuple(told),
        target=float(np.mean([values[task] for task in target])) if target else None,
        target_change=mean_difference([pairs[task] for task in target], config) if target else None,
        retention=float(np.mean([values[task] for task in kept])) if kept else None,
        retention_change=mean_difference([pairs[task] for task in kept], config) if kept else None,
    )


def checked_config(benchmarks: BenchmarkConfig | Mapping[str, Any], target: Sequence[str]) -> BenchmarkConfig:
    """What is asked, with the target's tasks among it; ConfigError otherwise."""
    config = benchmarks if isinstance(benchmarks, BenchmarkConfig) else read_config(dict(benchmarks))
    tasks = [task.name for task in config.tasks]
    unknown = [task for task in target if task not in tasks]
    if unknown:
        raise ConfigError(f"target {unknown[0]} is none of the benchmarks ({', '.join(tasks)}): add it to them")
    return config


def _with_scores(one: Trajectory, report: BenchmarkReport, score: Callable[..., Scores]) -> Trajectory:
    """Add to every snapshot its scores, against the base in the same numbers."""
    names = {at.step: f"{one.label}, step {at.step}" for at in one.snapshots}
    base = base_of(report, names[one.snapshots[-1].step])
    return replace(
        one,
        snapshots=tuple(
            replace(at, scores=score(base, report.adapted[names[at.step]] if at.step else base)) for at in one.snapshots
        ),
    )
