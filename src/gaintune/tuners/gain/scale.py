"""The one operation of GAIN: activations times one gain per feature, exact in half precision and in one pass."""

from __future__ import annotations

from typing import Any

import torch


def scale_features(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """`x * (1 + v)` in the dtype of `x`.

    Args:
        x: activations `(..., features)`.
        v: gain minus 1, `(features,)` or broadcastable to `x`.

    In half precision `1 + v` must not be rounded: bfloat16 has nothing between 1 and 1.0078, so gains within 0.3 % of
    1 would not act at all. There `x + x * v` is computed instead, with one rounding at the end; `v` itself may be
    rounded, since that error is relative to `v`.
    """
    if v.device != x.device:
        v = v.to(x.device)
    if x.dtype in (torch.bfloat16, torch.float16):
        return _ScaleHalf.apply(x, v)  # type: ignore[return-value]  # autograd.Function.apply is untyped
    return x * (1 + v.to(torch.promote_types(x.dtype, v.dtype)))


class _ScaleHalf(torch.autograd.Function):
    """Autograd's own gradient of addcmul takes three more passes over the activations; this takes the two needed."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:  # type: ignore[override]  # the context-free form
        return torch.addcmul(x, x, v.to(x.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor], output: torch.Tensor) -> None:
        x, v = inputs
        # x is kept for the gradient of v alone
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, v)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:  # type: ignore[override]
        x, v = ctx.saved_tensors
        grad_x = grad_v = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.addcmul(grad, grad, v.to(grad.dtype))
        if ctx.needs_input_grad[1]:
            grad_v = _sum_to_shape(grad, x, v)
        return grad_x, grad_v


def _sum_to_shape(grad: torch.Tensor, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """`grad * x` summed in float32 over the dimensions along which `v` was broadcast."""
    # products of scaled gradients leave float16's range; bfloat16 has float32's
    product = grad.float() * x if x.dtype == torch.float16 else grad * x
    if v.dim() == 1:
        return product.reshape(-1, v.numel()).sum(0, dtype=torch.float32).to(v.dtype)
    return product.float().sum_to_size(v.shape).to(v.dtype)
