"""A base with gains on it that can be set to any values, as one vector over all its modules."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from gaintune.adapters import load_adapter, strip_adapters
from gaintune.analysis.gains.factors import PREFIX
from gaintune.analysis.transfer.sharing import FloatArray, GainVectors
from gaintune.models import Base
from gaintune.tuners.gain.layer import GainLayer


@dataclass(frozen=True)
class PlacedGains:
    """A model and the gains in it, in the order of a vector."""

    model: nn.Module
    gains: tuple[torch.Tensor, ...]

    def put(self, v: FloatArray) -> None:
        """Set every gain to `1 + v`, `(features,)`; zeros give the pretrained model's outputs, bit for bit."""
        ends = np.cumsum([len(gain) for gain in self.gains])[:-1]
        with torch.no_grad():
            for gain, part in zip(self.gains, np.split(v, ends), strict=True):
                gain.copy_(torch.from_numpy(part))


@contextlib.contextmanager
def placed_gains(
    base: Base, adapter: Path, vectors: GainVectors, *, allow_other_base: bool = False
) -> Iterator[PlacedGains]:
    """Put an adapter's gains onto a base, to be set to other values; afterwards the base is as it was.

    Args:
        base: the pretrained model.
        adapter: one of those that `vectors` were read from; it says where gains are.
        vectors: the order of modules.
        allow_other_base: as in `load_adapter`.

    Raises:
        AdapterError, BaseMismatchError: as `load_adapter` does.
    """
    flags = {name: parameter.requires_grad for name, parameter in base.model.named_parameters()}
    model = load_adapter(base, adapter, allow_other_base=allow_other_base)
    try:
        layers = {
            name.removeprefix(PREFIX): each for name, each in model.named_modules() if isinstance(each, GainLayer)
        }
        yield PlacedGains(model, tuple(layers[name].gain_v["default"] for name, _ in vectors.modules))
    finally:
        strip_adapters(base.model)
        for name, parameter in base.model.named_parameters():
            parameter.requires_grad_(flags[name])
