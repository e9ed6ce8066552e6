"""One classifier from start to finish: base and new head, labelled rows, training, scores, adapter on disk."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gaintune.adapters import AdapterRecord, adapter_weights, save_adapter
from gaintune.carry_on import carried_on, open_adapter, require_one_of_each
from gaintune.config import Plan, read_plan
from gaintune.data.classify import ClassifyDomain, Padding, load_classification
from gaintune.environment import describe_environment
from gaintune.errors import ConfigError
from gaintune.evaluate.classification import Scores, score
from gaintune.evaluate.predict import LabelLoss, predict
from gaintune.heads import ClassifierBase, load_classifier, reads_segments
from gaintune.learning import learn
from gaintune.methods import attach, check_method, learning_rate, numbers_of, rules_of, trainable_parameters
from gaintune.models import load_tokenizer, resolve_device
from gaintune.progress import Progress, Silent
from gaintune.runs import open_run, sha256_file
from gaintune.updates import Place

HIGHEST_HEAD_LR = 1e-3  # gains learn at ten times what a random matrix bears


@dataclass(frozen=True)
class ClassifierResult:
    """What one adaptation to labelled rows did.

    Attributes:
        adapter: folder of the adapter with its head; the label names are in its record.
        labels: name of each class, in the order of the logits.
        scores: how well the domain's validation rows are classified. (There is no score of the base: its head is
            random. `scores.majority` is what always giving the most frequent label would reach.)
        trainable_parameters: numbers trained, the head's among them.
        steps: optimizer updates.
        tokens: training tokens seen.
        seconds: training time in this process.
        tokens_per_second: training tokens per second.
    """

    adapter: Path
    labels: tuple[str, ...]
    scores: Scores
    trainable_parameters: int
    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float


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
    settled, out = read_plan(plan), Path(out)
    if not settled.classifies:
        raise ConfigError("adapt_classifier learns labels: set data.task=classify")
    if settled.methods[0].replay:
        raise ConfigError("replay is for text and instructions; a classifier learns one domain's rows, leave it out")
    require_one_of_each(settled)
    if out.exists():
        raise ConfigError(f"{out} exists already; name another folder, or delete it if it is no longer wanted")
    method, shown = settled.methods[0], progress or Silent()
    check_method(method)
    start = None if start is None else Path(start)
    previous = None
    if start is not None:
        previous, method = carried_on(start, settled, allow_other_base=allow_other_base)
        if previous is None or not previous.labels:
            raise ConfigError(
                f"{start} is no classifier of ours to carry on; leave start out for a new adapter and head"
            )
    place = Place(previous=start)
    rules_of(method, place, seed=settled.train.seed)  # refuses before the base is loaded
    numbers = numbers_of(settled.model, method)
    device = resolve_device(settled.model.device)
    environment = describe_environment(device)
    unfinished = out.with_name(f"{out.name}.unfinished")
    with open_run(unfinished, settled, environment, cpu=device.type == "cpu", fleeting=True) as run:
        domain = load_classification(
            settled.data.domains[0],
            settled.classify,
            load_tokenizer(settled.model),
            seed=settled.data.seed,
            segments=reads_segments(settled.model),
        )
        if previous is not None:
            _require_labels(start, previous, domain)
        base = load_classifier(settled.model, domain.labels, seed=settled.train.seed, dtype=numbers.load)
        base.check_length(settled.classify.max_length)
        inputs = {
            "base_fingerprint": base.fingerprint,
            "domains": {domain.name: domain.describe()},
            "start": None if start is None else sha256_file(adapter_weights(start)),
        }
        run.settle("inputs.json", inputs, f"To begin anew, delete {unfinished}")
        if start is None:
            model = attach(base.model, method, seed=settled.train.seed, task_type="SEQ_CLS", head=base.head)
        else:
            model = open_adapter(base, start, method, allow_other_base=allow_other_base)
        padding = Padding(base.padding)
        learnt = learn(
            model,
            method,
            domain.train,
            settled.train,
            place,
            checkpoints=unfinished / "checkpoints",
            objective=LabelLoss(model),
            collate=padding,
            head_rates=_head_rates(base, settled),
            logs=out.with_name(f"{out.name}.tensorboard"),
            mixed_precision=numbers.mixed,
            title=f"{method.label}: learning {domain.name}",
            progress=shown,
        )
        predictions = predict(
            model,
            domain,
            padding,
            batch_size=settled.evaluate.batch_size,
            mixed_precision=numbers.mixed,
            title=f"measuring {domain.name} after",
            progress=shown,
        )
        record = AdapterRecord.of_plan(
            settled,
            method,
            fingerprint=base.fingerprint,
            learnt=[(domain.name, domain.content_hash)],
            versions=environment["packages"],
            previous=previous,
            labels=domain.labels,
            settings={"classify": {**settled.classify.model_dump(mode="json"), "head_lr": head_learning_rate(settled)}},
        )
        if run.writes:
            save_adapter(model, out, record, keep=learnt.keep)
        run.wait()
    if run.writes:
        shutil.rmtree(unfinished)
    return ClassifierResult(
        adapter=out,
        labels=domain.labels,
        scores=score(predictions, settled.evaluate),
        trainable_parameters=trainable_parameters(model),
        steps=learnt.adaptation.steps,
        tokens=learnt.adaptation.tokens,
        seconds=learnt.adaptation.seconds,
        tokens_per_second=learnt.adaptation.tokens_per_second,
    )


def _require_labels(start: Path | None, record: AdapterRecord, domain: ClassifyDomain) -> None:
    """Refuse a head for other labels than the domain's."""
    if record.labels != domain.labels:
        raise ConfigError(
            f"{start} tells {', '.join(record.labels)} apart, domain {domain.name!r} has the labels "
            f"{', '.join(domain.labels)}"
        )


def head_learning_rate(plan: Plan) -> float:
    """The peak rate of a new head: the plan's, else the method's but at most `HIGHEST_HEAD_LR`."""
    return plan.classify.head_lr or min(learning_rate(plan.methods[0], plan.train), HIGHEST_HEAD_LR)


def _head_rates(base: ClassifierBase, plan: Plan) -> dict[str, float]:
    """The factor on the method's rate for every part of the head, by the beginning of its parameters' names."""
    factor = head_learning_rate(plan) / learning_rate(plan.methods[0], plan.train)
    return {f"{name}.": factor for name in base.head}
