"""What an adaptation gains and what it loses while it is trained: every kept snapshot on target, texts and benchmarks.

The DISeL paper (arXiv 2605.19028, section 6, Figures 6 to 9, and appendix III.6): "we track retention at every saved
checkpoint", retention being "the unweighted mean accuracy across the benchmarks", beside the accuracy on the target
task; the adapter "is not merged". Here perplexity is measured too, of the target and of texts that were never learnt:
it needs no benchmark and moves long before an accuracy does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from gaintune.adapters import check_adapters
from gaintune.analysis.provenance import Provenance, origin_of, provenance, warn_of_other_texts
from gaintune.analysis.retention.losses import SnapshotLosses, taken_snapshots
from gaintune.analysis.retention.scores import MeasuredScores, Scores, checked_config, measure_scores
from gaintune.config import EvaluateConfig, Plan
from gaintune.data import load_domain
from gaintune.errors import ConfigError
from gaintune.evaluate.benchmarks import BenchmarkConfig, load_suite
from gaintune.methods import measuring_precision
from gaintune.models import load_base
from gaintune.progress import Progress, Silent
from gaintune.results import Change, DomainLoss, Interval, changes_of, mean_change


@dataclass(frozen=True)
class Moment:
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
class Course:
    """One adaptation over time.

    Attributes:
        label: what it is called.
        method: its method.
        numbers: what it was trained and is measured in, such as bfloat16.
        base: the pretrained model's losses in the same numbers, by domain.
        moments: its snapshots in order; the pretrained model first, where that is what it started from.
    """

    label: str
    method: str
    numbers: str
    base: Mapping[str, DomainLoss]
    moments: tuple[Moment, ...]


@dataclass(frozen=True)
class Retention:
    """Adaptations over time against one base.

    Attributes:
        target: the domains that were learnt.
        texts: the domains that were not.
        base: the pretrained model's losses in its own numbers, and its scores where benchmarks were asked.
        courses: one for each adaptation.
        settings: what intervals are made with.
    """

    target: tuple[str, ...]
    texts: tuple[str, ...]
    base: Moment
    courses: tuple[Course, ...]
    settings: EvaluateConfig
    provenance: Provenance = field(repr=False)

    @cached_property
    def _changes(self) -> dict[tuple[str, int, str], Change]:
        """Changes by course, step and domain, with their resamples."""
        changes: dict[tuple[str, int, str], Change] = {}
        for course in self.courses:
            for domain, base in course.base.items():
                losses = [moment.losses[domain] for moment in course.moments]
                found = changes_of(base, losses, domain, self.settings)
                for moment, change in zip(course.moments, found, strict=True):
                    changes[course.label, moment.step, domain] = change
        return changes

    def change(self, course: Course, moment: Moment, domains: Sequence[str]) -> Interval | None:
        """Mean change of the perplexity of some domains against the pretrained model in %; None for no domain."""
        if not domains:
            return None
        return mean_change([self._changes[course.label, moment.step, domain] for domain in domains], self.settings)

    def apart(self, one: Course, other: Course, domains: Sequence[str]) -> Interval:
        """The same at the last snapshots of two adaptations: one minus the other in points of %, paired by blocks."""
        first, second = (
            [self._changes[each.label, each.moments[-1].step, domain] for domain in domains] for each in (one, other)
        )
        return mean_change(first, self.settings, less=second)

    def best(self, course: Course) -> Moment:
        """The moment at which the target is best: by its benchmarks where there are any, else by its perplexity."""

        def merit(moment: Moment) -> float:
            if moment.scores is not None and moment.scores.target is not None:
                return moment.scores.target
            change = self.change(course, moment, self.target)
            assert change is not None, "a target has a domain"
            return -change.value

        return max(course.moments, key=merit)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""

        def plain(figure: Interval | None) -> dict[str, Any] | None:
            return None if figure is None else asdict(figure)

        def told(course: Course, moment: Moment) -> dict[str, Any]:
            return {
                "step": moment.step,
                "target": plain(self.change(course, moment, self.target)),
                "texts": plain(self.change(course, moment, self.texts)),
                "domains": {
                    domain: {
                        "perplexity": loss.perplexity,
                        "bits_per_byte": loss.bits_per_byte,
                        "change": plain(self.change(course, moment, [domain])),
                    }
                    for domain, loss in moment.losses.items()
                },
                "benchmarks": None if moment.scores is None else moment.scores.to_dict(),
            }

        return {
            "target": list(self.target),
            "texts": list(self.texts),
            "base": {
                "perplexity": {domain: loss.perplexity for domain, loss in self.base.losses.items()},
                "benchmarks": None if self.base.scores is None else self.base.scores.to_dict(),
            },
            "courses": [
                {
                    "label": course.label,
                    "method": course.method,
                    "numbers": course.numbers,
                    "best_step": self.best(course).step,
                    "moments": [told(course, moment) for moment in course.moments],
                }
                for course in self.courses
            ],
            "provenance": self.provenance.to_dict(),
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
    first = Moment(0, looking.at(None, measuring_precision(plan.model), "base"))
    courses = []
    for label, copies in taken.items():
        origin = told.adapters[label]
        numbers = measuring_precision(plan.model, origin.method)
        before = looking.at(None, numbers, "base")
        moments = [
            Moment(step, looking.at(folder, numbers, f"{label}, step {step}")) for step, folder in copies.items()
        ]
        start = [Moment(0, before)] if len(origin.domains) == 1 else []  # else it started from another adapter
        courses.append(Course(label, origin.method, numbers.name, before, (*start, *moments)))
    del looking, base  # benchmarks load bases of their own
    if config is not None:
        named = {(label, step): folder for label, copies in taken.items() for step, folder in copies.items()}
        scores = measure_scores(
            plan.model,
            named,
            config,
            target_tasks,
            suite=suite,
            cache=benchmark_cache,
            allow_other_base=allow_other_base,
            progress=shown,
        )
        first = replace(first, scores=scores.base)
        courses = [
            replace(each, moments=tuple(_scored(each.label, moment, scores) for moment in each.moments))
            for each in courses
        ]
    target = tuple(domain.name for domain in plan.data.domains)
    texts = tuple(domain.name for domain in plan.data.watched)
    return Retention(target, texts, first, tuple(courses), plan.evaluate, told)


def _scored(label: str, moment: Moment, scores: MeasuredScores) -> Moment:
    return replace(moment, scores=scores.at(label, moment.step))
