"""The two products of a gated low-rank update, each keeping for its gradient what it was given and nothing wider."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F


def stacked_product(x: torch.Tensor, weights: tuple[torch.Tensor, ...], dtype: torch.dtype) -> torch.Tensor:
    """`x` times every matrix at once, `(..., rows of all weights)`, computed and returned in `dtype`.

    Autograd's own way would keep a copy of `x` in `dtype`, one for each of the layers that read the same `x`; this
    keeps `x` itself, and reads it once for all weights.
    """
    if not torch.is_grad_enabled():  # where torch.compile does not look into a function with a gradient of its own
        return _StackedProduct.forward(x, dtype, *weights)
    return _StackedProduct.apply(x, dtype, *weights)  # type: ignore[return-value]  # apply is untyped


def add_product(result: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`result + hidden weight'` in the dtype of `result`, the product computed in `dtype` and rounded once.

    Args:
        result: what the base layer computes, `(..., out_features)`.
        hidden: `(..., r)`.
        weight: `(out_features, r)`.
    """
    if not torch.is_grad_enabled():
        return _AddProduct.forward(result, hidden, weight, dtype)
    return _AddProduct.apply(result, hidden, weight, dtype)  # type: ignore[return-value]


class _StackedProduct(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor, dtype: torch.dtype, *weights: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return F.linear(x.to(dtype), torch.cat([weight.to(dtype) for weight in weights]))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        x, ctx.dtype, *weights = inputs
        ctx.save_for_backward(x, *weights)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        x, *weights = ctx.saved_tensors
        grad_x, grad_weights = None, [None] * len(weights)
        if ctx.needs_input_grad[0]:
            stacked = torch.cat([weight.to(ctx.dtype) for weight in weights])
            grad_x = (grad @ stacked).to(x.dtype)
        if any(ctx.needs_input_grad[2:]):
            rows = x.reshape(-1, x.shape[-1]).to(ctx.dtype)
            stacked = grad.reshape(-1, grad.shape[-1]).T @ rows
            parts = stacked.split([len(weight) for weight in weights])
            grad_weights = [part.to(weight.dtype) for part, weight in zip(parts, weights, strict=True)]
        return grad_x, None, *grad_weights


class _AddProduct(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(  # type: ignore[override]  # the context-free form
        result: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        return (result + F.linear(hidden.to(dtype), weight.to(dtype))).to(result.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        _, hidden, weight, ctx.dtype = inputs
        ctx.save_for_backward(hidden, weight)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        hidden, weight = ctx.saved_tensors
        wide = grad.to(ctx.dtype)
        grad_hidden = grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_hidden = (wide @ weight.to(ctx.dtype)).to(hidden.dtype)
        if ctx.needs_input_grad[2]:
            rows = hidden.reshape(-1, hidden.shape[-1]).to(ctx.dtype)
            grad_weight = (wide.reshape(-1, wide.shape[-1]).T @ rows).to(weight.dtype)
        return grad, grad_hidden, grad_weight, None
