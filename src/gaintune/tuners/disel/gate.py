"""The trained part of a gate: its matrix G and its bias c."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from gaintune.tuners.precision import AtLeastFloat32


class Gate(AtLeastFloat32):
    """`z(x) = G x + c` for one layer, `(..., in_features)` to `(..., r)`; G is `weight`, or `weight @ weight_in`.

    The first product is left to the caller, who has another matrix to multiply the same `x` with: `reads` is that
    matrix, and `forward` takes `x @ reads.T`. Kept in float32 also where A and B are narrower.
    """

    def __init__(
        self,
        in_features: int,
        r: int,
        *,
        rank: int | None = None,
        weight_init: Literal["kaiming", "zeros"] = "kaiming",
        bias_init: float = -3.0,
    ) -> None:
        super().__init__()
        self.weight_in = None if rank is None else nn.Parameter(torch.empty(rank, in_features))
        self.weight = nn.Parameter(torch.empty(r, in_features if rank is None else rank))
        self.bias = nn.Parameter(torch.empty(r))
        self.reset(weight_init, bias_init)

    def reset(self, weight_init: Literal["kaiming", "zeros"], bias_init: float) -> None:
        """Start values: every bias at `bias_init` whatever the width, G as nn.Linear's own or at 0."""
        if self.weight_in is not None:
            nn.init.kaiming_uniform_(self.weight_in, a=math.sqrt(5))
        if weight_init == "zeros":
            nn.init.zeros_(self.weight)
        else:
            nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        nn.init.constant_(self.bias, bias_init)

    @property
    def reads(self) -> torch.Tensor:
        """The matrix that multiplies the layer's input."""
        return self.weight if self.weight_in is None else self.weight_in

    def forward(self, product: torch.Tensor) -> torch.Tensor:
        """The gate before its sigmoid, in the dtype of `product`."""
        bias = self.bias.to(product.dtype)
        if self.weight_in is None:
            return product + bias
        return F.linear(product, self.weight.to(product.dtype), bias)

    def extra_repr(self) -> str:
        rank = "" if self.weight_in is None else f", rank={len(self.weight_in)}"
        return f"in_features={self.reads.shape[1]}, r={len(self.weight)}{rank}"
