"""Domain after domain with one adapter carried on, every domain measured after every stage; restartable anywhere."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gaintune.adapters.disk import AdapterRecord, load_adapter, save_adapter
from gaintune.config.plan import MethodConfig, Plan, read_plan
from gaintune.data.classify import ClassifyDomain
from gaintune.data.examples import Examples
from gaintune.data.load import DomainBlocks, load_domain
from gaintune.data.replay import replayed_rows, with_replay
from gaintune.errors import ConfigError, DivergedError, RunDirectoryError
from gaintune.evaluate.perplexity import BaseLosses, measure_domain
from gaintune.methods.attach import attach, check_method, learning_rate, numbers_of, trainable_parameters
from gaintune.methods.rules import Place
from gaintune.models.base import Base, base_fingerprint, load_base, load_tokenizer, resolve_device
from gaintune.progress import Progress, Silent
from gaintune.results.losses import DomainLoss, MethodRun, Stage
from gaintune.results.matrix import build_matrix
from gaintune.results.records import Matrix
from gaintune.storage.environment import describe_environment
from gaintune.storage.files import damage, read_json, write_json
from gaintune.storage.ownership import CHECKPOINTS, check_replaceable, discard
from gaintune.storage.run import Run, open_run, process_count
from gaintune.training.snapshots import Snapshots
from gaintune.training.train import count_updates, learn

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
    for method in settled.methods:
        check_method(method)
        numbers_of(settled.model, method)
    shown = progress or Silent()
    device = resolve_device(settled.model.device)
    with open_run(Path(run), settled, describe_environment(device), cpu=device.type == "cpu") as directory:
        tokenizer = load_tokenizer(settled.model)
        domains = [load_domain(domain, settled.data, tokenizer) for domain in settled.data.measured]
        fingerprint = base_fingerprint(settled.model)
        directory.settle("inputs.json", describe_inputs(fingerprint, domains), SAME_INPUTS)
        sequences = [
            _Sequence(settled, directory, domains, fingerprint, shown, method, base_losses)
            for method in settled.methods
        ]
        diverged: dict[str, str] = {}
        for method, sequence in zip(settled.methods, sequences, strict=True):
            try:
                sequence.run(after_stage=lambda: _write_matrix(directory, settled, sequences))
            except DivergedError as error:
                if process_count() > 1:  # the other processes may not have seen it, and would wait for this one
                    raise
                diverged[method.label] = str(error)
                directory.event("diverged", method=method.label, error=str(error))
                shown.note(f"{method.label} diverged: {error}")
        _write_matrix(directory, settled, sequences)
        if diverged:
            told = "; ".join(f"{label}: {why}" for label, why in diverged.items())
            raise DivergedError(told, diverged, finished=len(sequences) - len(diverged))
        directory.event("finished")
        directory.wait()
        return Matrix.from_dict(read_json(directory.matrix))


def describe_inputs(fingerprint: str, domains: Sequence[DomainBlocks | ClassifyDomain]) -> dict[str, Any]:
    """What identifies the base and the texts of a run."""
    return {"base_fingerprint": fingerprint, "domains": {domain.name: domain.describe() for domain in domains}}


def _write_matrix(run: Run, plan: Plan, sequences: list[_Sequence]) -> None:
    """Put together everything measured so far."""
    if not run.writes:
        return
    measured = [sequence.measured() for sequence in sequences]
    planned = [domain.name for domain in plan.data.domains]
    matrix = build_matrix([each for each in measured if each.base], plan.evaluate, planned=planned)
    write_json(run.matrix, matrix.to_dict())


class _Sequence:
    """One method through all domains of a run."""

    def __init__(
        self,
        plan: Plan,
        run: Run,
        domains: list[DomainBlocks],
        fingerprint: str,
        progress: Progress,
        method: MethodConfig,
        base_losses: BaseLosses | None = None,
    ) -> None:
        self._plan = plan
        self._run = run
        self._domains = domains[: len(plan.data.domains)]
        self._measured = domains
        self._fingerprint = fingerprint
        self._progress = progress
        self._method = method
        self._base_losses = base_losses
        self._numbers = numbers_of(plan.model, method)
        self._stages = [run.stage(method.label, index, domain.name) for index, domain in enumerate(self._domains)]

    def run(self, after_stage: Callable[[], None]) -> None:
        """Do what is not on disk yet: measure the base, learn the stages that are missing, measure every cell."""
        unfinished = [index for index in range(len(self._stages)) if not self._finished(index)]
        if not unfinished and all(self._base_file(domain).exists() for domain in self._measured):
            self._progress.note(f"{self._method.label}: all {len(self._stages)} stages are finished")
            return
        self._run.event("method started", method=self._method.label)
        base = load_base(self._plan.model, dtype=self._numbers.load)
        for domain in self._measured:
            self._measure(base.model, domain, self._base_file(domain), "base", untouched=True)
        self._run.wait()
        model: nn.Module | None = None
        holds = -1
        for index in unfinished:
            learnt = damage(self._stages[index] / "adapter") is None
            wanted = index if learnt else index - 1
            if model is None or holds != wanted:
                if model is not None:  # its base carries another stage's adapter
                    del model
                    base = load_base(self._plan.model, dtype=self._numbers.load)
                model = self._model_after(base, wanted)
            if not learnt:
                self._learn(model, index)
            self._close(model, index)
            holds = index
            after_stage()
        del base, model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _finished(self, index: int) -> bool:
        """Whether a stage has its adapter, every cell, and the record that closes it."""
        folder = self._stages[index]
        cells = (folder / "evaluations" / f"{domain.name}.json" for domain in self._measured)
        return all(path.exists() for path in (folder / "metrics.json", folder / "adapter", *cells))

    def _base_file(self, domain: DomainBlocks) -> Path:
        return self._run.base(self._numbers.name, domain.name)

    def measured(self) -> MethodRun:
        """Everything on disk of this method: base, then the stages begun so far."""
        stages = []
        info: dict[str, Any] = {"method": self._method.name, "lr": learning_rate(self._method, self._plan.train)}
        for domain, folder in zip(self._domains, self._stages, strict=True):
            losses = self._losses({each.name: folder / "evaluations" / f"{each.name}.json" for each in self._measured})
            if losses:
                stages.append(Stage(domain.name, losses))
            if (folder / "metrics.json").exists():
                info["trainable_parameters"] = read_json(folder / "metrics.json")["trainable_parameters"]
        base = self._losses({each.name: self._base_file(each) for each in self._measured})
        info["numbers"] = self._numbers.name
        return MethodRun(self._method.label, base, tuple(stages), info)

    @staticmethod
    def _losses(files: dict[str, Path]) -> dict[str, DomainLoss]:
        return {name: DomainLoss.from_dict(read_json(file)) for name, file in files.items() if file.exists()}

    def _model_after(self, base: Base, index: int) -> nn.Module:
        """The model as it is after a stage, ready to train on; -1 stands for the start."""
        if index < 0:
            return attach(base.model, self._method, seed=self._plan.train.seed)
        adapter = self._stages[index] / "adapter"
        self._progress.note(f"{self._method.label}: continuing from {adapter}")
        return load_adapter(base, adapter, trainable=True)

    def _learn(self, model: nn.Module, index: int) -> None:
        """Train on one domain and save the adapter."""
        folder, domain, label = self._stages[index], self._domains[index], self._method.label
        later = [str(stage) for stage in self._stages[index + 1 :] if stage.exists()]
        if later:
            raise RunDirectoryError(
                f"{folder / 'adapter'} is missing or damaged, and later stages were learnt on top of it: delete "
                f"{', '.join(later)} too, and they are learnt anew"
            )
        if self._run.writes:
            check_replaceable(folder / "adapter")
        every, record = self._plan.train.snapshot_steps, self._record(index)
        learnt = learn(
            model,
            self._method,
            self._rows(index),
            self._plan.train,
            self._place(index),
            own_rows=domain.train,
            checkpoints=folder / "checkpoints",
            snapshots=Snapshots(folder / "snapshots", every, record) if every else None,
            logs=folder / "tensorboard",
            mixed_precision=self._numbers.mixed,
            title=f"{label}: learning {domain.name}",
            progress=self._progress,
        )
        adaptation = learnt.adaptation
        pace = round(adaptation.tokens_per_second, 1)
        self._run.event("learnt", method=label, domain=domain.name, tokens_per_second=pace)
        if self._run.writes:
            told = {"steps": adaptation.steps, "tokens": adaptation.tokens, "losses": adaptation.losses}
            write_json(folder / "training.json", told)
            save_adapter(model, folder / "adapter", record, keep=learnt.keep)

    def _rows(self, index: int) -> Examples:
        """What a stage trains on: its domain's rows, and rows of the earlier ones where the method replays them."""
        earlier = [domain.train for domain in self._domains[:index]]
        return with_replay(self._domains[index].train, earlier, self._method.replay, self._plan.train.seed)

    def _place(self, index: int) -> Place:
        """Where a stage stands among the updates of all stages."""
        counts = []
        for number, domain in enumerate(self._domains):
            rows = len(domain.train)
            rows += replayed_rows(rows, self._method.replay) if number else 0
            counts.append(count_updates(rows, self._plan.train, process_count()))
        previous = self._stages[index - 1] / "adapter" if index else None
        return Place(previous, sum(counts[:index]), sum(counts))

    def _close(self, model: nn.Module, index: int) -> None:
        """Measure all domains after a stage, and mark the stage as finished."""
        folder, domain, label = self._stages[index], self._domains[index], self._method.label
        for measured in self._measured:
            file = folder / "evaluations" / f"{measured.name}.json"
            self._measure(model, measured, file, f"{label} after {domain.name}")
        if self._run.writes:
            lr = learning_rate(self._method, self._plan.train)
            told = read_json(folder / "training.json")
            write_json(folder / "metrics.json", {**told, "lr": lr, "trainable_parameters": trainable_parameters(model)})
            discard(folder, [CHECKPOINTS])
            self._run.event("stage finished", method=label, domain=domain.name)
        self._run.wait()

    def _record(self, index: int) -> AdapterRecord:
        return AdapterRecord.of_plan(
            self._plan,
            self._method,
            lr=learning_rate(self._method, self._plan.train),
            fingerprint=self._fingerprint,
            learnt=[(domain.name, domain.content_hash) for domain in self._domains[: index + 1]],
            versions=describe_environment(torch.device("cpu"))["packages"],
        )

    def _measure(
        self, model: nn.Module, domain: DomainBlocks, file: Path, title: str, *, untouched: bool = False
    ) -> None:
        """Measure one cell unless it is on disk, or another run has shared what it found of the untouched base."""
        if file.exists():
            return
        batch_size = self._plan.evaluate.batch_size

        def look() -> DomainLoss:
            return measure_domain(
                model,
                domain,
                batch_size=batch_size,
                mixed_precision=self._numbers.mixed,
                title=f"{title}: measuring {domain.name}",
                base=self._plan.model.name if untouched else None,
                progress=self._progress,
            )

        if not untouched or self._base_losses is None:
            loss = look()
        else:
            loss = self._base_losses.get(
                domain,
                look,
                fingerprint=self._fingerprint,
                numbers=self._numbers.name,
                device=next(model.parameters()).device.type,
                batch_size=batch_size,
            )
        self._run.write_json(file, loss.to_dict())
