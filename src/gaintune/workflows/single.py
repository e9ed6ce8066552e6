"""What every single adaptation begins and ends with, whatever it learns: checks, run directory, adapter, result."""

from __future__ import annotations

import contextlib
import logging
import os
import reprlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar, cast

from peft import PeftModel
from torch import nn

from gaintune.adapters.disk import (
    AdapterRecord,
    adapter_weights,
    check_adapters,
    load_adapter,
    read_config,
    read_record,
    save_adapter,
)
from gaintune.config.plan import MethodConfig, Plan
from gaintune.data.classify import ClassifyDomain
from gaintune.data.examples import DomainBlocks
from gaintune.data.load import DomainBlocks
from gaintune.errors import ConfigError
from gaintune.methods.attach import (
    OPTIONS,
    TRAINING_OPTIONS,
    Numbers,
    attach,
    check_method,
    learning_rate,
    numbers_of,
    rules_of,
    trainable_parameters,
)
from gaintune.methods.peft_configs import kind_of, method_of
from gaintune.methods.rules import Place, Rows
from gaintune.models.base import Base, resolve_device
from gaintune.progress import Progress, Silent, plural
from gaintune.storage.environment import describe_environment
from gaintune.storage.files import sha256_file
from gaintune.storage.ownership import ADAPTATION
from gaintune.storage.run import Run, close_run, open_run
from gaintune.training.snapshots import Shelf, Snapshots
from gaintune.training.train import Learnt, learn
from gaintune.tuners.disel import DiselConfig
from gaintune.workflows.sequence import describe_inputs

logger = logging.getLogger(__name__)


def require_one_of_each(plan: Plan) -> None:
    """Refuse a plan of several methods, of several domains where none is replayed, or one that watches others."""
    if plan.data.watched:
        watched = ", ".join(domain.name for domain in plan.data.watched)
        raise ConfigError(
            f"data.watched: adapt measures its own domain only, and the plan watches {watched}: leave it out"
        )
    one_domain = len(plan.data.domains) == 1 or plan.methods[0].replay
    if len(plan.methods) == 1 and one_domain:
        return
    domains = [domain.name for domain in plan.data.domains]
    methods = [method.label for method in plan.methods]
    held = " and ".join(
        f"{plural(len(names), what)} ({', '.join(names)})" for what, names in (("domain", domains), ("method", methods))
    )
    options = " and ".join(
        option for option, chosen in (("--domain", one_domain), ("--method", len(methods) == 1)) if not chosen
    )
    raise ConfigError(
        f"adapt takes one domain and one method, and the plan has {held}: choose one with {options}; "
        "`gaintune sequence` takes several"
    )


def carried_on(start: Path, plan: Plan, *, allow_other_base: bool = False) -> tuple[AdapterRecord | None, MethodConfig]:
    """The record of the adapter that a plan carries on, None for a foreign one, and the plan's method as that has it.

    What the adapter was made with stays: options that the plan leaves out are the adapter's own, and only those of
    training alone may be given anew. Rate, penalty and replay are the plan's. Nothing is loaded. Warns where the plan
    splits or writes a domain that the adapter has learnt otherwise.

    Raises:
        AdapterError, BaseMismatchError: not an adapter folder, a damaged one, or one of another base.
        ConfigError: another method made it, or with other options than the plan gives.
    """
    record, method = read_record(start), plan.methods[0]
    had = _foreign(start, method) if record is None else _ours(start, record, method)
    for option in (option for option in OPTIONS if option not in TRAINING_OPTIONS):
        given, held = getattr(method, option), getattr(had, option)
        if given is not None and given != held:
            made = f"without choosing {option}" if held is None else f"with {option} {reprlib.repr(held)}"
            raise ConfigError(
                f"{start} was made {made}, and cannot be carried on with {given!r}: leave {option} out, or leave "
                "--start out to begin anew"
            )
    check_adapters([start], plan.model, plan.data, allow_other_base=allow_other_base)
    kept = {option: getattr(had, option) for option in OPTIONS if getattr(method, option) is None}
    return record, method.model_copy(update=kept)


def _ours(start: Path, record: AdapterRecord, method: MethodConfig) -> MethodConfig:
    """The method that made an adapter of ours; refuses another than the plan's."""
    if record.method != method.name:
        raise ConfigError(
            f"{start} was made by method {record.method!r}, and {method.name!r} cannot carry it on: use --method "
            f"{record.method}, or leave --start out to begin anew"
        )
    return MethodConfig.model_validate(record.settings.get("method", {"name": record.method}))


def _foreign(start: Path, method: MethodConfig) -> MethodConfig:
    """The plan's method with the options of an adapter that PEFT wrote without us; refuses one of another kind."""
    config, wanted = read_config(start), check_method(method)
    found = kind_of(config)
    if wanted.kind != found:
        raise ConfigError(
            f"{start} is a {found} adapter, and method {method.name!r} carries on {wanted.kind or 'full weights'}: "
            "choose its own method with --method, or leave --start out to begin anew"
        )
    return method_of(config, method.name, wanted.options)


def open_adapter(base: Base, start: Path, method: MethodConfig, *, allow_other_base: bool = False) -> nn.Module:
    """Load an adapter to go on training it; a gate rate given anew is its own from now on. Raises as `load_adapter`."""
    model = load_adapter(base, start, trainable=True, allow_other_base=allow_other_base)
    if method.gate_lr_ratio is not None:  # other trainers read it from the adapter's configuration
        adapted = cast(PeftModel, model)
        cast(DiselConfig, adapted.peft_config[str(adapted.active_adapter)]).gate_lr_ratio = method.gate_lr_ratio
    return model


def check_replay(plan: Plan, start: Path | None, previous: AdapterRecord | None) -> None:
    """Replay needs the earlier domains' texts: refuse it without, and domains that the adapter has not learnt."""
    method, *_ = plan.methods
    earlier = [domain.name for domain in plan.data.domains[:-1]]
    if not method.replay:
        return
    if not earlier or start is None:
        learnt = previous.domains if previous else ("earlier",)
        named = " ".join(f"--domain {name}" for name in [*learnt, plan.data.domains[-1].name])
        given, wanted = ("", "--start, and those") if start is None else (f", which {start} has learnt", "those")
        raise ConfigError(
            f"replay mixes in rows of earlier domains{given}: give {wanted} before the new one ({named}); or leave "
            "replay out"
        )
    unknown = [name for name in earlier if previous is not None and name not in previous.domains]
    if unknown:
        learnt = ", ".join(previous.domains if previous else ())
        raise ConfigError(f"replay: {start} has not learnt {', '.join(unknown)}; it has learnt {learnt}")


def warn_of_other_text(start: Path | None, previous: AdapterRecord | None, earlier: Sequence[DomainBlocks]) -> None:
    """Say which domains to replay are not, by their content hashes, what the adapter has learnt under their names.

    Budgets and cut are in the hash too and may well be others than they were, so it is no error.
    """
    for domain in earlier:
        if previous is not None and domain.content_hash != previous.content_hashes.get(domain.name):
            logger.warning(
                "replay: %s is not as %s learnt it: another text, or other budgets, blocks or seed (data.*). Its "
                "rows are replayed as they are now",
                domain.name, start,
            )  # fmt: skip


Domain = DomainBlocks | ClassifyDomain


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one adaptation did.

    Attributes:
        adapter: folder of the adapter.
        trainable_parameters: numbers trained.
        steps: optimizer updates.
        tokens: training tokens seen; those of blocks with prompts and padding.
        seconds: training time in this process.
        tokens_per_second: training tokens per second.
    """

    adapter: Path
    trainable_parameters: int
    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float


R = TypeVar("R", bound=Result)


@dataclass(frozen=True)
class Single:
    """One adaptation of a plan's one method, checked as far as nothing need be loaded; see `of_plan`.

    Attributes:
        plan: the plan.
        method: its method, with the options of the adapter that is carried on.
        out: folder for the adapter.
        start: the adapter to carry on, None for a new one.
        previous: its record; None also where PEFT wrote it.
        numbers: what the method computes with.
        environment: of this machine.
        allow_other_base: whether `start` may be of another base.
        progress: where to show it.
    """

    plan: Plan
    method: MethodConfig
    out: Path
    start: Path | None
    previous: AdapterRecord | None
    numbers: Numbers
    environment: dict[str, Any]
    allow_other_base: bool
    progress: Progress

    @classmethod
    def of_plan(
        cls, plan: Plan, out: Path, *, start: str | Path | None, allow_other_base: bool, progress: Progress | None
    ) -> Self:
        """Raises `ConfigError` or `AdapterError` for whatever files and settings alone show to be wrong."""
        require_one_of_each(plan)
        if os.path.lexists(out):  # a link to nothing, too
            raise ConfigError(f"{out} exists already; name another folder, or delete it if it is no longer wanted")
        method, previous = plan.methods[0], None
        check_method(method)
        if start is not None:
            start = Path(start)
            previous, method = carried_on(start, plan, allow_other_base=allow_other_base)
        check_replay(plan, start, previous)
        rules_of(method, Place(previous=start), seed=plan.train.seed)  # for what it refuses
        numbers, environment = numbers_of(plan.model, method), describe_environment(resolve_device(plan.model.device))
        single = cls(plan, method, out, start, previous, numbers, environment, allow_other_base, progress or Silent())
        single._shelf.check()
        return single

    @contextlib.contextmanager
    def run(self) -> Iterator[Run]:
        """The directory that holds what is unfinished; gone when the block ends well, or failed before any training."""
        cpu = resolve_device(self.plan.model.device).type == "cpu"
        with open_run(self._unfinished, self.plan, self.environment, kind=ADAPTATION, cpu=cpu, fleeting=True) as run:
            yield run
            run.wait()
        if run.writes:
            close_run(self._unfinished, ADAPTATION)

    def settle(self, run: Run, fingerprint: str, domains: Sequence[Domain]) -> None:
        """Refuse to go on where base, texts or start are not those that the run began with."""
        start = None if self.start is None else sha256_file(adapter_weights(self.start))
        inputs = {**describe_inputs(fingerprint, domains), "start": start}
        run.settle("inputs.json", inputs, f"To begin anew, delete {self._unfinished}")

    def model(self, base: Base, **new: Any) -> nn.Module:
        """The base ready to train: with the adapter to carry on, or with a new one; `new` goes to `attach`."""
        if self.start is not None:
            return open_adapter(base, self.start, self.method, allow_other_base=self.allow_other_base)
        return attach(base.model, self.method, seed=self.plan.train.seed, **new)

    def record(self, base: Base, domain: Domain, **more: Any) -> AdapterRecord:
        """What is recorded of the finished adapter; `more` goes to `AdapterRecord.of_plan`."""
        return AdapterRecord.of_plan(
            self.plan,
            self.method,
            lr=learning_rate(self.method, self.plan.train),
            fingerprint=base.fingerprint,
            learnt=[(domain.name, domain.content_hash)],
            versions=self.environment["packages"],
            previous=self.previous,
            **more,
        )

    def learn(
        self, run: Run, model: nn.Module, rows: Rows, domain: Domain, record: AdapterRecord, **more: Any
    ) -> Learnt:
        """Train on rows of a domain, keeping the copies the plan asks for; `more` goes to `gaintune.training.train.learn`."""
        if run.writes:
            self._shelf.reopen()
        every = self.plan.train.snapshot_steps
        return learn(
            model,
            self.method,
            rows,
            self.plan.train,
            Place(previous=self.start),
            checkpoints=self._unfinished / "checkpoints",
            snapshots=Snapshots(self._shelf.unfinished, every, record) if every else None,
            logs=self.out.with_name(f"{self.out.name}.tensorboard"),
            mixed_precision=self.numbers.mixed,
            title=f"{self.method.label}: learning {domain.name}",
            progress=self.progress,
            **more,
        )

    def save(self, run: Run, model: nn.Module, learnt: Learnt, record: AdapterRecord) -> None:
        """Write the adapter with its record, and its copies beside it, in the process that writes."""
        if run.writes:
            self._shelf.close()
            save_adapter(model, self.out, record, keep=learnt.keep)

    def result(self, kind: type[R], model: nn.Module, learnt: Learnt, **own: Any) -> R:
        """A result of a kind, whose own fields are given."""
        done = learnt.adaptation
        return kind(
            adapter=self.out,
            trainable_parameters=trainable_parameters(model),
            steps=done.steps,
            tokens=done.tokens,
            seconds=done.seconds,
            tokens_per_second=done.tokens_per_second,
            **own,
        )

    @property
    def _unfinished(self) -> Path:
        return self.out.with_name(f"{self.out.name}.unfinished")

    @property
    def _shelf(self) -> Shelf:
        return Shelf.of(self.out, self._unfinished)
