"""One adaptation from start to finish: base, domain, method, training, a look at the result, the adapter on disk."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gaintune.config import Plan, read_plan
from gaintune.data import load_domain, with_replay
from gaintune.evaluate import measure_domain
from gaintune.models import load_base
from gaintune.progress import Progress
from gaintune.results import DomainLoss, change
from gaintune.workflows.classification import ClassifierResult, adapt_classifier
from gaintune.workflows.job import AdaptationJob, Result, warn_of_other_text

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class AdaptResult(Result):
    """What one adaptation to text or instructions did; see `Result`.

    Attributes:
        before: loss of the model it started from, on the domain's validation text.
        after: loss of the adapted model on the same text.
    """

    before: DomainLoss
    after: DomainLoss


def adapt(
    plan: Plan | Mapping[str, Any] | str | Path,
    out: str | Path,
    *,
    start: str | Path | None = None,
    allow_other_base: bool = False,
    progress: Progress | None = None,
) -> AdaptResult | ClassifierResult:
    """Adapt the plan's base to its domain with its one method, and save the adapter.

    Where the plan's task is classify, this is `gaintune.workflows.classification.adapt_classifier`.

    A plan of one domain; with replay, of the earlier domains whose rows are mixed in, and the new one last. Stopped and
    started again with the same plan, it continues from its last checkpoint, kept in `OUT.unfinished`.

    Args:
        plan: a `Plan`, nested values such as `{"data": {"domains": ["law"]}, "methods": ["gain-ffn"]}`, or a YAML file.
        out: folder for the adapter; must not exist.
        start: an adapter to carry on from, such as the previous domain's; a new one unless given.
        allow_other_base: carry on even if `start` was trained on another base.
        progress: where to show progress; nowhere unless given.

    Raises:
        GaintuneError: bad input, or training that had to stop; see each subclass.
    """
    settled = read_plan(plan)
    if settled.classifies:
        return adapt_classifier(settled, out, start=start, allow_other_base=allow_other_base, progress=progress)
    job = AdaptationJob.of_plan(settled, Path(out), start=start, allow_other_base=allow_other_base, progress=progress)
    with job.run() as run:
        base = load_base(settled.model, dtype=job.method.precision.load)
        *earlier, domain = [load_domain(each, settled.data, base.tokenizer) for each in settled.data.domains]
        warn_of_other_text(job.start, job.previous, earlier)
        job.check_inputs(run, base.fingerprint, [*earlier, domain])

        def look(model: torch.nn.Module, when: str, base: str | None = None) -> DomainLoss:
            return measure_domain(
                model,
                domain,
                batch_size=settled.evaluate.batch_size,
                mixed_precision=job.method.precision.mixed,
                title=f"measuring {domain.name} {when}",
                base=base,
                progress=job.progress,
            )

        model = job.model(base)
        before = look(model, "before", base=None if job.start else settled.model.name)
        replay, seed = job.method.config.replay, settled.train.seed
        rows = with_replay(domain.train, [each.train for each in earlier], replay, seed)
        record = job.record(base, domain)
        trained = job.train(run, model, rows, domain, record, own_rows=domain.train)
        after = look(model, "after")
        if run.writes:
            _warn_of_worse(domain.name, before, after, job.method.lr)
        job.save(run, model, trained, record)
    return job.result(AdaptResult, model, trained, before=before, after=after)


def _warn_of_worse(domain: str, before: DomainLoss, after: DomainLoss, lr: float) -> None:
    """Say it where a domain was unlearnt; the adapter is saved all the same, for whoever wants to look at it."""
    if after.nats_per_token > before.nats_per_token:
        logger.warning(
            "%s got worse by learning it: its validation perplexity went from %.2f to %.2f (%+.1f %%). The learning "
            "rate, %g, may be too high: try a lower one (--lr, train.lr). The adapter is saved all the same",
            domain, before.perplexity, after.perplexity, change(before, after), lr,
        )  # fmt: skip
