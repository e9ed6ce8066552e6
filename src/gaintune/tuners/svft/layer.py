"""A linear layer with changes of its weight's singular values, and their merge into the weight."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from gaintune.errors import UnsupportedModuleError
from gaintune.tuners.linear import UpdatedLinear
from gaintune.tuners.precision import Float32ParameterDict
from gaintune.tuners.svft.config import SvftConfig
from gaintune.tuners.targets import SHAPES_ALONE


def singular_vectors(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return U `(out, k)` and V^T `(k, in)` of a weight `(out, in)`, k being its smaller side, in its own dtype.

    A pair of vectors may be negated together. Here the largest entry of every left vector is positive, so that the
    same weight gives the same vectors.
    """
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    left, _, right = torch.linalg.svd(wide, full_matrices=False)
    sign = torch.sign(left.gather(0, left.abs().argmax(dim=0, keepdim=True)))
    return (left * sign).to(weight.dtype).contiguous(), (right * sign.T).to(weight.dtype).contiguous()


def band_lengths(k: int, off_diagonals: int) -> list[int]:
    """Return the lengths of the diagonals of M `(k, k)` in the order they are stored: main, +1, -1, +2, -2, ..."""
    sides = [k - distance for distance in range(1, min(off_diagonals, k - 1) + 1)]
    return [k, *(length for length in sides for _ in range(2))]


def band_product(m: torch.Tensor, hidden: torch.Tensor, off_diagonals: int) -> torch.Tensor:
    """Return `M h` for every h in `hidden` `(..., k)`; `m` holds the diagonals of M one after another."""
    main, *sides = m.split(band_lengths(hidden.shape[-1], off_diagonals))
    product = hidden * main
    for distance, (upper, lower) in enumerate(zip(sides[::2], sides[1::2], strict=True), start=1):
        product = product + F.pad(hidden[..., distance:] * upper, (0, distance))
        product = product + F.pad(hidden[..., :-distance] * lower, (distance, 0))
    return product


class SvftLinear(UpdatedLinear):
    """`W x + U M V^T x`; `svft_m[name]` holds the diagonals of M of adapter `name`, float32.

    U and V are buffers in the weight's dtype that are not saved, one pair for all adapters of the layer. Merging keeps
    the original weight object, which `unmerge` puts back.
    """

    adapter_layer_names: tuple[str, ...] = ("svft_m",)
    other_param_names: tuple[str, ...] = ("off_diagonals",)

    left: torch.Tensor
    right: torch.Tensor

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: SvftConfig) -> None:
        super().__init__(base_layer, adapter_name, config)
        self.svft_m = Float32ParameterDict()
        self.off_diagonals: dict[str, int] = {}
        self._original: nn.Parameter | None = None
        weight = self._weight()
        if weight.device.type == "meta" and not SHAPES_ALONE.get():
            raise UnsupportedModuleError("SVFT needs the base's weights, and this base is loaded without them.")
        self.base_dtype = config.base_dtype
        dtype = weight.dtype if config.base_dtype is None else getattr(torch, config.base_dtype)
        left, right = singular_vectors(weight.to(dtype).to(weight.dtype))
        self.register_buffer("left", left, persistent=False)
        self.register_buffer("right", right, persistent=False)
        self.update_layer(adapter_name, config)

    def _weight(self) -> torch.Tensor:
        """Return the base's weight as `(out, in)`."""
        base: Any = self.get_base_layer()
        return base.weight.detach().T if isinstance(base, Conv1D) else base.weight.detach()

    def update_layer(self, adapter_name: str, config: SvftConfig) -> None:
        """Add M of one adapter: at 0, or at random where `config.init_weights` is off."""
        if config.base_dtype != self.base_dtype:
            raise UnsupportedModuleError(
                f"The adapter {adapter_name!r} means the singular vectors of {config.base_dtype} weights, and the one "
                f"already here those of {self.base_dtype} weights: load them on models of their own."
            )
        count = sum(band_lengths(min(self.in_features, self.out_features), config.off_diagonals))
        self.off_diagonals[adapter_name] = config.off_diagonals
        self._add(adapter_name, config, svft_m=torch.zeros(count) if config.init_weights else torch.randn(count))

    def add_update(self, adapter_name: str, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        """Return `result + U M V^T x` in the dtype of `result`; the product with M is computed in float32 or wider."""
        m = self.svft_m[adapter_name]
        hidden = F.linear(x.to(self.right.dtype), self.right)
        hidden = hidden.to(torch.promote_types(hidden.dtype, m.dtype))
        hidden = band_product(m, hidden, self.off_diagonals[adapter_name])
        return (result + F.linear(hidden.to(self.left.dtype), self.left)).to(result.dtype)

    @torch.no_grad()
    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """Return `U M V^T` in the shape of the base's weight, in float32 or wider."""
        m = self.svft_m[adapter_name]
        dtype = torch.promote_types(self.left.dtype, m.dtype)
        product = band_product(m, self.right.to(dtype).T, self.off_diagonals[adapter_name])
        delta = self.left.to(dtype) @ product.T
        return delta.T if isinstance(self.get_base_layer(), Conv1D) else delta

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the updates to a copy of the base's weight, in float32 and rounded once.

        Raises `ValueError` before anything is changed if `safe_merge` and the sum is not finite.
        """
        new = [name for name in check_adapters_to_merge(self, adapter_names) if self.has_adapter(name)]
        if not new:
            return
        base: Any = self.get_base_layer()
        original = base.weight if self._original is None else self._original
        names = [*self.merged_adapters, *new]
        merged = original.detach().to(torch.promote_types(original.dtype, torch.float32), copy=True)
        for name in names:
            merged += self.get_delta_weight(name)
        merged = merged.to(original.dtype)
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(f"NaNs detected in the merged weights. The adapter {', '.join(new)} seems to be broken.")
        base.weight = nn.Parameter(merged, requires_grad=original.requires_grad)
        self._original, self.merged_adapters = original, names

    def unmerge(self) -> None:
        """Put back the weight that was there before merging: the same tensor, not a difference."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        base: Any = self.get_base_layer()
        base.weight, self._original, self.merged_adapters = self._original, None, []

    def __repr__(self) -> str:
        return "svft." + super().__repr__()
