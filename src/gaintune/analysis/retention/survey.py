"""Measure every kept snapshot of an adaptation on its target, on other texts and on benchmarks.

The DISeL paper (arXiv 2605.19028, section 6, Figures 6 to 9, and appendix III.6): "we track retention at every saved
checkpoint", retention being "the unweighted mean accuracy across the benchmarks", beside the accuracy on the target
task; the adapter "is not merged". Here perplexity is measured too, of the target and of texts that were not trained on:
it needs no benchmark and moves long before an accuracy does.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from gaintune.adapters import attached, check_adapters, identity_file
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
from gaintune.progress import Progress
from gaintune.results import Change, DomainLoss, Interval, changes_of, mean_change
from gaintune.storage import canonical_json, read_stored, sha256_file, write_json
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
class BenchmarkScores:
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
    """Losses by domain and benchmarks, if any, after so many updates; step 0 is the pretrained model."""

    step: int
    losses: Mapping[str, DomainLoss]
    scores: BenchmarkScores | None = None


@dataclass(frozen=True)
class Trajectory:
    """One adaptation over time, trained and measured in one precision, such as bfloat16.

    `base` has the pretrained model's losses in the same precision, by domain. The snapshots are in order; the first is
    the pretrained model, where the adaptation started from it.
    """

    label: str
    method: str
    precision: str
    base: Mapping[str, DomainLoss]
    snapshots: tuple[SnapshotScores, ...]


@dataclass(frozen=True)
class Retention:
    """Adaptations over time against one base, which is measured in its own precision.

    `target` are the domains that were trained on, `texts` the others.
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
                losses = {(trajectory.label, each.step, domain): each.losses[domain] for each in trajectory.snapshots}
                moved = changes_of(base, [*losses.values()], domain, self.settings)
                changes |= dict(zip(losses, moved, strict=True))
        return changes

    def _of(self, trajectory: Trajectory, snapshot: SnapshotScores, domains: Sequence[str]) -> list[Change]:
        return [self._changes[trajectory.label, snapshot.step, domain] for domain in domains]

    def change(self, trajectory: Trajectory, snapshot: SnapshotScores, domains: Sequence[str]) -> Interval | None:
        """Return the mean change of perplexity of domains against the pretrained model in %; None for no domain."""
        return mean_change(self._of(trajectory, snapshot, domains), self.settings) if domains else None

    def apart(self, one: Trajectory, other: Trajectory, domains: Sequence[str]) -> Interval:
        """Return the change at one's last snapshot minus the other's in points of %, paired by blocks."""
        first, second = (self._of(each, each.snapshots[-1], domains) for each in (one, other))
        return mean_change(first, self.settings, less=second)

    def best(self, trajectory: Trajectory) -> SnapshotScores:
        """Return the snapshot whose target is best: by its benchmarks where there are any, else by its perplexity."""

        def merit(snapshot: SnapshotScores) -> float:
            if snapshot.scores is not None and snapshot.scores.target is not None:
                return snapshot.scores.target
            change = self.change(trajectory, snapshot, self.target)
            assert change is not None, "a target has a domain"
            return -change.value

        return max(trajectory.snapshots, key=merit)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""

        def plain(figure: Interval | BenchmarkScores | None) -> dict[str, Any] | None:
            return None if figure is None else asdict(figure)

        def measured(trajectory: Trajectory, snapshot: SnapshotScores) -> dict[str, Any]:
            change = partial(self.change, trajectory, snapshot)
            domains = {}
            for domain, loss in snapshot.losses.items():
                figures = {"perplexity": loss.perplexity, "bits_per_byte": loss.bits_per_byte}
                domains[domain] = {**figures, "change": plain(change([domain]))}
            return {
                "step": snapshot.step,
                "target": plain(change(self.target)),
                "texts": plain(change(self.texts)),
                "domains": domains,
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
                    "numbers": trajectory.precision,
                    "best_step": self.best(trajectory).step,
                    "moments": [measured(trajectory, snapshot) for snapshot in trajectory.snapshots],
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
        plan: base; `data.domains` are the target, `data.watched` the texts whose retention is measured; give the data
            settings that the adaptations were trained with.
        adapters: adapters with snapshots, or folders of snapshots; see `snapshots_of`.
        benchmarks: a `BenchmarkConfig`, or its values; None for no benchmarks.
        target_tasks: those of its tasks that measure the target, such as gsm8k; all others measure retention.
        every: take every so many-th snapshot of an adaptation, and always the last.
        cache: folder that keeps losses, so that a stopped survey continues; none are kept unless given.
        benchmark_cache: folder that keeps scores of benchmarks, as in `run_benchmarks`.

    Raises:
        AdapterError, BaseMismatchError: no snapshots, or a damaged one, or one of another base.
        ConfigError: adapters named twice, tasks that are not among the benchmarks, or a benchmark's own refusals.
        DataError: a domain's text is missing or broken.
    """
    if every < 1:
        raise ConfigError(f"every is {every}: take every snapshot (1), every second one (2), and so on")
    config = benchmarks if isinstance(benchmarks, BenchmarkConfig | None) else read_config(dict(benchmarks))
    tasks = [] if config is None else [task.name for task in config.tasks]
    if config is not None and (unknown := [task for task in target_tasks if task not in tasks]):
        raise ConfigError(f"target {unknown[0]} is none of the benchmarks ({', '.join(tasks)}): add it to them")
    taken = taken_snapshots([Path(folder) for folder in adapters], every)
    folders = [folder for snapshots in taken.values() for folder in snapshots.values()]
    check_adapters(folders, plan.model, allow_other_base=allow_other_base)
    suite = None if config is None else load_suite(config)  # before hours of measuring
    base = load_base(plan.model)
    domains = [load_domain(domain, plan.data, base.tokenizer) for domain in plan.data.measured]
    warn_of_other_texts([next(iter(snapshots.values())) for snapshots in taken.values()], domains)
    origins = {label: origin_of([*snapshots.values()][-1]) for label, snapshots in taken.items()}
    made_from = provenance(plan, base, domains, origins)
    losses = SnapshotLosses(plan, base, domains, cache, allow_other_base, progress)
    first = SnapshotScores(0, losses.at(None, measuring_precision(plan.model), "base"))
    trajectories = []
    for label, origin in origins.items():
        precision = measuring_precision(plan.model, origin.method)
        before = losses.at(None, precision, "base")
        snapshots = [
            SnapshotScores(step, losses.at(folder, precision, f"{label}, step {step}"))
            for step, folder in taken[label].items()
        ]
        if len(origin.domains) == 1:  # else it began with an adapter
            snapshots.insert(0, SnapshotScores(0, before))
        trajectories.append(Trajectory(label, origin.method, precision.name, before, tuple(snapshots)))
    del losses, base  # benchmarks load bases of their own
    if config is not None:
        report = benchmark_adapters(
            plan.model,
            {f"{label}, step {step}": folder for label, each in taken.items() for step, folder in each.items()},
            config,
            cache=benchmark_cache,
            suite=suite,
            allow_other_base=allow_other_base,
            progress=progress,
        )
        score = partial(scores_of, tasks=tasks, target=target_tasks, config=config)
        first = replace(first, scores=score(report.base, report.base))
        trajectories = [_with_scores(trajectory, report, score) for trajectory in trajectories]
    target, texts = (tuple(domain.name for domain in part) for part in (plan.data.domains, plan.data.watched))
    return Retention(target, texts, first, tuple(trajectories), plan.evaluate, made_from)


def taken_snapshots(adapters: Sequence[Path], every: int) -> dict[str, dict[int, Path]]:
    """Return the snapshots to measure, by label and step: labels of the methods, or folders where two share a label."""
    names = [str(folder) for folder in adapters]
    if not names or len(set(names)) != len(names):
        raise ConfigError(f"name adapters with snapshots, each once (given: {', '.join(names) or 'none'})")
    snapshots = [snapshots_of(folder) for folder in adapters]
    labels = [origin_of(next(iter(each.values()))).label for each in snapshots]
    taken = {}
    for name, label, each in zip(names, labels, snapshots, strict=True):
        steps = [*list(each)[every - 1 :: every], list(each)[-1]]
        taken[label if labels.count(label) == 1 else name] = {step: each[step] for step in dict.fromkeys(steps)}
    return taken


class SnapshotLosses:
    """Losses of a base and of adapters on it, measured one after another unless they are in the cache.

    An adapter is measured in the precision it was trained in: weights trained whole are fp32, and lose small steps in
    the base's bf16.
    """

    def __init__(
        self,
        plan: Plan,
        base: Base,
        domains: Sequence[DomainBlocks],
        cache: Path | None,
        allow_other_base: bool,
        progress: Progress | None,
    ) -> None:
        self._plan, self._domains, self._cache = plan, domains, cache
        self._bases = {measuring_precision(plan.model): base}
        self._attached = partial(attached, allow_other_base=allow_other_base)
        self._measure = partial(measure_domain, batch_size=plan.evaluate.batch_size, progress=progress)
        self._facts = [base.fingerprint, base.model.device.type, plan.evaluate.batch_size]

    def at(self, adapter: Path | None, precision: Precision, title: str) -> dict[str, DomainLoss]:
        """Return losses by domain of the base with an adapter, or without one, in a precision."""
        files = self._files(adapter, precision)
        if files and all(file.exists() for file in files.values()):
            return {name: read_stored(file, DomainLoss.from_dict) for name, file in files.items()}
        if precision not in self._bases:
            self._bases[precision] = load_base(self._plan.model, dtype=precision.load)
        with contextlib.ExitStack() as stack:
            base = self._bases[precision]
            model: nn.Module = base.model
            if adapter is not None:
                model, _ = stack.enter_context(self._attached(base, adapter))
            name = None if adapter else self._plan.model.name
            measure = partial(self._measure, mixed_precision=precision.mixed, base=name)
            losses = {
                domain.name: measure(model, domain, title=f"{title}: measuring {domain.name}")
                for domain in self._domains
            }
        gc.collect()
        for name, file in files.items():
            write_json(file, losses[name].to_dict())
        return losses

    def _files(self, adapter: Path | None, precision: Precision) -> dict[str, Path]:
        """Return where losses are kept, by domain; empty where none are."""
        if self._cache is None:
            return {}
        digest = None if adapter is None else sha256_file(identity_file(adapter))
        files = {}
        for domain in self._domains:
            key = canonical_json([*self._facts, precision.name, digest, domain.content_hash])
            files[domain.name] = self._cache / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
        return files


def scores_of(
    base: Sequence[BenchmarkScore], model: Sequence[BenchmarkScore], tasks: Sequence[str], target: Sequence[str],
    config: BenchmarkConfig,
) -> BenchmarkScores:  # fmt: skip
    """Put together a model's scores of tasks, `target` among them, beside the base's."""
    pairs = {task: (counting_score(base, task), counting_score(model, task)) for task in tasks}
    scores = {}
    for task, (_, score) in pairs.items():
        error = None if score.stderr is None else 100.0 * score.stderr
        scores[task] = TaskScore(task, score.metric, 100.0 * score.value, error, score.rows)

    def mean(names: Sequence[str]) -> tuple[float | None, Interval | None]:
        if not names:
            return None, None
        value = float(np.mean([scores[task].value for task in names]))
        return value, mean_difference([pairs[task] for task in names], config)

    kept = [task for task in tasks if task not in target]
    return BenchmarkScores(tuple(scores.values()), *mean(target), *mean(kept))


def _with_scores(trajectory: Trajectory, report: BenchmarkReport, score: Callable[..., BenchmarkScores]) -> Trajectory:
    """Add to every snapshot its scores, against the base in the same precision."""
    names = {snapshot.step: f"{trajectory.label}, step {snapshot.step}" for snapshot in trajectory.snapshots}
    base = base_of(report, names[trajectory.snapshots[-1].step])
    scored = [
        replace(each, scores=score(base, report.adapted[names[each.step]] if each.step else base))
        for each in trajectory.snapshots
    ]
    return replace(trajectory, snapshots=tuple(scored))
