"""Domain after domain with one adapter carried on, every domain measured after every stage; restartable anywhere."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gaintune.adapters import AdapterRecord, load_adapter, save_adapter
from gaintune.config import Plan, read_plan
from gaintune.data import ClassifyDomain, DomainBlocks, Examples, load_domain, replayed_rows, with_replay
from gaintune.errors import ConfigError, DivergedError, RunDirectoryError
from gaintune.evaluate import BaseLosses, measure_domain
from gaintune.methods import PreparedMethod, StagePosition, attach, prepare_method, trainable_parameters
from gaintune.models import Base, base_fingerprint, load_base, load_tokenizer, resolve_device
from gaintune.progress import Progress, Silent
from gaintune.results import DomainLoss, Matrix, MethodRun, Stage, build_matrix
from gaintune.storage import (
    CHECKPOINTS,
    Run,
    check_replaceable,
    damage,
    describe_environment,
    discard,
    open_run,
    process_count,
    read_stored,
    write_json,
)
from gaintune.training import Snapshots, count_updates, train_stage

SAME_INPUTS = "A run is one base and one set of texts: name another folder for others"


def run_sequence(
    plan: Plan | Mapping[str, Any] | str | Path,
    run: str | Path,
    *,
    progress: Progress | None = None,
    base_losses: BaseLosses | None = None,
) -> Matrix:
    """Adapt to every domain in order with each method, and measure every domain after every stage.

    What is already finished in `run` is kept: called again with the same plan after a stop at any point, it
    continues and ends with the same files. A method that diverges does not stop those after it.

    Args:
        plan: a `Plan`, nested values such as `{"methods": ["gain-ffn", "lora"]}`, or the path of a YAML plan.
        run: the run directory, made if it is not there.
        progress: where to show progress; nowhere unless given.
        base_losses: where several runs over the same base and texts share what was measured of the base.

    Domains that the plan only watches are measured with the others and never learnt.

    Returns:
        The numbers of matrix.json.

    Raises:
        DivergedError: methods that diverged, once all others are finished; matrix.json holds what was measured.
        GaintuneError: bad input, a run directory of another plan, or training that had to stop; see each subclass.
    """
    settled = read_plan(plan)
    if settled.classifies:
        raise ConfigError(
            "a sequence measures perplexity, and a classifier has none: adapt to each domain with `gaintune adapt`, "
            "and measure what is kept with `gaintune evaluate --masked`"
        )
    methods = [prepare_method(method, settled.model, settled.train) for method in settled.methods]
    shown = progress or Silent()
    device = resolve_device(settled.model.device)
    with open_run(
        Path(run), settled.model_dump(mode="json"), describe_environment(device), cpu=device.type == "cpu"
    ) as directory:
        tokenizer = load_tokenizer(settled.model)
        domains = [load_domain(domain, settled.data, tokenizer) for domain in settled.data.measured]
        fingerprint = base_fingerprint(settled.model)
        directory.settle("inputs.json", describe_inputs(fingerprint, domains), SAME_INPUTS)
        sequences = [
            _Sequence(settled, directory, domains, fingerprint, shown, method, base_losses) for method in methods
        ]
        diverged: dict[str, str] = {}
        for sequence in sequences:
            try:
                sequence.run(after_stage=lambda: _write_matrix(directory, settled, sequences))
            except DivergedError as error:
                if process_count() > 1:  # the other processes may not have seen it, and would wait for this one
                    raise
                diverged[sequence.label] = str(error)
                directory.event("diverged", method=sequence.label, error=str(error))
                shown.note(f"{sequence.label} diverged: {error}")
        _write_matrix(directory, settled, sequences)
        if diverged:
            told = "; ".join(f"{label}: {why}" for label, why in diverged.items())
            raise DivergedError(told, diverged, finished=len(sequences) - len(diverged))
        directory.event("finished")
        directory.wait()
        return read_stored(directory.matrix, Matrix.from_dict)


def describe_inputs(fingerprint: str, domains: Sequence[DomainBlocks | ClassifyDomain]) -> dict[str, Any]:
    """What identifies the base and the texts of a run."""
    return {"base_fingerprint": fingerprint, "domains": {domain.name: domain.describe() for domain in domains}}


def _write_matrix(run: Run, plan: Plan, sequences: list[_Sequence]) -> None:
    """Put together everything measured so far."""
    if not run.writes:
        return
    measured = [sequence.results() for sequence in sequences]
    planned = [domain.name for domain in plan.data.domains]
    matrix = build_matrix([each for each in measured if each.base], plan.evaluate, planned=planned)
    write_json(run.matrix, matrix.to_dict())


@dataclass
class _Sequence:
    """One method through all domains of a run."""

    plan: Plan
    directory: Run
    measured: list[DomainBlocks]
    fingerprint: str
    progress: Progress
    method: PreparedMethod
    base_losses: BaseLosses | None

    def __post_init__(self) -> None:
        self.label = self.method.config.label
        self.domains = self.measured[: len(self.plan.data.domains)]  # those after them are only watched
        self.stages = [
            self.directory.stage(self.label, index, domain.name) for index, domain in enumerate(self.domains)
        ]

    def run(self, after_stage: Callable[[], None]) -> None:
        """Do what is not on disk yet: measure the base, learn the stages that are missing, measure every cell."""
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
        holds = -1
        for index in unfinished:
            trained = damage(self.stages[index] / "adapter") is None
            wanted = index if trained else index - 1
            if model is None or holds != wanted:
                if model is not None:  # its base carries another stage's adapter
                    del model
                    base = load_base(self.plan.model, dtype=self.method.precision.load)
                model = self._model_after(base, wanted)
            if not trained:
                self._train(model, index)
            self._close(model, index)
            holds = index
            after_stage()
        del base, model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _finished(self, index: int) -> bool:
        """Whether a stage has its adapter, every cell, and the record that closes it."""
        folder = self.stages[index]
        cells = (folder / "evaluations" / f"{domain.name}.json" for domain in self.measured)
        return all(path.exists() for path in (folder / "metrics.json", folder / "adapter", *cells))

    def _base_file(self, domain: DomainBlocks) -> Path:
        return self.directory.base(self.method.precision.name, domain.name)

    def results(self) -> MethodRun:
        """Everything on disk of this method: base, then the stages begun so far."""
        stages = []
        info: dict[str, Any] = {"method": self.method.entry.name, "lr": self.method.lr}
        for domain, folder in zip(self.domains, self.stages, strict=True):
            losses = self._losses({each.name: folder / "evaluations" / f"{each.name}.json" for each in self.measured})
            if losses:
                stages.append(Stage(domain.name, losses))
            if (folder / "metrics.json").exists():
                trained = read_stored(folder / "metrics.json", lambda metrics: metrics["trainable_parameters"])
                info["trainable_parameters"] = trained
        base = self._losses({each.name: self._base_file(each) for each in self.measured})
        info["numbers"] = self.method.precision.name
        return MethodRun(self.label, base, tuple(stages), info)

    @staticmethod
    def _losses(files: dict[str, Path]) -> dict[str, DomainLoss]:
        return {name: read_stored(file, DomainLoss.from_dict) for name, file in files.items() if file.exists()}

    def _model_after(self, base: Base, index: int) -> nn.Module:
        """The model as it is after a stage, ready to train on; -1 stands for the start."""
        if index < 0:
            return attach(base.model, self.method.config, seed=self.plan.train.seed)
        adapter = self.stages[index] / "adapter"
        self.progress.note(f"{self.label}: continuing from {adapter}")
        return load_adapter(base, adapter, trainable=True)

    def _train(self, model: nn.Module, index: int) -> None:
        """Train on one domain and save the adapter."""
        folder, domain, label = self.stages[index], self.domains[index], self.label
        later = [str(stage) for stage in self.stages[index + 1 :] if stage.exists()]
        if later:
            raise RunDirectoryError(
                f"{folder / 'adapter'} is missing or damaged, and later stages were learnt on top of it: delete "
                f"{', '.join(later)} too, and they are learnt anew"
            )
        if self.directory.writes:
            check_replaceable(folder / "adapter")
        every, record = self.plan.train.snapshot_steps, self._record(index)
        trained = train_stage(
            model,
            self.method,
            self._rows(index),
            self.plan.train,
            self._position(index),
            own_rows=domain.train,
            checkpoints=folder / "checkpoints",
            snapshots=Snapshots(folder / "snapshots", every, record) if every else None,
            logs=folder / "tensorboard",
            title=f"{label}: learning {domain.name}",
            progress=self.progress,
        )
        pace = round(trained.tokens_per_second, 1)
        self.directory.event("learnt", method=label, domain=domain.name, tokens_per_second=pace)
        if self.directory.writes:
            told = {"steps": trained.steps, "tokens": trained.tokens, "losses": trained.losses}
            write_json(folder / "training.json", told)
            save_adapter(model, folder / "adapter", record, keep=trained.keep)

    def _rows(self, index: int) -> Examples:
        """What a stage trains on: its domain's rows, and rows of the earlier ones where the method replays them."""
        earlier = [domain.train for domain in self.domains[:index]]
        return with_replay(self.domains[index].train, earlier, self.method.config.replay, self.plan.train.seed)

    def _position(self, index: int) -> StagePosition:
        """Where a stage stands among the updates of all stages."""
        counts = []
        for number, domain in enumerate(self.domains):
            rows = len(domain.train)
            rows += replayed_rows(rows, self.method.config.replay) if number else 0
            counts.append(count_updates(rows, self.plan.train, process_count()))
        previous = self.stages[index - 1] / "adapter" if index else None
        return StagePosition(previous, sum(counts[:index]), sum(counts))

    def _close(self, model: nn.Module, index: int) -> None:
        """Measure all domains after a stage, and mark the stage as finished."""
        folder, domain, label = self.stages[index], self.domains[index], self.label
        for measured in self.measured:
            file = folder / "evaluations" / f"{measured.name}.json"
            self._measure(model, measured, file, f"{label} after {domain.name}")
        if self.directory.writes:
            made = {"lr": self.method.lr, "trainable_parameters": trainable_parameters(model)}
            write_json(folder / "metrics.json", {**read_stored(folder / "training.json", dict), **made})
            discard(folder, [CHECKPOINTS])
            self.directory.event("stage finished", method=label, domain=domain.name)
        self.directory.wait()

    def _record(self, index: int) -> AdapterRecord:
        return AdapterRecord.of_plan(
            self.plan,
            self.method.config,
            lr=self.method.lr,
            fingerprint=self.fingerprint,
            trained=[(domain.name, domain.content_hash) for domain in self.domains[: index + 1]],
            versions=describe_environment(torch.device("cpu"))["packages"],
            settings=self.domains[index].settings,
        )

    def _measure(
        self, model: nn.Module, domain: DomainBlocks, file: Path, title: str, *, untouched: bool = False
    ) -> None:
        """Measure one cell unless it is on disk, or another run has shared what it found of the untouched base."""
        if file.exists():
            return
        batch_size = self.plan.evaluate.batch_size

        def look() -> DomainLoss:
            return measure_domain(
                model,
                domain,
                batch_size=batch_size,
                mixed_precision=self.method.precision.mixed,
                title=f"{title}: measuring {domain.name}",
                base=self.plan.model.name if untouched else None,
                progress=self.progress,
            )

        if not untouched or self.base_losses is None:
            loss = look()
        else:
            loss = self.base_losses.get(
                domain,
                look,
                fingerprint=self.fingerprint,
                numbers=self.method.precision.name,
                device=next(model.parameters()).device.type,
                batch_size=batch_size,
            )
        self.directory.write_json(file, loss.to_dict())
