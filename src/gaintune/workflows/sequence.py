"""Domain after domain with one adapter, all domains measured after each stage; a run can stop and restart anywhere."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gaintune import storage
from gaintune.adapters import AdapterRecord, copy_adapter, load_adapter, save_adapter
from gaintune.config import Plan, read_plan
from gaintune.data import (
    ClassifyDomain,
    DomainBlocks,
    Stream,
    blend_domains,
    load_domain,
    replayed_rows,
    with_replay,
)
from gaintune.errors import ConfigError, DivergedError, RunDirectoryError
from gaintune.evaluate import BaseLosses, measure_domain
from gaintune.methods import PreparedMethod, StagePosition, attach, prepare_method, rules_of, trainable_parameters
from gaintune.models import Base, base_fingerprint, load_base, load_tokenizer, resolve_device
from gaintune.progress import Progress, Silent
from gaintune.results import DomainLoss, Matrix, MethodRun, Stage, build_matrix
from gaintune.training import Snapshots, TrainedStage, count_updates, newest_checkpoint, train_stage
from gaintune.workflows.estimate import unfit_methods
from gaintune.workflows.snapshots import best_snapshot


def run_sequence(
    plan: Plan | Mapping[str, Any] | str | Path,
    run: str | Path,
    *,
    progress: Progress | None = None,
    base_losses: BaseLosses | None = None,
    pass_over_unfit: bool = False,
) -> Matrix:
    """Adapt to every domain in order with each method, and measure every domain after every stage.

    Finished work in `run` is kept: called again with the same plan after a stop at any point, it continues and ends
    with the same files. Methods may be added, and those that trained nothing yet may be changed or left out. A method
    that diverges does not stop the methods after it. Watched domains of the plan are measured with the others and never
    trained on.

    With `data.stream` each method trains once over all domains, which blend into one another, and an adapter is saved
    and measured where each domain's share ends. A stream of one domain is a sequence of one domain.

    Args:
        plan: a `Plan`, nested values such as `{"methods": ["gain-ffn", "lora"]}`, or the path of a YAML plan.
        run: the run directory; created if it is missing.
        progress: progress display.
        base_losses: the base's losses, shared by several runs over the same base and texts.
        pass_over_unfit: whether to pass over a method that cannot fit the device if others can. The error at the end
            names it.

    Returns:
        The numbers of matrix.json.

    Raises:
        DivergedError: methods that diverged, that were passed over, or that cannot work on this base, once all others
            are finished; matrix.json holds what was measured.
        GaintuneError: bad input, a run directory of another plan, or training that had to stop; see each subclass.
    """
    plan = read_plan(plan)
    if plan.classifies:
        raise ConfigError(
            "a sequence measures perplexity, and a classifier has none: adapt to each domain with `gaintune adapt`, "
            "and measure what is kept with `gaintune evaluate --masked`"
        )
    methods = [prepare_method(method, plan.model, plan.train) for method in plan.methods]
    for method in methods:
        rules_of(method, StagePosition(), seed=plan.train.seed)  # for its errors
    if plan.data.stream:
        _refuse_borders(plan, methods)
    unfit = unfit_methods(plan)
    if unfit and (not pass_over_unfit or len(unfit) == len(methods)):
        raise ConfigError(next(iter(unfit.values())))
    shown, device = progress or Silent(), resolve_device(plan.model.device)
    environment = storage.describe_environment(device)
    with storage.open_run(Path(run), plan.model_dump(mode="json"), environment, cpu=device.type == "cpu") as directory:
        domains, inputs = load_inputs(plan)
        advice = "A run is one base and one set of texts: name another folder for others"
        directory.write_inputs(inputs, advice)
        fingerprint = inputs["base_fingerprint"]
        sequences = [_Sequence(plan, directory, domains, fingerprint, shown, method, base_losses) for method in methods]
        diverged: dict[str, str] = {}
        refused = 0  # methods that cannot work on this base
        for sequence in sequences:
            if sequence.label in unfit:
                diverged[sequence.label] = unfit[sequence.label]
                continue
            try:
                sequence.run(after_stage=lambda: _write_matrix(directory, sequences))
            except DivergedError as error:
                sequence.discard_checkpoints()  # they lead there again
                if storage.process_count() > 1:  # other processes may not see the error, and would wait for this one
                    raise
                diverged[sequence.label] = str(error)
                directory.event("diverged", method=sequence.label, error=str(error))
                shown.note(f"{sequence.label} diverged: {error}")
            except _UnattachedError as error:
                if sequence is sequences[-1] and refused == len(sequences) - 1:  # the base refuses every method
                    raise
                refused += 1
                diverged[sequence.label] = str(error)
                shown.note(str(error))
        _write_matrix(directory, sequences)
        if diverged:
            reasons = "; ".join(f"{label}: {reason}" for label, reason in diverged.items())
            raise DivergedError(reasons, diverged, finished=len(sequences) - len(diverged))
        directory.event("finished")
        directory.wait()
        return storage.read_stored(directory.matrix, Matrix.from_dict)


def _refuse_borders(plan: Plan, methods: Sequence[PreparedMethod]) -> None:
    """Refuse what acts at the border of two domains: a stream has none."""
    idle = {"penalty": None, "replay": 0.0, "renormalize": None, "intruders": None}  # values that do nothing
    for method in methods:
        options = [option for option, value in idle.items() if getattr(method.config, option) != value]
        if options or method.entry.borders:
            what = options[0] if options else "its new branch"
            advice = f"leave {options[0]} or data.stream (--stream) out" if options else "leave data.stream out"
            raise ConfigError(
                f"method {method.config.label!r}: {what} acts at the border of two domains, and a stream has none; "
                f"{advice}"
            )
    if plan.train.keep == "best":
        raise ConfigError(
            "train.keep=best chooses by one domain's validation text, and a stream has many domains: leave train.keep "
            "or data.stream (--stream) out"
        )


def describe_inputs(fingerprint: str, domains: Sequence[DomainBlocks | ClassifyDomain]) -> dict[str, Any]:
    """Return what identifies the base and the texts of a run."""
    return {"base_fingerprint": fingerprint, "domains": {domain.name: domain.describe() for domain in domains}}


def load_inputs(plan: Plan) -> tuple[list[DomainBlocks], dict[str, Any]]:
    """Load all domains that a plan measures, and describe its base and these texts."""
    tokenizer = load_tokenizer(plan.model)
    domains = [load_domain(domain, plan.data, tokenizer) for domain in plan.data.measured]
    return domains, describe_inputs(base_fingerprint(plan.model), domains)


def _write_matrix(run: storage.Run, sequences: list[_Sequence]) -> None:
    """Write the matrix of everything measured so far, in the process that writes."""
    if run.writes:
        plan, results = sequences[0].plan, [sequence.results() for sequence in sequences]
        planned = [domain.name for domain in plan.data.domains]
        matrix = build_matrix([result for result in results if result.base], plan.evaluate, planned=planned)
        storage.write_json(run.matrix, matrix.to_dict())


class _UnattachedError(ConfigError):
    """A method cannot work on this base, which only the base shows."""


@dataclass
class _Sequence:
    """One method through all domains of a run."""

    plan: Plan
    directory: storage.Run
    measured: list[DomainBlocks]
    fingerprint: str
    progress: Progress
    method: PreparedMethod
    base_losses: BaseLosses | None

    def __post_init__(self) -> None:
        self.label = self.method.config.label
        self.domains = self.measured[: len(self.plan.data.domains)]  # the domains after them are only watched
        self.stages = [self.directory.stage(self.label, index, each.name) for index, each in enumerate(self.domains)]
        self.streams = self.plan.data.stream and len(self.domains) > 1

    def run(self, after_stage: Callable[[], None]) -> None:
        """Do what is not on disk yet: measure the base, train the missing stages, measure every cell."""
        unfinished = [index for index in range(len(self.stages)) if not self._finished(index)]
        if not unfinished and all(self._base_file(domain).exists() for domain in self.measured):
            self.progress.note(f"{self.label}: all {len(self.stages)} stages are finished")
            return
        self.directory.event("method started", method=self.label)
        base = load_base(self.plan.model, dtype=self.method.precision.load)
        for domain in self.measured:
            self._measure(base.model, domain, self._base_file(domain), "base", untouched=True)
        self.directory.wait()
        model: nn.Module | None = None
        current = -1  # the stage whose adapter the model carries
        if self.streams and any(storage.damage(stage / "adapter") for stage in self.stages):
            model, current = self._train_stream(base), len(self.stages) - 1
        for index in unfinished:
            trained = storage.damage(self.stages[index] / "adapter") is None
            wanted = index if trained else index - 1
            if model is None or current != wanted:
                if model is not None:  # its base carries another stage's adapter
                    del model
                    base = load_base(self.plan.model, dtype=self.method.precision.load)
                model = self._model_after(base, wanted)
            if not trained:
                outcome = self._train(model, index)
                if self.plan.train.keep == "best":
                    del model, base
                    self._keep_best(outcome, index)
                    base = load_base(self.plan.model, dtype=self.method.precision.load)
                    model = self._model_after(base, index)
            self._close(model, index)
            current = index
            after_stage()
        del base, model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def discard_checkpoints(self) -> None:
        """Delete the checkpoints inside stages."""
        if self.directory.writes:
            for stage in filter(Path.exists, self.stages):
                storage.discard(stage, [storage.CHECKPOINTS])

    def _finished(self, index: int) -> bool:
        """Tell whether a stage has its adapter, every cell, and the metrics that close it."""
        files = [self.stages[index] / name for name in ("metrics.json", "adapter")]
        return all(file.exists() for file in (*files, *self._cells(index).values()))

    def _base_file(self, domain: DomainBlocks) -> Path:
        return self.directory.base(self.method.precision.name, domain.name)

    def _cells(self, index: int) -> dict[str, Path]:
        """Return the file of each domain's losses after a stage."""
        folder = self.stages[index] / "evaluations"
        return {domain.name: folder / f"{domain.name}.json" for domain in self.measured}

    def results(self) -> MethodRun:
        """Read everything on disk of this method: the base, then the stages begun so far."""
        stages = []
        info: dict[str, Any] = {"method": self.method.entry.name, "lr": self.method.lr}
        for index, (domain, folder) in enumerate(zip(self.domains, self.stages, strict=True)):
            if losses := _stored_losses(self._cells(index)):
                stages.append(Stage(domain.name, losses))
            if (folder / "metrics.json").exists():
                trained = storage.read_stored(folder / "metrics.json", lambda metrics: metrics["trainable_parameters"])
                info["trainable_parameters"] = trained
        info["numbers"] = self.method.precision.name
        base = _stored_losses({domain.name: self._base_file(domain) for domain in self.measured})
        return MethodRun(self.label, base, tuple(stages), info)

    def _model_after(self, base: Base, index: int) -> nn.Module:
        """Return the model as it is after a stage, ready to train; -1 stands for the start."""
        if index < 0:
            try:
                return attach(base.model, self.method.config, seed=self.plan.train.seed, rows=self.domains[0].train)
            except ConfigError as error:
                raise _UnattachedError(str(error)) from error
        adapter = self.stages[index] / "adapter"
        self.progress.note(f"{self.label}: continuing from {adapter}")
        return load_adapter(base, adapter, trainable=True)

    def _train(self, model: nn.Module, index: int) -> TrainedStage:
        """Train on one domain and save the adapter, unless the best of its snapshots is to be kept."""
        folder, domain, label, train = self.stages[index], self.domains[index], self.label, self.plan.train
        later = [str(stage) for stage in self.stages[index + 1 :] if stage.exists()]
        if later:
            raise RunDirectoryError(
                f"{folder / 'adapter'} is missing or damaged, and later stages were trained on top of it: delete "
                f"{', '.join(later)} too, and they are trained again"
            )
        if self.directory.writes:
            storage.check_replaceable(folder / "adapter")
        trained = self.domains[: index + 1]
        packages = storage.describe_environment(torch.device("cpu"))["packages"]
        record = AdapterRecord.of_plan(
            self.plan, self.method, self.fingerprint, trained, versions=packages, settings=domain.settings
        )
        every, earlier = train.snapshot_steps, [before.train for before in self.domains[:index]]
        outcome = train_stage(
            model,
            self.method,
            with_replay(domain.train, earlier, self.method.config.replay, train.seed),
            train,
            self._position(index),
            own_rows=domain.train,
            checkpoints=folder / "checkpoints",
            snapshots=Snapshots(folder / "snapshots", every, record) if every else None,
            title=f"{label}: learning {domain.name}",
            progress=self.progress,
        )
        pace = round(outcome.tokens_per_second, 1)
        self.directory.event("learnt", method=label, domain=domain.name, tokens_per_second=pace)
        if self.directory.writes:
            numbers = {"steps": outcome.steps, "tokens": outcome.tokens, "losses": outcome.losses}
            storage.write_json(folder / "training.json", numbers)
            if train.keep == "last":
                save_adapter(model, folder / "adapter", record, keep=outcome.keep)
        return outcome

    def _keep_best(self, outcome: TrainedStage, index: int) -> None:
        """Make the snapshot with the lowest validation loss the stage's adapter, and record the losses of all."""
        folder, domain, precision = self.stages[index], self.domains[index], self.method.precision
        self.directory.wait()
        options = {"batch_size": self.plan.evaluate.batch_size, "mixed_precision": precision.mixed}
        title = f"{self.label}: measuring the snapshots of {domain.name}"
        step, losses = best_snapshot(
            folder / "snapshots",
            lambda: load_base(self.plan.model, dtype=precision.load),
            lambda model: measure_domain(model, domain, title=title, progress=self.progress, **options).nats_per_token,
            merit=lambda loss: -loss,
        )
        if self.directory.writes:
            chosen = {"kept_step": step, "snapshot_losses": {str(number): loss for number, loss in losses.items()}}
            stored = storage.read_stored(folder / "training.json", dict)
            storage.write_json(folder / "training.json", {**stored, **chosen})
            copy_adapter(folder / "snapshots" / f"step-{step:06d}", folder / "adapter", keep=outcome.keep)
        self.directory.wait()

    def _train_stream(self, base: Base) -> nn.Module:
        """Train on all domains in one run, and save an adapter where each domain's share ends; return the last one."""
        label, train, last = self.label, self.plan.train, self.stages[-1]
        own, blend = [domain.train for domain in self.domains], self.plan.data.stream_blend
        stream = blend_domains(own, passes=train.epochs, blend=blend, seed=train.seed)
        once = train.model_copy(update={"epochs": 1})  # every pass is in the stream
        updates = [count_updates(end, once, storage.process_count()) for end in stream.ends]
        self._check_retrainable(updates)
        rows = train.rows_per_update(storage.process_count())
        records = [self._stream_record(stream, index, updates, rows) for index in range(len(self.stages))]
        stops: dict[int, list[tuple[Path, AdapterRecord]]] = {}
        for stage, update, record in list(zip(self.stages, updates, records, strict=True))[:-1]:
            stops.setdefault(update, []).append((stage / "adapter", record))
        model, every = self._model_after(base, -1), train.snapshot_steps
        outcome = train_stage(
            model,
            self.method,
            stream,
            once,
            StagePosition(),
            checkpoints=last / "checkpoints",
            snapshots=Snapshots(last / "snapshots", every, records[-1]) if every else None,
            stops=stops,
            in_order=True,
            title=f"{label}: learning the stream",
            progress=self.progress,
        )
        names, pace = [domain.name for domain in self.domains], round(outcome.tokens_per_second, 1)
        self.directory.event("learnt", method=label, domains=names, tokens_per_second=pace)
        if self.directory.writes:
            for stage, start, end in zip(self.stages, [0, *updates], updates, strict=False):
                taken = min(end * rows, len(stream)) - min(start * rows, len(stream))
                tokens = taken * stream.rows.input_ids.shape[1]
                numbers = {"steps": end - start, "tokens": tokens, "losses": outcome.losses[start:end]}
                storage.write_json(stage / "training.json", numbers)
            save_adapter(model, last / "adapter", records[-1], keep=outcome.keep)
        self.directory.wait()
        return model

    def _check_retrainable(self, updates: Sequence[int]) -> None:
        """Refuse to train a stream whose adapters were measured, or are missing before the newest checkpoint."""
        damaged = [index for index, stage in enumerate(self.stages) if storage.damage(stage / "adapter")]
        problem = f"{self.stages[damaged[0]] / 'adapter'} is missing or damaged, and a stream is trained in one run"
        if any((stage / "evaluations").exists() for stage in self.stages):
            folders = ", ".join(str(stage) for stage in self.stages if stage.exists())
            raise RunDirectoryError(f"{problem}: delete {folders}, and it is trained again")
        checkpoints = self.stages[-1] / "checkpoints"
        newest = newest_checkpoint(checkpoints)
        passed = newest is not None and updates[damaged[0]] <= int(newest.name.rpartition("-")[2])
        if passed and damaged[0] < len(updates) - 1:
            raise RunDirectoryError(f"{problem}: delete {checkpoints}, and it is trained again")
        if self.directory.writes:
            for stage in self.stages:
                storage.check_replaceable(stage / "adapter")

    def _stream_record(self, stream: Stream, index: int, updates: Sequence[int], rows: int) -> AdapterRecord:
        """Record an adapter of a stream; its domains are all whose rows have begun, in updates of so many `rows`."""
        begun = int(stream.domains[: updates[index] * rows].max()) + 1
        position = {"blend": self.plan.data.stream_blend, "step": updates[index], "steps": updates[-1]}
        return AdapterRecord.of_plan(
            self.plan,
            self.method,
            self.fingerprint,
            self.domains[:begun],
            versions=storage.describe_environment(torch.device("cpu"))["packages"],
            settings={**self.domains[index].settings, "stream": position},
        )

    def _position(self, index: int) -> StagePosition:
        """Count the updates before a stage and those of all stages."""
        own, replay = [len(domain.train) for domain in self.domains], self.method.config.replay
        rows = [own[0], *(count + replayed_rows(count, replay) for count in own[1:])]
        counts = [count_updates(count, self.plan.train, storage.process_count()) for count in rows]
        previous = self.stages[index - 1] / "adapter" if index else None
        return StagePosition(previous, sum(counts[:index]), sum(counts))

    def _close(self, model: nn.Module, index: int) -> None:
        """Measure all domains after a stage, and mark the stage as finished."""
        folder, domain, label = self.stages[index], self.domains[index], self.label
        for measured, file in zip(self.measured, self._cells(index).values(), strict=True):
            self._measure(model, measured, file, f"{label} after {domain.name}")
        if self.directory.writes:
            made = {"lr": self.method.lr, "trainable_parameters": trainable_parameters(model)}
            storage.write_json(folder / "metrics.json", {**storage.read_stored(folder / "training.json", dict), **made})
            storage.discard(folder, [storage.CHECKPOINTS])
            self.directory.event("stage finished", method=label, domain=domain.name)
        self.directory.wait()

    def _measure(
        self, model: nn.Module, domain: DomainBlocks, file: Path, title: str, *, untouched: bool = False
    ) -> None:
        """Measure one cell unless it is on disk, or another run shares its loss of the untouched base."""
        if file.exists():
            return
        precision, batch_size = self.method.precision, self.plan.evaluate.batch_size
        options = {"batch_size": batch_size, "mixed_precision": precision.mixed, "progress": self.progress}
        name, title = self.plan.model.name if untouched else None, f"{title}: measuring {domain.name}"

        def measure() -> DomainLoss:
            return measure_domain(model, domain, title=title, base=name, **options)

        if not untouched or self.base_losses is None:
            loss = measure()
        else:
            loss = self.base_losses.get(
                domain,
                measure,
                fingerprint=self.fingerprint,
                numbers=precision.name,
                device=next(model.parameters()).device.type,
                batch_size=batch_size,
            )
        self.directory.write_json(file, loss.to_dict())


def _stored_losses(files: Mapping[str, Path]) -> dict[str, DomainLoss]:
    """Read the losses that are on disk."""
    return {name: storage.read_stored(file, DomainLoss.from_dict) for name, file in files.items() if file.exists()}
