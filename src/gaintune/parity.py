"""How far two models are apart on the same text, and what rounding to fewer bits takes from an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from gaintune.data.examples import Examples
from gaintune.results.losses import DomainLoss
from gaintune.evaluate.perplexity import measure

LOGIT_POSITIONS = 512  # positions whose logits are compared: 100 MB for a vocabulary of 50,000
LOGIT_BLOCKS = 8  # blocks they lie in, each of which is computed once more


@dataclass(frozen=True)
class Reading:
    """What a model makes of some blocks: its losses, and its logits `(positions, vocabulary)` at some positions."""

    loss: DomainLoss
    logits: torch.Tensor


@dataclass(frozen=True)
class Distance:
    """Absolute differences between two models' logits, and the share of positions with the same first choice."""

    largest: float
    mean: float
    same_choice: float


def take_reading(model: nn.Module, examples: Examples, bytes_per_row: Sequence[int], batch_size: int) -> Reading:
    """Measure the loss on all rows, and keep the logits of evenly spread positions."""
    loss = measure(model, examples, bytes_per_row, batch_size=batch_size, title="comparing")
    device = next(model.parameters()).device
    count, length = examples.input_ids.shape
    chosen = torch.linspace(0, count - 1, min(count, LOGIT_BLOCKS)).long()
    positions = torch.linspace(0, length - 1, min(length, LOGIT_POSITIONS // len(chosen))).long()
    kept = []
    with torch.inference_mode():
        for number in chosen.split(1):
            inputs = {name: tensor.to(device) for name, tensor in examples[number].items() if name != "labels"}
            logits = model(**inputs, use_cache=False).logits
            kept.append(logits[0, positions.to(device)].float().cpu())
    return Reading(loss, torch.cat(kept))


def distance(first: Reading, second: Reading) -> Distance:
    """Compare two readings of the same blocks."""
    apart = (first.logits - second.logits).abs()
    same = first.logits.argmax(dim=1) == second.logits.argmax(dim=1)
    return Distance(apart.max().item(), apart.double().mean().item(), same.double().mean().item())


@dataclass(frozen=True)
class Rounding:
    """What is left of an adapter's changes to weights once they are rounded; sums over layers with `+`.

    `changed` weights differ from the base in fp32, `unmoved` of them are the base's again after rounding. `gains` are
    the multiplicative ones among the changes (one number for an input column or an output row) that differ from 1;
    `lost` are those that leave more than half of the weights they multiply unmoved; `error` sums, over the gains,
    how far the gain that acts after rounding is from the one learnt, relative to its distance from 1.
    """

    changed: int = 0
    unmoved: int = 0
    gains: int = 0
    lost: int = 0
    error: float = 0.0

    def __add__(self, other: Rounding) -> Rounding:
        return Rounding(
            self.changed + other.changed,
            self.unmoved + other.unmoved,
            self.gains + other.gains,
            self.lost + other.lost,
            self.error + other.error,
        )


def count_rounding(base: torch.Tensor, merged: torch.Tensor, dtype: torch.dtype) -> Rounding:
    """Compare one weight before and after a merge in fp32, `(out, in)`, as it will be once rounded to `dtype`."""
    base, merged = base.float(), merged.float()
    base_rounded, merged_rounded = base.to(dtype).float(), merged.to(dtype).float()
    changed = merged != base
    unmoved = changed & (merged_rounded == base_rounded)
    total = Rounding(int(changed.sum()), int(unmoved.sum()))
    if base.dim() != 2 or not total.changed:
        return total
    for axis in (0, 1):  # along a column first (GAIN), then along a row (a gain on outputs, or GPT-2's layers)
        gain = _gain(base, merged, axis)
        if not torch.allclose(merged, base * gain, rtol=1e-5, atol=1e-6 * base.abs().max().item()):
            continue
        learnt, acting = gain - 1, _gain(base_rounded, merged_rounded, axis) - 1
        moving = (learnt.abs() > 1e-6) & (changed.sum(dim=axis, keepdim=True) > 0)
        lost = moving & (2 * unmoved.sum(dim=axis, keepdim=True) > changed.sum(dim=axis, keepdim=True))
        error = ((acting - learnt).abs() / learnt.abs())[moving].double().sum()
        return total + Rounding(gains=int(moving.sum()), lost=int(lost.sum()), error=float(error))
    return total


def _gain(base: torch.Tensor, merged: torch.Tensor, axis: int) -> torch.Tensor:
    """The factor that takes each column or row of one matrix nearest to the other's; 1 where there is only zero."""
    norm = (base.double() ** 2).sum(dim=axis, keepdim=True)
    product = (base.double() * merged.double()).sum(dim=axis, keepdim=True)
    return torch.where(norm > 0, product / norm.clamp_min(1e-300), torch.ones_like(norm)).float()
