"""Retention: what an adaptation gains and what it loses while it is trained."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from gaintune.analysis.base import Analysis, Options, Subject
from gaintune.config import Flag, as_list
from gaintune.progress import Progress


def _names(value: Any) -> Any:
    """Split names of benchmarks at commas."""
    parts = [each.split(",") if isinstance(each, str) else [each] for each in as_list(value) or ()]
    return [each.strip() if isinstance(each, str) else each for part in parts for each in part if each != ""]


Benchmarks = Annotated[tuple[Any, ...], BeforeValidator(_names)]


class RetentionOptions(Options):
    """Choice of the snapshots and benchmarks to measure."""

    tasks: Annotated[
        Benchmarks, Flag("benchmarks", "Benchmarks whose mean is retention, such as arc_easy,piqa.", metavar="NAMES")
    ] = Field(default=(), description="benchmarks whose mean is retention")
    target: Annotated[
        Benchmarks, Flag("target-benchmarks", "Benchmarks that measure the target, such as gsm8k:8.", metavar="NAMES")
    ] = Field(default=(), description="benchmarks that measure the target")
    every: int = Field(default=1, ge=1, description="measure every so many-th snapshot, and always the last")


class RetentionAnalysis(Analysis):
    """DISeL paper (arXiv 2605.19028), section 6, Figures 6 to 9, and appendix III.6."""

    name = "retention"
    help = (
        "Target and retention at every snapshot of one or more adaptations; a stopped survey continues.\n\n"
        "--domain is the target, --watch a text whose retention is asked. Writes retention.csv, .md and .json, and a "
        "figure as PNG and SVG."
    )
    examples = "gaintune retention adapters/notes --watch law --benchmarks arc_easy,piqa"
    takes = "snapshots"
    argument = "Adapters with snapshots (train.snapshot_steps)."
    texts = "trained"
    measures_benchmarks = True
    Options = RetentionOptions

    def measure(self, subject: Subject, options: RetentionOptions, progress: Progress) -> Any:
        """Measure every kept snapshot on the target, on watched texts and on benchmarks."""
        from gaintune.evaluate.benchmarks import as_task
        from gaintune.storage import cache_dir

        config = subject.benchmarks
        measured = [] if config is None else [task.name for task in config.tasks]
        return self.part("survey").survey_retention(
            subject.base_plan,
            subject.adapters,
            benchmarks=config,
            target_tasks=[name for name in (as_task(each)["name"] for each in options.target) if name in measured],
            every=options.every,
            cache=None if subject.folder is None else subject.folder / "measured",
            benchmark_cache=cache_dir() / "benchmarks",
            allow_other_base=subject.allow_other_base,
            progress=progress,
        )
