"""A parameter dictionary that stays in float32, whatever its module is cast to or loaded from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn


class Float32ParameterDict(nn.ParameterDict):
    """Holds `v` of every adapter of one layer, by adapter name.

    A gain of 1.001 is 1 in bfloat16, and an update of 0.001 is lost there. So `model.to(torch.bfloat16)`, `.half()`
    and the like move these parameters but leave their dtype, and half-precision values are widened as they are loaded.
    """

    def _apply(self, fn: Callable[..., torch.Tensor], recurse: bool = True) -> Float32ParameterDict:
        before = {
            name: (parameter.data, None if parameter.grad is None else parameter.grad.detach())
            for name, parameter in self.items()
        }
        super()._apply(fn, recurse)
        for name, (data, grad) in before.items():
            parameter = self[name]
            if parameter.dtype != torch.float32 and data.dtype == torch.float32:
                parameter.grad = None
                parameter.data = data.to(parameter.device)
                parameter.grad = None if grad is None else grad.to(parameter.device)
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:  # type: ignore[override]
        own = {f"{prefix}{name}" for name in self}
        widened = {key: value.float() if key in own else value for key, value in state_dict.items()}
        super()._load_from_state_dict(widened, prefix, *args)
