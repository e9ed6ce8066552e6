"""Train full, LoRA and DISeL corrections of the DISeL paper's linear model, and set them against two closed forms.

DISeL paper (section 2, appendix I). Inputs come from an equal mixture of two Gaussians that share a covariance. The
target is `(W + dW) x` on the first (the text to adapt to) and `W x` on the second (the text whose behavior is to be
kept). The closed forms are float64.
"""

from __future__ import annotations

import math
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn

from gaintune.analysis.linear_model import LinearModelOptions
from gaintune.errors import TrainingError
from gaintune.progress import Progress, Silent
from gaintune.tuners import parameter_groups
from gaintune.tuners.disel import DiselConfig, disel_layers

Correction = Callable[[torch.Tensor], torch.Tensor]
"""What a model adds to `W x`: `(samples, d_in)` to `(samples, d_out)`."""

METHODS = ("full", "lora", "disel")
POSITIONS = np.linspace(-2.5, 2.5, 201)
"""Where gates are read, along the line through both means: -1 is the second population's mean, 1 the first's."""
SAMPLES_AT_ONCE, BATCHES_AT_ONCE = 16_384, 64
TAIL = 12.0  # standard deviations left out of an integral: a mass below 1e-32
CURVE_POINTS = 40
CURVE_SAMPLES, FINAL_SAMPLES = 2_048, 65_536
EVALUATION_SEED = 1_000_003  # far from the seeds of training


@dataclass(frozen=True)
class Losses:
    """Mean squared errors per output coordinate: on the first population (`in_domain`) and the second (`retention`)."""

    in_domain: float
    retention: float

    @property
    def total(self) -> float:
        """The error over the equal mixture of both."""
        return (self.in_domain + self.retention) / 2


@dataclass(frozen=True)
class LinearModel:
    """Two Gaussian populations N(mean1, covariance) and N(mean0, covariance), and the target on each.

    Attributes:
        weight: the pretrained map W, `(d_out, d_in)`, float64 like all the others.
        update: dW, what has to be added on the first population, `(d_out, d_in)`.
        mean1: mean of the first population, `(d_in,)`.
        mean0: mean of the second population, `(d_in,)`.
        covariance: of both, positive definite, `(d_in, d_in)`.
    """

    weight: np.ndarray
    update: np.ndarray
    mean1: np.ndarray
    mean0: np.ndarray
    covariance: np.ndarray

    @classmethod
    def draw(cls, dimension: int, rank: int, separation: float, seed: int) -> LinearModel:
        """Draw the paper's experiment (appendix I.4): W, and the two factors of dW, have independent normal entries.

        The means are `+separation / 2` and `-separation / 2` in the first coordinate and 0 in the others; the
        covariance is the identity, so `separation` is in standard deviations. dW is scaled to outputs of about unit
        variance.
        """
        generator = np.random.default_rng(seed)
        weight = generator.standard_normal((dimension, dimension)) / math.sqrt(dimension)
        left, right = generator.standard_normal((dimension, rank)), generator.standard_normal((rank, dimension))
        mean = np.zeros(dimension)
        mean[0] = separation / 2
        return cls(weight, left @ right / math.sqrt(rank * dimension), mean, -mean, np.eye(dimension))

    def second_moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Return `E[x x']` on the first and on the second population, each `(d_in, d_in)`."""
        return self.covariance + np.outer(self.mean1, self.mean1), self.covariance + np.outer(self.mean0, self.mean0)

    def best_fixed(self) -> np.ndarray:
        """Return the matrix D with the smallest loss when `D x` is added on every input, `(d_out, d_in)` (eq. 16).

        With g = 1 on the first population and 0 on the second, the target less `W x` is `g dW x`, so least squares give
        `D = dW E[g x x'] E[x x']^-1 = dW M1 (M1 + M0)^-1`, M1 and M0 being the second moments. It is exactly dW / 2 if
        and only if `dW (M1 - M0) = dW (mean1 mean1' - mean0 mean0') = 0`: whenever the means are equal or opposite.
        Its rank is never above dW's, so LoRA of that rank reaches the same loss as full fine-tuning.
        """
        first, second = self.second_moments()
        return np.linalg.solve(first + second, first @ self.update.T).T  # the moments are symmetric

    def fixed_losses(self, correction: np.ndarray) -> Losses:
        """Return the losses of adding `correction @ x` on every input (equation 14)."""
        first, second = self.second_moments()
        missed, outputs = correction - self.update, len(self.update)
        in_domain, retention = np.sum(missed @ first * missed), np.sum(correction @ second * correction)
        return Losses(float(in_domain / outputs), float(retention / outputs))

    def bayes_gate(self) -> tuple[np.ndarray, float]:
        """Return w `(d_in,)` and b of the probability `sigmoid(w'x + b)` of the first population (equation 28)."""
        towards1 = np.linalg.solve(self.covariance, self.mean1)
        towards0 = np.linalg.solve(self.covariance, self.mean0)
        return towards1 - towards0, float(self.mean0 @ towards0 - self.mean1 @ towards1) / 2

    def bayes_losses(self) -> Losses:
        """Return the losses of `sigmoid(w'x + b) dW x`, below which no correction can go (equation 25).

        The gate sees x through `s = w'x + b` alone, which is N(+v/2, v) on the first population and N(-v/2, v) on the
        second, `v = w' covariance w`. Given s, x has on both the mean `(mean1 + mean0) / 2 + (mean1 - mean0) s / v`
        and one covariance, so `E |dW x|^2` given s is a quadratic in s, and the losses are integrals over s. The
        trapezoid rule converges exponentially on them.
        """
        direction, _ = self.bayes_gate()
        apart = self.mean1 - self.mean0
        variance = float(direction @ apart)
        if variance == 0.0:  # the populations are the same, and the gate is 1/2 everywhere
            return self.fixed_losses(self.update / 2)
        deviation = math.sqrt(variance)
        step = min(0.1, 0.2 / deviation)  # fine against the normal density and against the sigmoid
        normal = np.arange(-TAIL - deviation, TAIL + deviation + step, step)
        density = step * np.exp(-(normal**2) / 2) / math.sqrt(2 * math.pi)
        within = self.covariance - np.outer(apart, apart) / variance
        spread = float(np.sum(self.update @ within * self.update))
        middle, slope = self.update @ (self.mean1 + self.mean0) / 2, self.update @ apart / variance
        constant, linear, square = spread + float(middle @ middle), 2 * float(middle @ slope), float(slope @ slope)

        def integral(center: float, sign: float) -> float:
            score = center + deviation * normal
            error = np.exp(-2 * np.logaddexp(0.0, sign * score))  # squared share of dW x that is missed, or added
            return float(np.sum(density * error * (constant + linear * score + square * score**2))) / len(self.update)

        return Losses(in_domain=integral(variance / 2, 1.0), retention=integral(-variance / 2, -1.0))

    def sample(self, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw inputs `(count, d_in)`, float64, and whether each is of the first population, `(count,)`."""
        first = torch.rand(count, generator=generator, dtype=torch.float64) < 0.5
        factor = torch.from_numpy(np.linalg.cholesky(self.covariance))
        means = torch.from_numpy(np.stack([self.mean0, self.mean1]))
        normal = torch.randn(count, len(self.mean1), generator=generator, dtype=torch.float64)
        return means[first.long()] + normal @ factor.T, first

    def bayes_correction(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return `sigmoid(w'x + b) dW x` for inputs `(samples, d_in)`: `(samples, d_out)` (equation 30)."""
        return self._probability(inputs).unsqueeze(1) * (inputs @ torch.from_numpy(self.update).T)

    def _probability(self, inputs: torch.Tensor) -> torch.Tensor:
        direction, offset = self.bayes_gate()
        return torch.sigmoid(inputs @ torch.from_numpy(direction) + offset)

    @torch.no_grad()
    def losses(self, correction: Correction, *, samples: int, seed: int) -> Losses:
        """Measure the losses of any correction by its difference from the Bayes-optimal one on seeded samples.

        The Bayes losses are known exactly; only the difference is sampled, each input weighted by the probabilities of
        both populations. Its mean is the mean squared distance from the Bayes correction, so the total is never below
        the Bayes loss, and has little noise where a correction is close to it.
        """
        generator = torch.Generator().manual_seed(seed)
        update = torch.from_numpy(self.update)
        in_domain = retention = 0.0
        for start in range(0, samples, SAMPLES_AT_ONCE):
            inputs, _ = self.sample(min(SAMPLES_AT_ONCE, samples - start), generator)
            probability = self._probability(inputs)
            wanted = inputs @ update.T
            best = probability.unsqueeze(1) * wanted
            given = correction(inputs).double()
            missed = (given - wanted).square().sum(1) - (best - wanted).square().sum(1)
            added = given.square().sum(1) - best.square().sum(1)
            in_domain += float((2 * probability * missed).sum())
            retention += float((2 * (1 - probability) * added).sum())
        bayes, scale = self.bayes_losses(), samples * len(self.update)
        return Losses(bayes.in_domain + in_domain / scale, bayes.retention + retention / scale)


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
    """Closed forms and methods, as in `METHODS`, on one seed, which draws W, dW, the start values and the samples."""

    seed: int
    best_fixed: Losses
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
    """Return the inputs at `POSITIONS`, `(positions, d_in)`."""
    middle, half = (problem.mean1 + problem.mean0) / 2, (problem.mean1 - problem.mean0) / 2
    return middle + POSITIONS[:, None] * half


def student(problem: LinearModel, method: str, options: LinearModelOptions, seed: int) -> nn.Module:
    """Make a linear layer that starts at W, ready to be trained: `(samples, d_in)` to `(samples, d_out)`."""
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
    """Yield inputs `(batch, d_in)` and targets `(batch, d_out)` of every step, fp32, the same for all methods."""
    generator = torch.Generator().manual_seed(seed)
    weight, update = torch.from_numpy(problem.weight).float(), torch.from_numpy(problem.update).float()
    size = options.batch_size
    for step in range(0, options.steps, BATCHES_AT_ONCE):
        drawn, first = problem.sample(min(BATCHES_AT_ONCE, options.steps - step) * size, generator)
        drawn = drawn.float()
        targets = drawn @ weight.T + first.float().unsqueeze(1) * (drawn @ update.T)
        yield from zip(drawn.split(size), targets.split(size), strict=True)


def _train(problem: LinearModel, method: str, options: LinearModelOptions, seed: int) -> Trained:
    """Train with Adam on fresh samples; its rate falls along a cosine to 0, which frees the end of sampling noise."""
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


@torch.no_grad()
def _measure(problem: LinearModel, model: nn.Module, method: str, samples: int) -> Losses:
    """Return the population losses: exact for a fixed correction, on seeded samples for a gated one."""
    weight = torch.from_numpy(problem.weight).float()

    def correction(inputs: torch.Tensor) -> torch.Tensor:
        inputs = inputs.float()
        return model(inputs) - inputs @ weight.T

    if method == "disel":
        return problem.losses(correction, samples=samples, seed=EVALUATION_SEED)
    return problem.fixed_losses(correction(torch.eye(weight.shape[1])).T.double().numpy())


@torch.no_grad()
def _gates(problem: LinearModel, model: nn.Module) -> np.ndarray:
    """Return gate values along the line through the means, `(positions, rank)`."""
    ((_, layer),) = disel_layers(model)
    seen: list[torch.Tensor] = []
    layer.gate_observers.append(lambda _, gates: seen.append(gates))
    model(torch.from_numpy(_line(problem)).float())
    return seen[0].double().numpy()
