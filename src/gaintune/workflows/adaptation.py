"""One adaptation from start to finish: base, domain, method, training, measurement, and the adapter on disk."""

from __future__ import annotations

import contextlib
import logging
import os
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar, cast

from peft import PeftModel
from torch import nn

from gaintune import adapters, methods
from gaintune.config import MethodConfig, Plan, read_plan
from gaintune.data import ClassifyDomain, DomainBlocks, Padding, load_classification, load_domain, with_replay
from gaintune.errors import ConfigError
from gaintune.evaluate import LabelLoss, Scores, measure_domain, predict, score
from gaintune.models import Base, load_base, load_classifier, load_tokenizer, reads_segments, resolve_device
from gaintune.progress import Progress, Silent, plural
from gaintune.results import DomainLoss, change
from gaintune.storage import ADAPTATION, Run, close_run, describe_environment, open_run, sha256_file
from gaintune.training import Snapshots, check_snapshots, train_stage
from gaintune.workflows.estimate import require_memory
from gaintune.workflows.sequence import describe_inputs
from gaintune.workflows.snapshots import best_snapshot

logger = logging.getLogger(__name__)

HIGHEST_HEAD_LR = 1e-3  # of a new head without a rate in the plan: gains bear ten times what a random matrix does


@dataclass(frozen=True, kw_only=True)
class TrainedAdapter:
    """The adapter that one adaptation trained: its folder, how many parameters were trained, and `steps`, the updates.

    `tokens` are the training tokens seen, those of blocks with prompts and padding; times are of this process.
    """

    adapter: Path
    trainable_parameters: int
    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float


@dataclass(frozen=True, kw_only=True)
class AdaptResult(TrainedAdapter):
    """Outcome of one adaptation to text or instructions; see `TrainedAdapter`.

    Attributes:
        before: loss of the model that training started from, on the domain's validation text.
        after: loss of the adapted model on the same text.
    """

    before: DomainLoss
    after: DomainLoss


@dataclass(frozen=True, kw_only=True)
class ClassifierResult(TrainedAdapter):
    """Outcome of one adaptation to labelled rows; see `TrainedAdapter`. The parameters include the head's.

    Attributes:
        labels: name of each class, in the order of the logits.
        scores: how well the domain's validation rows are classified. (The base has no score: its head is random.
            `scores.majority` is the score of always giving the most frequent label.)
    """

    labels: tuple[str, ...]
    scores: Scores


R = TypeVar("R", bound=TrainedAdapter)


def adapt(
    plan: Plan | Mapping[str, Any] | str | Path,
    out: str | Path,
    *,
    start: str | Path | None = None,
    allow_other_base: bool = False,
    progress: Progress | None = None,
) -> AdaptResult | ClassifierResult:
    """Adapt the plan's base to its domain with its one method, and save the adapter.

    A plan has one domain; with replay, also the earlier domains whose rows are mixed in, and the new one last. Where
    its task is classify, rows have labels, and a new head trains beside the adapter. The base stays frozen unless the
    method trains it. Stopped and started again with the same plan, the training continues from its last checkpoint,
    kept in `OUT.unfinished`.

    Args:
        plan: a `Plan`, nested values such as `{"data": {"domains": ["law"]}, "methods": ["gain-ffn"]}`, or a YAML file.
            The base of a classifier is FacebookAI/roberta-base unless the plan names one.
        out: folder for the adapter; must not exist.
        start: an adapter to continue, such as the previous domain's, or a classifier of the same labels; default: a new
            adapter (and head).
        allow_other_base: continue even if `start` was trained on another base.
        progress: progress display.

    Raises:
        GaintuneError: bad input, or training that had to stop; see each subclass.
    """
    plan = read_plan(plan)
    job = AdaptationJob.of_plan(plan, Path(out), start=start, allow_other_base=allow_other_base, progress=progress)
    with job.run() as run:
        return _adapt_to_labels(job, run) if plan.classifies else _adapt_to_text(job, run)


def adapt_classifier(
    plan: Plan | Mapping[str, Any] | str | Path,
    out: str | Path,
    *,
    start: str | Path | None = None,
    allow_other_base: bool = False,
    progress: Progress | None = None,
) -> ClassifierResult:
    """Adapt the plan's base to its one domain of labelled rows, and save adapter and head.

    It is `adapt` for a plan whose task is classify, such as `{"data": {"task": "classify", "domains": ["mrpc"]}}`, with
    the same arguments. A plan of another task is a ConfigError.
    """
    plan = read_plan(plan)
    if not plan.classifies:
        raise ConfigError("adapt_classifier trains on labels: set data.task=classify")
    result = adapt(plan, out, start=start, allow_other_base=allow_other_base, progress=progress)
    return cast(ClassifierResult, result)


def _adapt_to_text(job: AdaptationJob, run: Run) -> AdaptResult:
    plan = job.plan
    base = load_base(plan.model, dtype=job.method.precision.load)
    *earlier, domain = [load_domain(config, plan.data, base.tokenizer) for config in plan.data.domains]
    for other in earlier:  # budgets and cut are in the hash too, and may well have changed: no error
        if job.previous is not None and other.content_hash != job.previous.content_hashes.get(other.name):
            logger.warning(
                "replay: %s is not the text that %s was trained on: another text, or other budgets, blocks or seed "
                "(data.*). Its rows are replayed as they are now",
                other.name, job.start,
            )  # fmt: skip
    job.check_inputs(run, base.fingerprint, [*earlier, domain])

    def measure(model: nn.Module, when: str, name: str | None = None) -> DomainLoss:
        return measure_domain(model, domain, title=f"measuring {domain.name} {when}", base=name, **job.measuring)

    model = job.model(base, rows=domain.train)
    before = measure(model, "before", None if job.start else plan.model.name)
    rows = with_replay(domain.train, [other.train for other in earlier], job.method.config.replay, plan.train.seed)
    result = job.train(
        run, AdaptResult, model, base, domain, rows,
        lambda model: {"before": before, "after": measure(model, "after")},
        load=lambda: load_base(plan.model, dtype=job.method.precision.load),
        merit=lambda measured: -measured["after"].nats_per_token,
        settings=domain.settings, own_rows=domain.train,
    )  # fmt: skip
    after = result.after
    if run.writes and after.nats_per_token > before.nats_per_token:
        logger.warning(
            "%s got worse in training: its validation perplexity went from %.2f to %.2f (%+.1f %%). The learning rate, "
            "%g, may be too high: try a lower one (--lr, train.lr). The adapter is saved all the same",
            domain.name, before.perplexity, after.perplexity, change(before, after), job.method.lr,
        )  # fmt: skip
    return result


def _adapt_to_labels(job: AdaptationJob, run: Run) -> ClassifierResult:
    plan, rate = job.plan, job.method.lr
    tokenizer, segments = load_tokenizer(plan.model), reads_segments(plan.model)
    domain = load_classification(plan.data.domains[0], plan.classify, tokenizer, seed=plan.data.seed, segments=segments)
    if job.previous is not None and job.previous.labels != domain.labels:
        raise ConfigError(
            f"{job.start} has the labels {', '.join(job.previous.labels)}, domain {domain.name!r} has the labels "
            f"{', '.join(domain.labels)}"
        )
    seed, dtype = plan.train.seed, job.method.precision.load
    load = partial(load_classifier, plan.model, domain.labels, seed=seed, dtype=dtype)
    base = load()
    base.check_length(plan.classify.max_length)
    job.check_inputs(run, base.fingerprint, [domain])
    padding = Padding(base.padding)
    model = job.model(base, task_type="SEQ_CLS", head=base.head, rows=domain.train, collate=padding)
    head_lr = plan.classify.head_lr or min(rate, HIGHEST_HEAD_LR)

    def measure(model: nn.Module) -> dict[str, Any]:
        predictions = predict(model, domain, padding, title=f"measuring {domain.name} after", **job.measuring)
        return {"labels": domain.labels, "scores": score(predictions, plan.evaluate)}

    return job.train(
        run, ClassifierResult, model, base, domain, domain.train, measure, load=load,
        merit=lambda measured: measured["scores"].accuracy.value,
        labels=domain.labels,
        settings={"classify": {**plan.classify.model_dump(mode="json"), "head_lr": head_lr}},
        objective=LabelLoss(model), collate=padding, head_rates={f"{name}.": head_lr / rate for name in base.head},
    )  # fmt: skip


@dataclass(frozen=True)
class AdaptationJob:
    """One adaptation with a plan's one method, which `of_plan` checks as far as possible without loading.

    `method` has the options of `start`, the adapter to continue; `previous` is its record, None also if PEFT wrote it.
    """

    plan: Plan
    method: methods.PreparedMethod
    out: Path
    start: Path | None
    previous: adapters.AdapterRecord | None
    environment: dict[str, Any]
    allow_other_base: bool
    progress: Progress

    @classmethod
    def of_plan(
        cls, plan: Plan, out: Path, *, start: str | Path | None, allow_other_base: bool, progress: Progress | None
    ) -> Self:
        """Check everything that files and settings alone show to be wrong; ConfigError or AdapterError."""
        _require_one_of_each(plan)
        config, previous = plan.methods[0], None
        if plan.classifies and config.replay:
            raise ConfigError("replay is for text and instructions; a classifier has one domain's rows, leave it out")
        if os.path.lexists(out):  # also a link to nothing
            raise ConfigError(f"{out} exists already; name another folder, or delete it if it is no longer wanted")
        methods.check_method(config)
        if start is not None:
            start = Path(start)
            previous, config = resumed_method(start, plan, allow_other_base=allow_other_base)
            if plan.classifies and not (previous and previous.labels):
                raise ConfigError(f"{start} is no classifier of ours; leave start out for a new adapter and head")
        _check_replay(plan, start, previous)
        if config.renormalize is not None:
            raise ConfigError(
                "renormalize acts between the stages of `gaintune sequence`: leave it out for one adapter"
            )
        method = methods.prepare_method(config, plan.model, plan.train)
        methods.rules_of(method, methods.StagePosition(previous=start), seed=plan.train.seed)  # for its errors
        require_memory(plan.model_copy(update={"methods": (config,)}))
        environment = describe_environment(resolve_device(plan.model.device))
        job = cls(plan, method, out, start, previous, environment, allow_other_base, progress or Silent())
        check_snapshots(*job._copies)
        return job

    @contextlib.contextmanager
    def run(self) -> Iterator[Run]:
        """Open the directory of unfinished work; it is gone if the block ends well, or failed before any training."""
        plan, cpu = self.plan.model_dump(mode="json"), resolve_device(self.plan.model.device).type == "cpu"
        with open_run(self._unfinished, plan, self.environment, kind=ADAPTATION, cpu=cpu, remove_if_unused=True) as run:
            yield run
            run.wait()
        if run.writes:
            close_run(self._unfinished, ADAPTATION)

    def check_inputs(self, run: Run, fingerprint: str, domains: Sequence[DomainBlocks | ClassifyDomain]) -> None:
        """Refuse to continue where base, texts or start differ from those that the run began with."""
        start = None if self.start is None else sha256_file(adapters.identity_file(self.start))
        inputs = {**describe_inputs(fingerprint, domains), "start": start}
        run.write_once("inputs.json", inputs, f"To start over, delete {self._unfinished}")

    def model(self, base: Base, **new: Any) -> nn.Module:
        """Return the base ready to train, with the adapter to continue or a new one; `new` goes to `attach`."""
        if self.start is None:
            return methods.attach(base.model, self.method.config, seed=self.plan.train.seed, **new)
        model = adapters.load_adapter(base, self.start, trainable=True, allow_other_base=self.allow_other_base)
        for option, key in self.method.entry.options.items():
            value = getattr(self.method.config, option)
            if option in methods.TRAINING_OPTIONS and key and value is not None:  # other trainers read it from there
                setattr(cast(PeftModel, model).peft_config["default"], key, value)
        return model

    def train(
        self,
        run: Run,
        kind: type[R],
        model: nn.Module,
        base: Base,
        domain: DomainBlocks | ClassifyDomain,
        rows: methods.Rows,
        measure: Callable[[nn.Module], dict[str, Any]],
        *,
        load: Callable[[], Base],
        merit: Callable[[dict[str, Any]], float],
        settings: dict[str, Any],
        labels: tuple[str, ...] = (),
        **more: Any,
    ) -> R:
        """Train on a domain's rows, measure, save the adapter and its copies, and return a result of a kind.

        `measure` returns the fields that this kind of result has of its own. Where the plan keeps the best snapshot,
        `load` makes a base for each snapshot, and the snapshot whose fields have the greatest `merit` is saved.
        `settings` and `labels` go into the adapter's record, `more` to `train_stage`.
        """
        record = adapters.AdapterRecord.of_plan(
            self.plan,
            self.method,
            base.fingerprint,
            [domain],
            versions=self.environment["packages"],
            settings=settings,
            previous=self.previous,
            labels=labels,
        )
        every, (unfinished, finished) = self.plan.train.snapshot_steps, self._copies
        if run.writes and finished.exists():  # a run stopped before its adapter was written
            finished.replace(unfinished)
        trained = train_stage(
            model,
            self.method,
            rows,
            self.plan.train,
            methods.StagePosition(previous=self.start),
            checkpoints=self._unfinished / "checkpoints",
            snapshots=Snapshots(unfinished, every, record) if every else None,
            logs=self.out.with_name(f"{self.out.name}.tensorboard"),
            title=f"{self.method.config.label}: learning {domain.name}",
            progress=self.progress,
            **more,
        )
        best = None
        if self.plan.train.keep == "best":
            run.wait()  # until all snapshots are written
            best, results = best_snapshot(unfinished, load, measure, merit)
            measured = results[best]
        else:
            measured = measure(model)
        if run.writes:
            if unfinished.exists():
                unfinished.replace(finished)
            if best is None:
                adapters.save_adapter(model, self.out, record, keep=trained.keep)
            else:
                adapters.copy_adapter(finished / f"step-{best:06d}", self.out, keep=trained.keep)
        numbers = {name: getattr(trained, name) for name in ("steps", "tokens", "seconds", "tokens_per_second")}
        parameters = methods.trainable_parameters(model)
        return kind(adapter=self.out, trainable_parameters=parameters, **numbers, **measured)

    @property
    def measuring(self) -> dict[str, Any]:
        """Options for measuring a model."""
        mixed, batch_size = self.method.precision.mixed, self.plan.evaluate.batch_size
        return {"batch_size": batch_size, "mixed_precision": mixed, "progress": self.progress}

    @property
    def _unfinished(self) -> Path:
        return self.out.with_name(f"{self.out.name}.unfinished")

    @property
    def _copies(self) -> tuple[Path, Path]:
        """Folders of the adapter's copies: among the unfinished work, and beside the finished adapter."""
        return self._unfinished / "snapshots", self.out.with_name(f"{self.out.name}.snapshots")


def _require_one_of_each(plan: Plan) -> None:
    """Refuse a plan of several methods, of several domains without replay, or with watched domains."""
    if plan.data.watched:
        watched = ", ".join(domain.name for domain in plan.data.watched)
        raise ConfigError(f"data.watched: adapt measures only its own domain; leave {watched} out")
    if plan.data.stream:
        raise ConfigError("data.stream: a stream is of `gaintune sequence`; leave it out for one adapter")
    names = {
        "domain": [domain.name for domain in plan.data.domains],
        "method": [method.label for method in plan.methods],
    }
    several = [what for what in names if len(names[what]) > 1 and not (what == "domain" and plan.methods[0].replay)]
    if several:
        held = " and ".join(f"{plural(len(names[what]), what)} ({', '.join(names[what])})" for what in names)
        options = " and ".join(f"--{what}" for what in several)
        raise ConfigError(
            f"adapt takes one domain and one method, and the plan has {held}: choose one with {options}; "
            "`gaintune sequence` takes several"
        )


def resumed_method(
    start: Path, plan: Plan, *, allow_other_base: bool = False
) -> tuple[adapters.AdapterRecord | None, MethodConfig]:
    """Read the record of the adapter that a plan continues (None for a foreign one) and complete the plan's method.

    Options that the plan leaves out are the adapter's own; only those of training alone may change. Rate, penalty and
    replay are the plan's. Nothing is loaded. Warns where the plan splits or writes a domain in another way than before.

    Raises:
        AdapterError, BaseMismatchError: not an adapter folder, a damaged one, or one of another base.
        ConfigError: another method made it, or with other options than the plan gives.
    """
    record, method, advice = adapters.read_record(start), plan.methods[0], "leave --start out to start over"
    if record is None:
        config, entry = adapters.read_config(start), methods.check_method(method)
        if methods.kind_of(config) != entry.kind:
            raise ConfigError(
                f"{start} is a {methods.kind_of(config)} adapter, and method {method.name!r} continues "
                f"{entry.kind or 'full weights'}: choose its own method with --method, or {advice}"
            )
        had = methods.stored_options(entry, config, method.config or ())
    elif record.method != method.name:
        raise ConfigError(
            f"{start} was made by method {record.method!r}, and {method.name!r} cannot continue it: use --method "
            f"{record.method}, or {advice}"
        )
    else:
        had = MethodConfig.model_validate(record.settings.get("method", {"name": record.method}))
    fixed = {
        option: (getattr(method, option), getattr(had, option)) for option in methods.OPTIONS if option != "config"
    }
    fixed |= {key: (value, (had.config or {}).get(key)) for key, value in (method.config or {}).items()}
    for option, (given, held) in fixed.items():
        if option in methods.TRAINING_OPTIONS:
            continue
        if given is not None and given != held:
            made = f"without choosing {option}" if held is None else f"with {option} {reprlib.repr(held)}"
            raise ConfigError(
                f"{start} was made {made}, and cannot be continued with {given!r}: leave {option} out, or {advice}"
            )
    adapters.check_adapters([start], plan.model, plan.data, allow_other_base=allow_other_base)
    kept = {option: getattr(had, option) for option in methods.OPTIONS if getattr(method, option) is None}
    kept["config"] = had.config
    return record, method.model_copy(update=kept)


def _check_replay(plan: Plan, start: Path | None, previous: adapters.AdapterRecord | None) -> None:
    """Refuse replay without the earlier domains' texts, and of domains that the adapter was not trained on."""
    if not plan.methods[0].replay:
        return
    earlier = [domain.name for domain in plan.data.domains[:-1]]
    trained = previous.domains if previous else ()
    if not earlier or start is None:
        named = " ".join(f"--domain {name}" for name in [*(trained or ("earlier",)), plan.data.domains[-1].name])
        given, wanted = ("", "--start, and those") if start is None else (f", on which {start} was trained", "those")
        raise ConfigError(
            f"replay mixes in rows of earlier domains{given}: give {wanted} before the new one ({named}); or leave "
            "replay out"
        )
    unknown = [name for name in earlier if previous is not None and name not in trained]
    if unknown:
        raise ConfigError(f"replay: {start} was trained on {', '.join(trained)}, not on {', '.join(unknown)}")
