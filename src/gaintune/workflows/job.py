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

from gaintune.adapters import (
    AdapterRecord,
    adapter_weights,
    check_adapters,
    load_adapter,
    read_config,
    read_record,
    save_adapter,
)
from gaintune.config import MethodConfig, Plan
from gaintune.data import ClassifyDomain, DomainBlocks
from gaintune.errors import ConfigError
from gaintune.methods import (
    OPTIONS,
    TRAINING_OPTIONS,
    PreparedMethod,
    Rows,
    StagePosition,
    attach,
    check_method,
    kind_of,
    prepare_method,
    rules_of,
    stored_options,
    trainable_parameters,
)
from gaintune.models import Base, resolve_device
from gaintune.progress import Progress, Silent, plural
from gaintune.storage import ADAPTATION, Run, close_run, describe_environment, open_run, sha256_file
from gaintune.training import Shelf, Snapshots, TrainedStage, train_stage
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


def resumed_method(
    start: Path, plan: Plan, *, allow_other_base: bool = False
) -> tuple[AdapterRecord | None, MethodConfig]:
    """The record of the adapter that a plan carries on, None for a foreign one, and the plan's method as that has it.

    What the adapter was made with stays: options that the plan leaves out are the adapter's own, and only those of
    training alone may be given anew. Rate, penalty and replay are the plan's. Nothing is loaded. Warns where the plan
    splits or writes a domain that the adapter has learnt otherwise.

    Raises:
        AdapterError, BaseMismatchError: not an adapter folder, a damaged one, or one of another base.
        ConfigError: another method made it, or with other options than the plan gives.
    """
    record, method = read_record(start), plan.methods[0]
    if record is None:
        config, entry = read_config(start), check_method(method)
        if kind_of(config) != entry.kind:
            raise ConfigError(
                f"{start} is a {kind_of(config)} adapter, and method {method.name!r} carries on "
                f"{entry.kind or 'full weights'}: choose its own method with --method, or leave --start out to begin "
                "anew"
            )
        had = stored_options(entry, config)
    elif record.method != method.name:
        raise ConfigError(
            f"{start} was made by method {record.method!r}, and {method.name!r} cannot carry it on: use --method "
            f"{record.method}, or leave --start out to begin anew"
        )
    else:
        had = MethodConfig.model_validate(record.settings.get("method", {"name": record.method}))
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


def check_replay(plan: Plan, start: Path | None, previous: AdapterRecord | None) -> None:
    """Replay needs the earlier domains' texts: refuse it without, and domains that the adapter has not learnt."""
    method, *_ = plan.methods
    earlier = [domain.name for domain in plan.data.domains[:-1]]
    if not method.replay:
        return
    if not earlier or start is None:
        trained = previous.domains if previous else ("earlier",)
        named = " ".join(f"--domain {name}" for name in [*trained, plan.data.domains[-1].name])
        given, wanted = ("", "--start, and those") if start is None else (f", which {start} has learnt", "those")
        raise ConfigError(
            f"replay mixes in rows of earlier domains{given}: give {wanted} before the new one ({named}); or leave "
            "replay out"
        )
    unknown = [name for name in earlier if previous is not None and name not in previous.domains]
    if unknown:
        trained = ", ".join(previous.domains if previous else ())
        raise ConfigError(f"replay: {start} has not learnt {', '.join(unknown)}; it has learnt {trained}")


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
class AdaptationJob:
    """One adaptation of a plan's one method, checked as far as nothing need be loaded; see `of_plan`.

    Attributes:
        plan: the plan.
        method: its method, with the options of the adapter that is carried on.
        out: folder for the adapter.
        start: the adapter to carry on, None for a new one.
        previous: its record; None also where PEFT wrote it.
        environment: of this machine.
        allow_other_base: whether `start` may be of another base.
        progress: where to show it.
    """

    plan: Plan
    method: PreparedMethod
    out: Path
    start: Path | None
    previous: AdapterRecord | None
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
        config, previous = plan.methods[0], None
        check_method(config)
        if start is not None:
            start = Path(start)
            previous, config = resumed_method(start, plan, allow_other_base=allow_other_base)
        check_replay(plan, start, previous)
        method = prepare_method(config, plan.model, plan.train)
        rules_of(method, StagePosition(previous=start), seed=plan.train.seed)  # for what it refuses
        environment = describe_environment(resolve_device(plan.model.device))
        job = cls(plan, method, out, start, previous, environment, allow_other_base, progress or Silent())
        job._shelf.check()
        return job

    @contextlib.contextmanager
    def run(self) -> Iterator[Run]:
        """The directory that holds what is unfinished; gone when the block ends well, or failed before any training."""
        cpu = resolve_device(self.plan.model.device).type == "cpu"
        with open_run(
            self._unfinished,
            self.plan.model_dump(mode="json"),
            self.environment,
            kind=ADAPTATION,
            cpu=cpu,
            fleeting=True,
        ) as run:
            yield run
            run.wait()
        if run.writes:
            close_run(self._unfinished, ADAPTATION)

    def check_inputs(self, run: Run, fingerprint: str, domains: Sequence[Domain]) -> None:
        """Refuse to go on where base, texts or start are not those that the run began with."""
        start = None if self.start is None else sha256_file(adapter_weights(self.start))
        inputs = {**describe_inputs(fingerprint, domains), "start": start}
        run.settle("inputs.json", inputs, f"To begin anew, delete {self._unfinished}")

    def model(self, base: Base, **new: Any) -> nn.Module:
        """The base ready to train: with the adapter to carry on, or with a new one; `new` goes to `attach`."""
        if self.start is None:
            return attach(base.model, self.method.config, seed=self.plan.train.seed, **new)
        model = load_adapter(base, self.start, trainable=True, allow_other_base=self.allow_other_base)
        for option, key in self.method.entry.options.items():
            value = getattr(self.method.config, option)
            if option in TRAINING_OPTIONS and key and value is not None:  # other trainers read it from there
                setattr(cast(PeftModel, model).peft_config["default"], key, value)
        return model

    def record(self, base: Base, domain: Domain, **more: Any) -> AdapterRecord:
        """What is recorded of the finished adapter; `more` goes to `AdapterRecord.of_plan`."""
        return AdapterRecord.of_plan(
            self.plan,
            self.method.config,
            lr=self.method.lr,
            fingerprint=base.fingerprint,
            trained=[(domain.name, domain.content_hash)],
            versions=self.environment["packages"],
            previous=self.previous,
            **more,
        )

    def train(
        self, run: Run, model: nn.Module, rows: Rows, domain: Domain, record: AdapterRecord, **more: Any
    ) -> TrainedStage:
        """Train on rows of a domain, keeping the copies the plan asks for; `more` goes to `train_stage`."""
        if run.writes:
            self._shelf.reopen()
        every = self.plan.train.snapshot_steps
        return train_stage(
            model,
            self.method,
            rows,
            self.plan.train,
            StagePosition(previous=self.start),
            checkpoints=self._unfinished / "checkpoints",
            snapshots=Snapshots(self._shelf.unfinished, every, record) if every else None,
            logs=self.out.with_name(f"{self.out.name}.tensorboard"),
            title=f"{self.method.config.label}: learning {domain.name}",
            progress=self.progress,
            **more,
        )

    def save(self, run: Run, model: nn.Module, trained: TrainedStage, record: AdapterRecord) -> None:
        """Write the adapter with its record, and its copies beside it, in the process that writes."""
        if run.writes:
            self._shelf.close()
            save_adapter(model, self.out, record, keep=trained.keep)

    def result(self, kind: type[R], model: nn.Module, trained: TrainedStage, **own: Any) -> R:
        """A result of a kind, whose own fields are given."""
        return kind(
            adapter=self.out,
            trainable_parameters=trainable_parameters(model),
            steps=trained.steps,
            tokens=trained.tokens,
            seconds=trained.seconds,
            tokens_per_second=trained.tokens_per_second,
            **own,
        )

    @property
    def _unfinished(self) -> Path:
        return self.out.with_name(f"{self.out.name}.unfinished")

    @property
    def _shelf(self) -> Shelf:
        return Shelf.of(self.out, self._unfinished)
