"""Parameters that stay in float32, whatever their module is cast to or loaded from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import nn


class AtLeastFloat32(nn.Module):
    """A module whose own parameters are never narrower than float32.

    A gain of 1.001 is 1 in bfloat16, a gate's bias of -3 moves there in steps of 0.016, and smaller updates are lost.
    So `model.to(torch.bfloat16)`, `.half()` and the like, and PEFT's own move to the dtype of the base, move these
    parameters but leave their dtype; half-precision values are widened as they are loaded.
    """

    def _apply(self, fn: Callable[..., torch.Tensor], recurse: bool = True) -> Self:
        before = {
            name: (parameter.data, None if parameter.grad is None else parameter.grad.detach())
            for name, parameter in self._parameters.items()
            if parameter is not None
        }
        super()._apply(fn, recurse)
        for name, (data, grad) in before.items():
            parameter = self._parameters[name]
            if parameter is not None and parameter.dtype.itemsize < 4:
                parameter.grad = None
                parameter.data = data.to(parameter.device, torch.float32)
                parameter.grad = None if grad is None else grad.to(parameter.device, torch.float32)
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:  # type: ignore[override]
        own = {f"{prefix}{name}" for name in self._parameters}
        narrow = {key: value for key, value in state_dict.items() if key in own and value.dtype.itemsize < 4}
        widened = {**state_dict, **{key: value.float() for key, value in narrow.items()}}
        super()._load_from_state_dict(widened, prefix, *args)


class Float32ParameterDict(AtLeastFloat32, nn.ParameterDict):
    """The `v` of every adapter of one layer, by adapter name."""
