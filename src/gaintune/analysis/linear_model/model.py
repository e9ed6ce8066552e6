"""The linear model of the DISeL paper (section 2, appendix I): what fixed and input-dependent corrections can reach.

Inputs come from an equal mixture of two Gaussians that share a covariance. The target is `(W + dW) x` on the first (the
text one adapts to) and `W x` on the second (the text whose behaviour is to be kept). Everything here is float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

Correction = Callable[[torch.Tensor], torch.Tensor]
"""What a model adds to `W x`: `(samples, d_in)` to `(samples, d_out)`."""

SAMPLES_AT_ONCE = 16_384
TAIL = 12.0  # standard deviations left out of an integral: a mass below 1e-32


@dataclass(frozen=True)
class Losses:
    """Mean squared errors per output coordinate: on the first population (`in_domain`) and the second (`retention`)."""

    in_domain: float
    retention: float

    @property
    def total(self) -> float:
        """Over the equal mixture of both."""
        return (self.in_domain + self.retention) / 2


@dataclass(frozen=True)
class LinearModel:
    """Two Gaussian populations N(mean1, covariance) and N(mean0, covariance), and what is asked on each.

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
        """The paper's experiment (appendix I.4): W, and the two factors of dW, have independent normal entries.

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
        """`E[x x']` on the first and on the second population, each `(d_in, d_in)`."""
        return (
            self.covariance + np.outer(self.mean1, self.mean1),
            self.covariance + np.outer(self.mean0, self.mean0),
        )

    def best_fixed(self) -> np.ndarray:
        """The matrix D with the smallest loss when `D x` is added on every input, `(d_out, d_in)` (equation 16).

        With g = 1 on the first population and 0 on the second, the target less `W x` is `g dW x`, so least squares give
        `D = dW E[g x x'] E[x x']^-1 = dW M1 (M1 + M0)^-1`, M1 and M0 being the second moments. It is exactly dW / 2 if
        and only if `dW (M1 - M0) = dW (mean1 mean1' - mean0 mean0') = 0`: whenever the means are equal or opposite.
        Its rank is never above dW's, so LoRA of that rank reaches the same loss as full fine-tuning.
        """
        first, second = self.second_moments()
        return np.linalg.solve(first + second, first @ self.update.T).T  # the moments are symmetric

    def fixed_losses(self, correction: np.ndarray) -> Losses:
        """The losses of adding `correction @ x` on every input (equation 14)."""
        first, second = self.second_moments()
        missed = correction - self.update
        outputs = len(self.update)
        return Losses(
            float(np.sum(missed @ first * missed) / outputs), float(np.sum(correction @ second * correction) / outputs)
        )

    def bayes_gate(self) -> tuple[np.ndarray, float]:
        """w `(d_in,)` and b: `sigmoid(w'x + b)` is the probability that x is of the first population (equation 28)."""
        towards1 = np.linalg.solve(self.covariance, self.mean1)
        towards0 = np.linalg.solve(self.covariance, self.mean0)
        return towards1 - towards0, float(self.mean0 @ towards0 - self.mean1 @ towards1) / 2

    def bayes_losses(self) -> Losses:
        """The losses of `sigmoid(w'x + b) dW x`, below which no correction can go (equation 25).

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

        def integral(centre: float, sign: float) -> float:
            score = centre + deviation * normal
            error = np.exp(-2 * np.logaddexp(0.0, sign * score))  # squared share of dW x that is missed, or added
            return float(np.sum(density * error * (constant + linear * score + square * score**2))) / len(self.update)

        return Losses(in_domain=integral(variance / 2, 1.0), retention=integral(-variance / 2, -1.0))

    def sample(self, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs `(count, d_in)` from the mixture, float64, and whether each is of the first population, `(count,)`."""
        first = torch.rand(count, generator=generator, dtype=torch.float64) < 0.5
        factor = torch.from_numpy(np.linalg.cholesky(self.covariance))
        means = torch.from_numpy(np.stack([self.mean0, self.mean1]))
        normal = torch.randn(count, len(self.mean1), generator=generator, dtype=torch.float64)
        return means[first.long()] + normal @ factor.T, first

    def bayes_correction(self, inputs: torch.Tensor) -> torch.Tensor:
        """`sigmoid(w'x + b) dW x` for inputs `(samples, d_in)`: `(samples, d_out)` (equation 30)."""
        direction, offset = self.bayes_gate()
        gate = torch.sigmoid(inputs @ torch.from_numpy(direction) + offset)
        return gate.unsqueeze(1) * (inputs @ torch.from_numpy(self.update).T)

    @torch.no_grad()
    def losses(self, correction: Correction, *, samples: int, seed: int) -> Losses:
        """The losses of any correction, by its difference from the Bayes-optimal one on seeded samples.

        The Bayes losses are known exactly; only the difference is sampled, each input weighted by the probabilities of
        both populations. Its mean is the mean squared distance from the Bayes correction, so the total is never below
        the Bayes loss, and has little noise where a correction is close to it.
        """
        generator = torch.Generator().manual_seed(seed)
        direction, offset = self.bayes_gate()
        update = torch.from_numpy(self.update)
        in_domain = retention = 0.0
        for start in range(0, samples, SAMPLES_AT_ONCE):
            inputs, _ = self.sample(min(SAMPLES_AT_ONCE, samples - start), generator)
            probability = torch.sigmoid(inputs @ torch.from_numpy(direction) + offset)
            wanted = inputs @ update.T
            best = probability.unsqueeze(1) * wanted
            given = correction(inputs).double()
            missed = (given - wanted).square().sum(1) - (best - wanted).square().sum(1)
            added = given.square().sum(1) - best.square().sum(1)
            in_domain += float((2 * probability * missed).sum())
            retention += float((2 * (1 - probability) * added).sum())
        bayes, scale = self.bayes_losses(), samples * len(self.update)
        return Losses(bayes.in_domain + in_domain / scale, bayes.retention + retention / scale)
