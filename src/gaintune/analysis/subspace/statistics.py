"""How an update lies to the pretrained weight: energy outside its column space, and intruder dimensions.

GAIN paper, proposition 1: the range of `W diag(s)` lies in the range of `W`. LoRA's update `BA` may leave it, but only
where there is an outside: a weight whose rank equals its number of outputs (every trained square or wide projection)
reaches all of the output, so that no update of any kind can leave its column space. Intruder dimensions are counted as
by Shuttleworth et al., "LoRA vs Full Fine-tuning: An Illusion of Equivalence" (arXiv 2410.21228, definition 1 and
algorithm 1). All weights here are `(out_features, in_features)`, float64, and `y = W x`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gaintune.analysis.subspace import SubspaceOptions
from gaintune.errors import ConfigError


@dataclass(frozen=True)
class SubspaceFigures:
    """One weight before and after adaptation.

    Energy is the squared Frobenius norm. Shares are of the update's energy, and None where the update is zero.

    Attributes:
        outputs: rows of the weight.
        inputs: its columns.
        rank: numerical rank of the pretrained weight.
        tolerance: singular values up to this share of the largest counted as zero.
        weight_energy: energy of the pretrained weight.
        update_energy: energy of adapted minus pretrained.
        outside: share of the update outside the pretrained column space, measured as what is left of the update once
            its projection is taken away. Where `outputs == rank` there is no outside, and this is rounding.
        outside_rows: the same for the pretrained row space, which GAIN may leave; no outside where `inputs == rank`.
        leading_rank: how many leading directions hold the asked share of the weight's energy.
        outside_leading: share of the update outside the span of those left singular vectors.
        singular_values: of the adapted weight, its largest first, `(top,)`.
        similarities: for each of their left singular vectors the largest |cosine| to any pretrained one, `(top,)`.
        epsilon: similarity below which a vector is an intruder.
    """

    outputs: int
    inputs: int
    rank: int
    tolerance: float
    weight_energy: float
    update_energy: float
    outside: float | None
    outside_rows: float | None
    leading_rank: int
    outside_leading: float | None
    singular_values: tuple[float, ...]
    similarities: tuple[float, ...]
    epsilon: float

    @property
    def has_outside(self) -> bool:
        """Whether there is anything outside the pretrained column space."""
        return self.rank < self.outputs

    @property
    def has_outside_rows(self) -> bool:
        """Whether there is anything outside the pretrained row space."""
        return self.rank < self.inputs

    @property
    def intruders(self) -> int:
        """How many of the leading singular vectors are intruder dimensions."""
        return sum(similarity < self.epsilon for similarity in self.similarities)


def compare_weights(
    pretrained: torch.Tensor, adapted: torch.Tensor, options: SubspaceOptions | None = None
) -> SubspaceFigures:
    """Compare an adapted weight with the pretrained one, in float64 on the device they are on.

    Args:
        pretrained: `(out_features, in_features)`.
        adapted: the same shape.
        options: what is counted.

    Raises:
        ConfigError: not two finite matrices of one shape, or a pretrained weight of zeros.
    """
    chosen = options or SubspaceOptions()
    before, after = pretrained.detach().double(), adapted.detach().double()
    if before.dim() != 2 or before.shape != after.shape:
        shapes = f"{tuple(before.shape)} and {tuple(after.shape)}"
        raise ConfigError(f"weights of shape {shapes}: two matrices of one shape are needed")
    if not (before.isfinite().all() and after.isfinite().all()) or not before.any():
        raise ConfigError("a weight is not finite, or the pretrained one is zero everywhere")
    left, values, right = torch.linalg.svd(before, full_matrices=False)
    tolerance = chosen.tolerance
    if tolerance is None:
        tolerance = max(before.shape) * torch.finfo(torch.float32).eps
    rank = int((values > tolerance * values[0]).sum())
    held = values.square().cumsum(0) / values.square().sum()
    leading = min(int((held < chosen.leading - 1e-12).sum()) + 1, rank)
    update = after - before
    new_left, new_values, _ = torch.linalg.svd(after, full_matrices=False)
    top = min(chosen.top, len(new_values))
    similarities = (new_left[:, :top].T @ left).abs().amax(dim=1)
    return SubspaceFigures(
        outputs=before.shape[0],
        inputs=before.shape[1],
        rank=rank,
        tolerance=tolerance,
        weight_energy=float(before.square().sum()),
        update_energy=float(update.square().sum()),
        outside=share_outside(update, left[:, :rank]),
        outside_rows=share_outside(update.T, right[:rank].T),
        leading_rank=leading,
        outside_leading=share_outside(update, left[:, :leading]),
        singular_values=tuple(new_values[:top].tolist()),
        similarities=tuple(similarities.tolist()),
        epsilon=chosen.epsilon,
    )


def share_outside(update: torch.Tensor, basis: torch.Tensor) -> float | None:
    """Share of an update's energy outside the span of orthonormal columns; None for an update of zeros.

    What is outside is computed as a rest, not as 1 minus what is inside, which could not be smaller than rounding of 1.

    Args:
        update: `(features, n)`.
        basis: `(features, rank)`, orthonormal columns.
    """
    energy = float(update.square().sum())
    if energy == 0:
        return None
    rest = update - basis @ (basis.T @ update)
    return float(rest.square().sum()) / energy
