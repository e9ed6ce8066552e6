"""One adaptation from start to finish: base, domain, method, training, a look at the result, the adapter on disk."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gaintune.adapters import AdapterRecord, adapter_weights, save_adapter
from gaintune.carry_on import carried_on, check_replay, open_adapter, require_one_of_each, warn_of_other_text
from gaintune.classification import ClassifierResult, adapt_classifier
from gaintune.config import Plan, read_plan
from gaintune.data.blocks import load_domain
from gaintune.data.replay import with_replay
from gaintune.environment import describe_environment
from gaintune.errors import ConfigError
from gaintune.evaluate.losses import DomainLoss, change
from gaintune.evaluate.perplexity import measure
from gaintune.learning import learn
from gaintune.methods import attach, check_method, learning_rate, numbers_of, rules_of, trainable_parameters
from gaintune.models import load_base, resolve_device
from gaintune.progress import Progress, Silent
from gaintune.runs import open_run, sha256_file
from gaintune.sequence import describe_inputs
from gaintune.updates import Place

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AdaptResult:
    """What one adaptation did.

    Attributes:
        adapter: folder of the adapter.
        before: loss of the model it started from, on the domain's validation text.
        after: loss of the adapted model on the same text.
        trainable_parameters: numbers trained.
        steps: optimizer updates.
        tokens: training tokens seen.
        seconds: training time in this process.
        tokens_per_second: training tokens per second.
    """

    adapter: Path
    before: DomainLoss
    after: DomainLoss
    trainable_parameters: int
    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float


def adapt(
    plan: Plan | Mapping[str, Any] | str | Path,
    out: str | Path,
    *,
    start: str | Path | None = None,
    allow_other_base: bool = False,
    progress: Progress | None = None,
) -> AdaptResult | ClassifierResult:
    """Adapt the plan's base to its domain with its one method, and save the adapter.

    Where the plan's task is classify, this is `gaintune.classification.adapt_classifier`.

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
    out = Path(out)
    require_one_of_each(settled)
    if out.exists():
        raise ConfigError(f"{out} exists already; name another folder, or delete it if it is no longer wanted")
    method, shown = settled.methods[0], progress or Silent()
    check_method(method)
    start = None if start is None else Path(start)
    previous = None
    if start is not None:
        previous, method = carried_on(start, settled, allow_other_base=allow_other_base)
    check_replay(settled, start, previous)
    place = Place(previous=start)
    rules_of(method, place, seed=settled.train.seed)  # refuses before the base is loaded
    numbers = numbers_of(settled.model, method)
    device = resolve_device(settled.model.device)
    environment = describe_environment(device)
    unfinished = out.with_name(f"{out.name}.unfinished")
    with open_run(unfinished, settled, environment, cpu=device.type == "cpu", fleeting=True) as run:
        base = load_base(settled.model, dtype=numbers.load)
        *earlier, domain = [load_domain(each, settled.data, base.tokenizer) for each in settled.data.domains]
        if start is not None and previous is not None:
            warn_of_other_text(start, previous, earlier)
        inputs = {
            **describe_inputs(base.fingerprint, [*earlier, domain]),
            "start": None if start is None else sha256_file(adapter_weights(start)),
        }
        run.settle("inputs.json", inputs, f"To begin anew, delete {unfinished}")

        def look(model: torch.nn.Module, title: str) -> DomainLoss:
            return measure(
                model,
                domain.validation,
                domain.validation_bytes,
                batch_size=settled.evaluate.batch_size,
                mixed_precision=numbers.mixed,
                title=title,
                progress=shown,
            )

        if start is None:
            model = attach(base.model, method, seed=settled.train.seed)
        else:
            model = open_adapter(base, start, method, allow_other_base=allow_other_base)
        before = look(model, f"measuring {domain.name} before")
        learnt = learn(
            model,
            method,
            with_replay(domain.train, [each.train for each in earlier], method.replay, settled.train.seed),
            settled.train,
            place,
            own_rows=domain.train,
            checkpoints=unfinished / "checkpoints",
            logs=out.with_name(f"{out.name}.tensorboard"),
            mixed_precision=numbers.mixed,
            title=f"{method.label}: learning {domain.name}",
            progress=shown,
        )
        record = AdapterRecord.of_plan(
            settled,
            method,
            fingerprint=base.fingerprint,
            learnt=[(domain.name, domain.content_hash)],
            versions=environment["packages"],
            previous=previous,
        )
        after = look(model, f"measuring {domain.name} after")
        if run.writes:
            _warn_of_worse(domain.name, before, after, learning_rate(method, settled.train))
            save_adapter(model, out, record, keep=learnt.keep)
        run.wait()
    if run.writes:
        shutil.rmtree(unfinished)
    return AdaptResult(
        adapter=out,
        before=before,
        after=after,
        trainable_parameters=trainable_parameters(model),
        steps=learnt.adaptation.steps,
        tokens=learnt.adaptation.tokens,
        seconds=learnt.adaptation.seconds,
        tokens_per_second=learnt.adaptation.tokens_per_second,
    )


def _warn_of_worse(domain: str, before: DomainLoss, after: DomainLoss, lr: float) -> None:
    """Say it where a domain was unlearnt; the adapter is saved all the same, for whoever wants to look at it."""
    if after.nats_per_token > before.nats_per_token:
        logger.warning(
            "%s got worse by learning it: its validation perplexity went from %.2f to %.2f (%+.1f %%). The learning "
            "rate, %g, may be too high: try a lower one (--lr, train.lr). The adapter is saved all the same",
            domain, before.perplexity, after.perplexity, change(before, after), lr,
        )  # fmt: skip
