"""Count the bytes of a computation on fake tensors, which have shapes and no values. Knows nothing of plans.

`made_fake` puts fake tensors into a model, and `fused_attention` computes attention as a GPU does. A `Ledger` counts
every storage once, from its first use until it is freed.
"""

from __future__ import annotations

import contextlib
import logging
import random
import warnings
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, cast
from unittest import mock

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import masking_utils

_ATEN = torch.ops.aten
# Operators that read a tensor's values, which fake tensors do not have.
VALUES = (_ATEN._local_scalar_dense.default, _ATEN.is_nonzero.default, _ATEN.allclose.default, _ATEN.equal.default)


def made_fake(model: nn.Module, fake: Any) -> list[torch.Tensor]:
    """Replace the meta tensors of a model by fake ones on the CPU, which know autocast; return them, once each."""
    made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def replaced(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:
            with fake:
                new = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
            if isinstance(tensor, nn.Parameter):
                new = nn.Parameter(new, requires_grad=tensor.requires_grad)
            made[id(tensor)] = (tensor, new)
        return made[id(tensor)][1]

    for module in model.modules():
        for tensors in cast(list[dict[str, Any]], [module._parameters, module._buffers]):
            tensors.update({name: replaced(tensor) for name, tensor in tensors.items() if tensor is not None})
    return [new for _, new in made.values()]


@contextlib.contextmanager
def fused_attention(*, packed: bool, gpu: bool) -> Iterator[None]:
    """Compute attention as a GPU's fused kernels do, which keep no attention weights; only packed rows need a mask.

    Names are replaced, since torch's modes for functions do not reach what a backward pass recomputes.
    """
    original = F.scaled_dot_product_attention

    def attend(query: Any, key: Any, value: Any, attn_mask: Any = None, **options: Any) -> Any:
        mask = attn_mask if packed else None
        if gpu:
            return _FusedAttention.apply(query, key, value, None if mask is None else mask.to(query.dtype))
        return original(query, key, value, attn_mask=mask, **options)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", attend))
        if not packed:  # else a mask is made, as in a graph that must hold for any values
            stack.enter_context(mock.patch.object(masking_utils, "is_tracing", lambda *_: False, create=True))
        yield


class _FusedAttention(torch.autograd.Function):
    """Shapes of fused attention: output and log-sum of each row are kept beside the inputs."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
        batch, heads, tokens, _ = query.shape
        output = query.new_empty(batch, tokens, heads, value.shape[-1]).transpose(1, 2)  # as the kernels lay it out
        ctx.save_for_backward(query, key, value, mask, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return (*(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3]), None)


class Ledger(TorchDispatchMode):
    """Bytes of all storages that operators make, each counted once from then until it is freed.

    Attributes:
        live: bytes now.
        peak: the most since `start`.
        since_mark: the most since `mark`.
    """

    def __init__(self, known: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self.live = self.peak = self.since_mark = 0

    def start(self) -> None:
        """Count the peak anew."""
        self.live, self.peak = 0, 0

    def mark(self) -> None:
        """Begin `since_mark`."""
        self.since_mark = self.live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in VALUES:  # so that checks of values pass
            return True
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return made

    def _add(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        weakref.finalize(storage, self._free, key, size)
        self.live += size
        self.peak, self.since_mark = max(self.peak, self.live), max(self.since_mark, self.live)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Restore every generator that `attach` seeds, and keep warnings quiet that training will repeat."""
    states, level = (random.getstate(), np.random.get_state()), logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        random.setstate(states[0])
        np.random.set_state(states[1])
