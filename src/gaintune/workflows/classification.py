"""One classifier from start to finish: base and new head, labelled rows, training, scores, adapter on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gaintune.config import Plan, read_plan
from gaintune.data import ClassifyDomain, Padding, load_classification
from gaintune.errors import ConfigError
from gaintune.evaluate import LabelLoss, Scores, predict, score
from gaintune.models import load_classifier, load_tokenizer, reads_segments
from gaintune.progress import Progress
from gaintune.workflows.job import AdaptationJob, Result

HIGHEST_HEAD_LR = 1e-3  # of a new head, unless the plan gives its rate: gains bear ten times what a random matrix does


@dataclass(frozen=True, kw_only=True)
class ClassifierResult(Result):
    """What one adaptation to labelled rows did; see `Result`. The numbers trained are also the head's.

    Attributes:
        labels: name of each class, in the order of the logits.
        scores: how well the domain's validation rows are classified. (There is no score of the base: its head is
            random. `scores.majority` is what always giving the most frequent label would reach.)
    """

    labels: tuple[str, ...]
    scores: Scores


def adapt_classifier(
    plan: Plan | Mapping[str, Any] | str | Path,
    out: str | Path,
    *,
    start: str | Path | None = None,
    allow_other_base: bool = False,
    progress: Progress | None = None,
) -> ClassifierResult:
    """Adapt the plan's base to its one domain of labelled rows with its one method, and save adapter and head.

    The base is frozen (unless the method trains it), the head is new and trains beside the adapter. Stopped and
    started again with the same plan, it continues from its last checkpoint, kept in `OUT.unfinished`.

    Args:
        plan: a `Plan`, nested values such as `{"data": {"task": "classify", "domains": ["mrpc"]}}`, or a YAML file.
            The base is FacebookAI/roberta-base unless it names one.
        out: folder for the adapter; must not exist.
        start: a classifier of the same labels to carry on from; a new adapter and head unless given.
        allow_other_base: carry on even if `start` was trained on another base.
        progress: where to show progress; nowhere unless given.

    Raises:
        GaintuneError: bad input, or training that had to stop; see each subclass.
    """
    settled = read_plan(plan)
    if not settled.classifies:
        raise ConfigError("adapt_classifier learns labels: set data.task=classify")
    if settled.methods[0].replay:
        raise ConfigError("replay is for text and instructions; a classifier learns one domain's rows, leave it out")
    job = AdaptationJob.of_plan(settled, Path(out), start=start, allow_other_base=allow_other_base, progress=progress)
    if job.start is not None and not (job.previous and job.previous.labels):
        raise ConfigError(f"{start} is no classifier of ours to carry on; leave start out for a new adapter and head")
    with job.run() as run:
        domain = load_classification(
            settled.data.domains[0],
            settled.classify,
            load_tokenizer(settled.model),
            seed=settled.data.seed,
            segments=reads_segments(settled.model),
        )
        _require_labels(job, domain)
        base = load_classifier(settled.model, domain.labels, seed=settled.train.seed, dtype=job.method.precision.load)
        base.check_length(settled.classify.max_length)
        job.check_inputs(run, base.fingerprint, [domain])
        model = job.model(base, task_type="SEQ_CLS", head=base.head)
        head_lr = settled.classify.head_lr or min(job.method.lr, HIGHEST_HEAD_LR)
        classify = {**settled.classify.model_dump(mode="json"), "head_lr": head_lr}
        record = job.record(base, domain, labels=domain.labels, settings={"classify": classify})
        padding = Padding(base.padding)
        trained = job.train(
            run,
            model,
            domain.train,
            domain,
            record,
            objective=LabelLoss(model),
            collate=padding,
            head_rates={f"{name}.": head_lr / job.method.lr for name in base.head},
        )
        predictions = predict(
            model,
            domain,
            padding,
            batch_size=settled.evaluate.batch_size,
            mixed_precision=job.method.precision.mixed,
            title=f"measuring {domain.name} after",
            progress=job.progress,
        )
        job.save(run, model, trained, record)
    scores = score(predictions, settled.evaluate)
    return job.result(ClassifierResult, model, trained, labels=domain.labels, scores=scores)


def _require_labels(job: AdaptationJob, domain: ClassifyDomain) -> None:
    """Refuse a head for other labels than the domain's."""
    if job.previous is not None and job.previous.labels != domain.labels:
        raise ConfigError(
            f"{job.start} tells {', '.join(job.previous.labels)} apart, domain {domain.name!r} has the labels "
            f"{', '.join(domain.labels)}"
        )
