"""The linear model's experiment: full, LoRA and DISeL corrections trained on samples, measured against closed forms."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn

from gaintune.analysis.linear_model import LinearModelOptions
from gaintune.analysis.linear_model.model import Correction, LinearModel, Losses
from gaintune.errors import TrainingError
from gaintune.progress import Progress, Silent
from gaintune.tuners import parameter_groups
from gaintune.tuners.disel import DiselConfig
from gaintune.tuners.disel.layer import disel_layers

METHODS = ("full", "lora", "disel")
POSITIONS = np.linspace(-2.5, 2.5, 201)
"""Where gates are read, along the line through both means: -1 is the second population's mean, 1 the first's."""
BATCHES_AT_ONCE = 64
CURVE_POINTS = 40
CURVE_SAMPLES, FINAL_SAMPLES = 2_048, 65_536
EVALUATION_SEED = 1_000_003  # far from the seeds of training


@dataclass(frozen=True)
class Trained:
    """One method on one seed: losses at `steps`, the last of them after training, and its gates at `POSITIONS`.

    `gates` is `(positions, rank)`, None for a method without gates.
    """

    method: str
    steps: tuple[int, ...]
    curve: tuple[Losses, ...]
    gates: np.ndarray | None = field(default=None, compare=False)

    @property
    def losses(self) -> Losses:
        return self.curve[-1]


@dataclass(frozen=True)
class SeedResult:
    """One seed, which draws the maps W and dW, the start values and the samples: closed forms, and what was trained."""

    seed: int
    fixed: Losses
    bayes: Losses
    bayes_gate: np.ndarray
    trained: tuple[Trained, ...]


def run_experiment(options: LinearModelOptions, progress: Progress | None = None) -> tuple[SeedResult, ...]:
    """Train every method on every seed; the same settings give the same numbers on the same machine.

    Raises:
        TrainingError: training diverged.
    """
    results = []
    total = options.seeds * len(METHODS) * options.steps
    with (progress or Silent()).task("linear model", total, "steps") as advance:
        for seed in range(options.seeds):
            problem = LinearModel.draw(options.dimension, options.rank, options.separation, seed)
            trained = []
            for method in METHODS:
                trained.append(_train(problem, method, options, seed))
                advance(options.steps)
            direction, offset = problem.bayes_gate()
            gate = 1 / (1 + np.exp(-(_line(problem) @ direction + offset)))
            fixed = problem.fixed_losses(problem.best_fixed())
            results.append(SeedResult(seed, fixed, problem.bayes_losses(), gate, tuple(trained)))
    return tuple(results)


def _line(problem: LinearModel) -> np.ndarray:
    """The inputs at `POSITIONS`, `(positions, d_in)`."""
    middle, half = (problem.mean1 + problem.mean0) / 2, (problem.mean1 - problem.mean0) / 2
    return middle + POSITIONS[:, None] * half


def student(problem: LinearModel, method: str, options: LinearModelOptions, seed: int) -> nn.Module:
    """A linear layer that starts at W, ready to be trained by one method: `(samples, d_in)` to `(samples, d_out)`."""
    outputs, inputs = problem.weight.shape
    pretrained = nn.Linear(inputs, outputs, bias=False)
    with torch.no_grad():
        pretrained.weight.copy_(torch.from_numpy(problem.weight))
    model = nn.Sequential(OrderedDict(map=pretrained))
    if method == "full":
        return model
    common = {"r": options.rank, "lora_alpha": 2 * options.rank, "target_modules": ["map"]}
    gated = DiselConfig(**common, gate_lr_ratio=options.gate_lr_ratio)
    config: PeftConfig = gated if method == "disel" else LoraConfig(**common)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT misses the configuration a transformer would have
        torch.manual_seed(seed)
        return get_peft_model(model, config)  # type: ignore[arg-type]  # any module will do


def _batches(
    problem: LinearModel, options: LinearModelOptions, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs `(batch, d_in)` and targets `(batch, d_out)` of every step, fp32, the same for all methods."""
    generator = torch.Generator().manual_seed(seed)
    weight, update = torch.from_numpy(problem.weight).float(), torch.from_numpy(problem.update).float()
    size = options.batch_size
    for step in range(options.steps):
        if step % BATCHES_AT_ONCE == 0:
            left = min(BATCHES_AT_ONCE, options.steps - step)
            drawn, first = problem.sample(left * size, generator)
            drawn = drawn.float()
            targets = drawn @ weight.T + first.float().unsqueeze(1) * (drawn @ update.T)
        piece = slice(step % BATCHES_AT_ONCE * size, (step % BATCHES_AT_ONCE + 1) * size)
        yield drawn[piece], targets[piece]


def _train(problem: LinearModel, method: str, options: LinearModelOptions, seed: int) -> Trained:
    """Adam on fresh samples, its rate falling along a cosine to 0, so that the end is free of sampling noise."""
    model = student(problem, method, options, seed)
    multipliers = {"lora_G": options.gate_lr_ratio} if method == "disel" else None
    groups = parameter_groups(model, lr=options.lr, weight_decay=0.0, rate_multipliers=multipliers)
    optimizer = torch.optim.Adam(groups, lr=options.lr, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=options.steps)
    marks = {round(mark) for mark in np.linspace(0, options.steps, min(CURVE_POINTS, options.steps) + 1)}
    steps, curve = [0], [_measure(problem, model, method, CURVE_SAMPLES)]
    for step, (inputs, targets) in enumerate(_batches(problem, options, seed), start=1):
        loss = (model(inputs) - targets).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if step in marks:
            steps.append(step)
            last = step == options.steps
            curve.append(_measure(problem, model, method, FINAL_SAMPLES if last else CURVE_SAMPLES))
    if not np.isfinite(curve[-1].total):
        raise TrainingError(f"linear model: {method} diverged on seed {seed}; lower the learning rate")
    return Trained(method, tuple(steps), tuple(curve), _gates(problem, model) if method == "disel" else None)


def _correction(problem: LinearModel, model: nn.Module) -> Correction:
    weight = torch.from_numpy(problem.weight).float()

    def correction(inputs: torch.Tensor) -> torch.Tensor:
        inputs = inputs.float()
        return model(inputs) - inputs @ weight.T

    return correction


@torch.no_grad()
def _measure(problem: LinearModel, model: nn.Module, method: str, samples: int) -> Losses:
    """The population losses: exact for a fixed correction, on seeded samples for a gated one."""
    correction = _correction(problem, model)
    if method == "disel":
        return problem.losses(correction, samples=samples, seed=EVALUATION_SEED)
    unit = torch.eye(problem.weight.shape[1])
    return problem.fixed_losses(correction(unit).T.double().numpy())


@torch.no_grad()
def _gates(problem: LinearModel, model: nn.Module) -> np.ndarray:
    """Gate values along the line through the means, `(positions, rank)`."""
    ((_, layer),) = disel_layers(model)
    seen: list[torch.Tensor] = []

    def observe(_: str, gates: torch.Tensor) -> None:
        seen.append(gates)

    layer.gate_observers.append(observe)
    try:
        model(torch.from_numpy(_line(problem)).float())
    finally:
        layer.gate_observers.remove(observe)
    return seen[0].double().numpy()
