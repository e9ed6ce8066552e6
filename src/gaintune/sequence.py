"""Domain after domain with one adapter carried on, every domain measured after every stage; restartable anywhere."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gaintune.adapters import AdapterRecord, load_adapter, save_adapter
from gaintune.config import MethodConfig, Plan, build_plan, read_values
from gaintune.data.blocks import DomainBlocks, load_domain
from gaintune.environment import describe_environment
from gaintune.errors import RunDirectoryError
from gaintune.evaluate.losses import DomainLoss, MethodRun, Stage
from gaintune.evaluate.matrix import build_matrix
from gaintune.evaluate.perplexity import measure
from gaintune.evaluate.records import Matrix
from gaintune.methods import attach, check_method, learning_rate, trainable_parameters
from gaintune.models import Base, base_fingerprint, load_base, load_tokenizer, resolve_device, resolve_dtype
from gaintune.progress import Progress, Silent
from gaintune.runs import Run, damage, open_run, read_json, write_json
from gaintune.train import train

SAME_INPUTS = "A run is one base and one set of texts: name another folder for others"


@dataclass(frozen=True)
class Numbers:
    """The numbers a method computes with: how the base is loaded, and the autocast around it if there is one."""

    name: str
    load: torch.dtype
    mixed: torch.dtype | None


def numbers_of(plan: Plan, method: MethodConfig) -> Numbers:
    """Adapters leave the base in its own numbers; a method that trains the base keeps it in fp32 under autocast."""
    dtype = resolve_dtype(plan.model.dtype, resolve_device(plan.model.device))
    short = str(dtype).removeprefix("torch.")
    if not check_method(method).trains_base:
        return Numbers(f"{short}-{plan.model.quantization}" if plan.model.quantization else short, dtype, None)
    if dtype is torch.float32:
        return Numbers("float32", dtype, None)
    return Numbers(f"float32-autocast-{short}", torch.float32, dtype)


def read_plan(plan: Plan | Mapping[str, Any] | str | Path) -> Plan:
    """A plan from a plan, nested values, or a YAML file."""
    if isinstance(plan, Plan):
        return plan
    if isinstance(plan, Mapping):
        return build_plan(dict(plan))
    return build_plan(read_values(Path(plan)), origin=str(plan))


def run_sequence(
    plan: Plan | Mapping[str, Any] | str | Path, run: str | Path, *, progress: Progress | None = None
) -> Matrix:
    """Adapt to every domain in order with each method, and measure every domain after every stage.

    What is already finished in `run` is kept: called again with the same plan after a stop at any point, it
    continues and ends with the same files.

    Args:
        plan: a `Plan`, nested values such as `{"methods": ["gain-ffn", "lora"]}`, or the path of a YAML plan.
        run: the run directory, made if it is not there.
        progress: where to show progress; nowhere unless given.

    Returns:
        The numbers of matrix.json.

    Raises:
        GaintuneError: bad input, a run directory of another plan, or training that had to stop; see each subclass.
    """
    settled = read_plan(plan)
    for method in settled.methods:
        check_method(method)
    shown = progress or Silent()
    device = resolve_device(settled.model.device)
    with open_run(Path(run), settled, describe_environment(device), cpu=device.type == "cpu") as directory:
        tokenizer = load_tokenizer(settled.model)
        domains = [load_domain(domain, settled.data, tokenizer) for domain in settled.data.domains]
        fingerprint = base_fingerprint(settled.model)
        directory.settle("inputs.json", _inputs(fingerprint, domains), SAME_INPUTS)
        sequences = [_Sequence(settled, directory, domains, fingerprint, shown, method) for method in settled.methods]
        for sequence in sequences:
            sequence.run(after_stage=lambda: _write_matrix(directory, settled, sequences))
        _write_matrix(directory, settled, sequences)
        directory.event("finished")
        directory.wait()
        return Matrix.from_dict(read_json(directory.matrix))


def _inputs(fingerprint: str, domains: list[DomainBlocks]) -> dict[str, Any]:
    """What identifies the texts and the base of a run."""
    described = {
        domain.name: {
            "content_hash": domain.content_hash,
            "train_tokens": domain.train.numel(),
            "validation_tokens": domain.validation.numel(),
            "train_documents": domain.train_documents,
            "validation_documents": domain.validation_documents,
            "removed_near_duplicates": domain.removed_near_duplicates,
        }
        for domain in domains
    }
    return {"base_fingerprint": fingerprint, "domains": described}


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
    ) -> None:
        self._plan = plan
        self._run = run
        self._domains = domains
        self._fingerprint = fingerprint
        self._progress = progress
        self._method = method
        self._numbers = numbers_of(plan, method)
        self._stages = [run.stage(method.label, index, domain.name) for index, domain in enumerate(domains)]

    def run(self, after_stage: Callable[[], None]) -> None:
        """Do what is not on disk yet, and release the model."""
        if all((stage / "metrics.json").exists() for stage in self._stages):
            self._progress.note(f"{self._method.label}: all {len(self._stages)} stages are finished")
            return
        self._run.event("method started", method=self._method.label)
        base = load_base(self._plan.model, dtype=self._numbers.load)
        if base.fingerprint != self._fingerprint:
            raise RunDirectoryError(f"the base {base.name} changed while the run was starting; start it again")
        for domain in self._domains:
            self._measure(base.model, domain, self._run.base(self._numbers.name, domain.name), "base")
        self._run.wait()
        model, first = self._adapted_model(base)
        for index in range(first, len(self._stages)):
            self._stage(model, index)
            after_stage()
        del base, model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def measured(self) -> MethodRun:
        """Everything on disk of this method: base, then the stages begun so far."""
        stages = []
        info: dict[str, Any] = {"method": self._method.name, "lr": learning_rate(self._method, self._plan.train)}
        for domain, folder in zip(self._domains, self._stages, strict=True):
            losses = self._losses({each.name: folder / "evaluations" / f"{each.name}.json" for each in self._domains})
            if losses:
                stages.append(Stage(domain.name, losses))
            if (folder / "metrics.json").exists():
                info["trainable_parameters"] = read_json(folder / "metrics.json")["trainable_parameters"]
        base = self._losses({each.name: self._run.base(self._numbers.name, each.name) for each in self._domains})
        info["numbers"] = self._numbers.name
        return MethodRun(self._method.label, base, tuple(stages), info)

    @staticmethod
    def _losses(files: dict[str, Path]) -> dict[str, DomainLoss]:
        return {name: DomainLoss.from_dict(read_json(file)) for name, file in files.items() if file.exists()}

    def _adapted_model(self, base: Base) -> tuple[nn.Module, int]:
        """The model to go on with, and the first stage that still has something to do."""
        finished = 0
        while finished < len(self._stages) and (self._stages[finished] / "metrics.json").exists():
            finished += 1
        adapters = [stage / "adapter" for stage in self._stages[: finished + 1]]
        written = [folder for folder in adapters if folder.exists()]
        if len(written) < min(finished, len(adapters)):
            raise RunDirectoryError(
                f"{adapters[len(written)]} is missing from a finished stage; delete that stage's folder"
            )
        if not written:
            return attach(base.model, self._method, seed=self._plan.train.seed), finished
        self._progress.note(f"{self._method.label}: continuing from {written[-1]}")
        return load_adapter(base, written[-1], trainable=True), finished

    def _stage(self, model: nn.Module, index: int) -> None:
        """Learn one domain unless its adapter is there, then measure all domains, and mark the stage as finished."""
        folder, domain = self._stages[index], self._domains[index]
        adapter, training = folder / "adapter", folder / "training.json"
        label = self._method.label
        lr = learning_rate(self._method, self._plan.train)
        if damage(adapter) is not None:
            adaptation = train(
                model,
                domain.train,
                self._plan.train,
                lr=lr,
                seed=self._plan.train.seed,
                checkpoints=folder / "checkpoints",
                mixed_precision=self._numbers.mixed,
                title=f"{label}: learning {domain.name}",
                progress=self._progress,
            )
            pace = round(adaptation.tokens_per_second, 1)
            self._run.event("learnt", method=label, domain=domain.name, tokens_per_second=pace)
            if self._run.writes:
                write_json(
                    training, {"steps": adaptation.steps, "tokens": adaptation.tokens, "losses": adaptation.losses}
                )
                save_adapter(model, adapter, self._record(index))
        for measured in self._domains:
            title = f"{label} after {domain.name}"
            self._measure(model, measured, folder / "evaluations" / f"{measured.name}.json", title)
        if self._run.writes:
            metrics = {**read_json(training), "lr": lr, "trainable_parameters": trainable_parameters(model)}
            write_json(folder / "metrics.json", metrics)
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            self._run.event("stage finished", method=label, domain=domain.name)
        self._run.wait()

    def _record(self, index: int) -> AdapterRecord:
        return AdapterRecord(
            base_name=self._plan.model.name,
            base_revision=self._plan.model.revision,
            base_fingerprint=self._fingerprint,
            method=self._method.name,
            label=self._method.label,
            domains=tuple(domain.name for domain in self._domains[: index + 1]),
            settings={
                "train": self._plan.train.model_dump(mode="json"),
                "method": self._method.model_dump(mode="json"),
            },
            versions=describe_environment(torch.device("cpu"))["packages"],
        )

    def _measure(self, model: nn.Module, domain: DomainBlocks, file: Path, title: str) -> None:
        """Measure one cell unless it is on disk."""
        if file.exists():
            return
        loss = measure(
            model,
            domain.validation,
            domain.validation_bytes,
            batch_size=self._plan.evaluate.batch_size,
            mixed_precision=self._numbers.mixed,
            title=f"{title}: measuring {domain.name}",
            progress=self._progress,
        )
        self._run.write_json(file, loss.to_dict())
