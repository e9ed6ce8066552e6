"""A warning, while GAIN trains, once a gain has fallen to 0 or below: the learning rate is then near instability.

A gain below 0 turns the feature's sign for everything that reads it. The GAIN paper (appendix J) sees earlier domains
degrade in the runs where that happens early in a sequence.
"""

from __future__ import annotations

import logging

import torch
from torch import nn

from gaintune.runs import first_process
from gaintune.tuners.gain import GainLayer
from gaintune.updates import StageRule

logger = logging.getLogger(__name__)


class SignFlips(StageRule):
    """Looks at the smallest gain after every update until it has warned once; changes nothing.

    A look is one pass over the gains and one number read back from the device.
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
            self._gains = _trained_gains(model)
        smallest = [v.amin() for v in self._gains.values()]
        if smallest and float(torch.stack([v.to(smallest[0].device) for v in smallest]).amin()) <= -1:
            self._warned = True
            if first_process():
                self._warn(step + 1)

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


def _trained_gains(model: nn.Module) -> dict[str, torch.Tensor]:
    """The gains that train, minus 1, by the name of their module in the base."""
    return {
        name.removeprefix("base_model.model."): v
        for name, layer in model.named_modules()
        if isinstance(layer, GainLayer)
        for v in layer.gain_v.values()
        if v.requires_grad
    }
