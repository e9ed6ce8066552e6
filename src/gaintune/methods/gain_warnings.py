"""Warnings on what GAIN trains: of gains at 0 or below while it does, and afterwards of gains too near 1 to act.

A gain below 0 turns the feature's sign for everything that reads it: the learning rate is near instability. The GAIN
paper (appendix J) sees earlier domains degrade in the runs where that happens early in a sequence. A gain nearer to 1
than a quarter of the epsilon of 16-bit activations is rounded away in every one of them.
"""

from __future__ import annotations

import logging
from typing import cast

import torch
from torch import nn

from gaintune.storage.run import first_process
from gaintune.tuners.gain import GainLayer
from gaintune.methods.rules import Lesson, StageRule

logger = logging.getLogger(__name__)


class GainWarnings(StageRule):
    """Looks at the smallest gain after every update until it has warned once, and at all after the last one.

    A look is one pass over the gains and one number read back from the device. It changes nothing.
    """

    def __init__(self) -> None:
        self._gains: dict[str, torch.Tensor] | None = None
        self._warned = False

    @torch.no_grad()
    def after_update(self, model: nn.Module, step: int) -> None:
        """Warn of the first gain at or below 0."""
        if self._warned:
            return
        if self._gains is None:  # not at the start: loading a checkpoint may put other parameters in their place
            self._gains = {name: v for name, (_, v) in _trained_layers(model).items()}
        smallest = [v.amin() for v in self._gains.values()]
        if smallest and float(torch.stack([v.to(smallest[0].device) for v in smallest]).amin()) <= -1:
            self._warned = True
            if first_process():
                self._warn(step + 1)

    def finish(self, model: nn.Module, lesson: Lesson) -> None:
        """Warn where no gain is far enough from 1 to change an activation in the base's numbers."""
        found = _trained_layers(model).values()
        dtypes = {cast(torch.Tensor, layer.get_base_layer().weight).dtype for layer, _ in found}
        if not first_process() or not dtypes or not dtypes <= {torch.bfloat16, torch.float16}:
            return
        largest = max(float(v.detach().abs().amax()) for _, v in found)
        least = min(torch.finfo(dtype).eps for dtype in dtypes) / 4
        if largest < least:
            logger.warning(
                "no gain is further from 1 than %.1g, and %s activations show nothing below %.1g, so the adapter "
                "changes nothing. Train it longer or at a higher rate, or compute in fp32 (model.dtype=fp32)",
                largest, " or ".join(sorted(str(each).removeprefix("torch.") for each in dtypes)), least,
            )  # fmt: skip

    def _warn(self, updates: int) -> None:
        gains = self._gains or {}
        flipped = sum(int((v <= -1).sum()) for v in gains.values())
        total = sum(v.numel() for v in gains.values())
        name, lowest = min(((name, 1 + float(v.amin())) for name, v in gains.items()), key=lambda pair: pair[1])
        logger.warning(
            "after update %d, %s of %s gains are at or below 0 (the lowest, %.3f, in %s): their features' signs are "
            "turned, and what was learnt before may suffer. A lower learning rate keeps gains positive; see "
            "`gaintune gains` on what comes out",
            updates, f"{flipped:,}", f"{total:,}", lowest, name,
        )  # fmt: skip


def _trained_layers(model: nn.Module) -> dict[str, tuple[GainLayer, torch.Tensor]]:
    """The layers whose gains train, each with these gains minus 1, by the name of their module in the base."""
    return {
        name.removeprefix("base_model.model."): (layer, v)
        for name, layer in model.named_modules()
        if isinstance(layer, GainLayer)
        for v in layer.gain_v.values()
        if v.requires_grad
    }
