"""What every single adaptation begins and ends with, whatever it learns: checks, run directory, adapter, result."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

from torch import nn

from gaintune.adapters.disk import AdapterRecord, adapter_weights, save_adapter
from gaintune.carry_on import carried_on, check_replay, open_adapter, require_one_of_each
from gaintune.config.plan import MethodConfig, Plan
from gaintune.data.classify import ClassifyDomain
from gaintune.data.examples import DomainBlocks
from gaintune.storage.environment import describe_environment
from gaintune.errors import ConfigError
from gaintune.learning import Learnt, learn
from gaintune.methods.attach import Numbers, attach, check_method, learning_rate, numbers_of, rules_of, trainable_parameters
from gaintune.models.base import Base, resolve_device
from gaintune.progress import Progress, Silent
from gaintune.storage.run import Run, open_run, sha256_file
from gaintune.workflows.sequence import describe_inputs
from gaintune.training.snapshots import Shelf, Snapshots
from gaintune.methods.rules import Place, Rows

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
        if out.exists():
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
        with open_run(self._unfinished, self.plan, self.environment, cpu=cpu, fleeting=True) as run:
            yield run
            run.wait()
        if run.writes:
            shutil.rmtree(self._unfinished)

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
        """Train on rows of a domain, keeping the copies the plan asks for; `more` goes to `gaintune.learning.learn`."""
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
