"""Next-token loss in chunks of tokens, so that the logits of a whole batch never exist; shared by all who measure.

The logits of a batch (tokens x vocabulary, fp32) are the peak of memory in language-model training. Here the
vocabulary product, the softmax and the gradient of the hidden states are computed a few hundred tokens at a time.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Mapping
from typing import Any, Protocol, cast

import torch
from torch import nn
from torch.nn import functional as F

logger = logging.getLogger(__name__)

CHUNK_TOKENS = 256
PROBE_TOKENS = 32


def autocast(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager:
    """Compute in mixed precision in `dtype`, or change nothing where it is None."""
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def without_adapter(model: Any) -> Any:
    """Return the transformers model inside a `PeftModel`, whose layers stay wrapped; any other model as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def probe(model: nn.Module) -> torch.Tensor:
    """Compute logits on a few tokens from all over the vocabulary, to see whether a model has changed."""
    wrapped: Any = model
    accepted = inspect.signature(without_adapter(model).forward).parameters
    options = {"use_cache": False} if "use_cache" in accepted else {}
    last = wrapped.config.get_text_config().vocab_size - 1
    tokens = torch.linspace(0, last, PROBE_TOKENS, dtype=torch.float64).long().to(wrapped.device)
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            return wrapped(input_ids=tokens[None], **options).logits.clone()
    finally:
        model.train(training)


class Objective(Protocol):
    """Loss that training minimizes: a sum over scored items (tokens, rows), divided by their number in an update."""

    def sum(self, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Sum the loss of a batch, in nats."""
        ...

    def scored(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Count the items that the sum goes over."""
        ...


def _logits(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, softcap: float | None
) -> torch.Tensor:
    logits = F.linear(hidden, weight, bias)
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def _compute_dtype(hidden: torch.Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies; the gradients are computed in the forward pass, where the softmax is at hand."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        softcap: float | None,
    ) -> torch.Tensor:
        dtype = _compute_dtype(hidden)
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        with torch.autocast(hidden.device.type, enabled=False):
            matrix = weight.to(dtype)
            offset = None if bias is None else bias.to(dtype)
            grad_hidden = torch.empty_like(hidden) if need_hidden else None
            grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
            grad_bias = torch.zeros_like(cast(torch.Tensor, bias), dtype=torch.float32) if need_bias else None
            total = torch.zeros((), dtype=torch.float32, device=hidden.device)
            for start in range(0, hidden.shape[0], CHUNK_TOKENS):
                piece = slice(start, start + CHUNK_TOKENS)
                chunk, target = hidden[piece].to(dtype), targets[piece]
                logits = _logits(chunk, matrix, offset, softcap)
                scored = target >= 0
                index = target.clamp_min(0).unsqueeze(1)
                grad = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
                total -= grad.gather(1, index).squeeze(1).masked_fill(~scored, 0.0).sum()
                if not (need_hidden or need_weight or need_bias):
                    continue
                grad.exp_().scatter_add_(1, index, torch.full_like(index, -1, dtype=torch.float32))
                if softcap is not None:
                    grad.mul_(1.0 - (logits.float() / softcap).square_())
                product = grad.to(dtype)
                # tokens not scored are left out of the small products, not of the wide matrix
                if grad_hidden is not None:
                    grad_hidden[piece] = (product @ matrix).masked_fill_(~scored.unsqueeze(1), 0.0)
                if grad_weight is not None:
                    grad_weight += product.T @ chunk.masked_fill(~scored.unsqueeze(1), 0.0)
                if grad_bias is not None:
                    grad_bias += scored.to(grad.dtype) @ grad
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (scale,) = grad_outputs
        gradients = [
            None if gradient is None else (gradient * scale).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*gradients, None, None)


def chunked_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Sum the cross-entropy of `softmax(hidden @ weight.T + bias)` against `targets` over tokens.

    Args:
        hidden: hidden states, `(tokens, d_model)`.
        weight: the vocabulary projection, `(vocabulary, d_model)`; gets a gradient if it requires one.
        targets: token ids, `(tokens,)`; -100 is not scored.
        bias: `(vocabulary,)`, or None.
        softcap: Gemma's bound on logits, `softcap * tanh(logits / softcap)`, or None.

    Returns:
        A scalar in nats, fp32. Differentiable once (no second derivatives).
    """
    return cast(torch.Tensor, _ChunkedCrossEntropy.apply(hidden, weight, bias, targets, softcap))


@torch.no_grad()
def token_losses(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Return the cross-entropy of every token, `(tokens,)` in nats, fp32, without gradients; arguments as above."""
    dtype = _compute_dtype(hidden)
    losses = []
    with torch.autocast(hidden.device.type, enabled=False):
        matrix = weight.to(dtype)
        offset = None if bias is None else bias.to(dtype)
        for chunk, target in zip(hidden.to(dtype).split(CHUNK_TOKENS), targets.split(CHUNK_TOKENS), strict=True):
            logits = _logits(chunk, matrix, offset, softcap).float()
            losses.append(F.cross_entropy(logits, target, reduction="none"))
    return torch.cat(losses)


def _inputs(batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return what the model reads of a batch."""
    return {name: batch[name] for name in ("input_ids", "position_ids") if name in batch}


class NextTokenLoss:
    """The next-token loss of a causal language model, with or without an adapter around it.

    The model itself is called (so that wrappers for several devices see the forward pass) but with logits for
    no position; the hidden states before the vocabulary projection are picked up on the way. Whether this
    gives the model's own logits is checked once on a few tokens; where it does not, full logits are used.

    Args:
        model: a causal language model of transformers, or a `PeftModel` around one.
    """

    def __init__(self, model: Any) -> None:
        base = without_adapter(model)
        self._base = base
        self._head = base.get_output_embeddings()
        text_config = base.config.get_text_config()
        self._softcap: float | None = getattr(text_config, "final_logit_softcapping", None)
        self.chunked = self._reproduces_logits(model)
        if not self.chunked:
            logger.warning("%s computes its logits in a way of its own: using full logits", type(base).__name__)

    def sum(self, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Sum the loss of predicting `labels[:, 1:]` from `input_ids[:, :-1]`, in nats.

        Args:
            model: the model, or a wrapper of it for several devices.
            batch: `input_ids` and `labels`, `(batch, tokens)`, -100 where a token is not scored; `position_ids` where a
                row holds several texts.
        """
        targets = batch["labels"][:, 1:].reshape(-1)
        if not self.chunked:
            logits = model(**_inputs(batch), use_cache=False).logits[:, :-1].flatten(0, 1)
            return F.cross_entropy(logits.float(), targets, reduction="sum")
        hidden = self._hidden(model, batch)[:, :-1].flatten(0, 1)
        targets = targets.to(hidden.device)
        total = chunked_cross_entropy(hidden, self._head.weight, targets, self._head_bias, self._softcap)
        return total.to(batch["labels"].device)

    def scored(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Count the scored tokens of a batch."""
        return (batch["labels"][:, 1:] >= 0).sum()

    def per_token(self, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the loss of every token but the first, `(batch, tokens - 1)` in nats, 0 where not scored."""
        targets = batch["labels"][:, 1:].reshape(-1)
        with torch.no_grad():
            if self.chunked:
                hidden = self._hidden(model, batch)[:, :-1].flatten(0, 1)
                targets = targets.to(hidden.device)
                losses = token_losses(hidden, self._head.weight, targets, self._head_bias, self._softcap)
            else:
                logits = model(**_inputs(batch), use_cache=False).logits[:, :-1].flatten(0, 1)
                losses = F.cross_entropy(logits.float(), targets, reduction="none")
        return losses.to(batch["labels"].device).view(len(batch["labels"]), -1)

    def at(
        self, model: nn.Module, input_ids: torch.Tensor, rows: torch.Tensor, places: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        """Return the loss of `targets[i]` after `input_ids[rows[i], : places[i] + 1]`, `(targets,)` in nats.

        Several targets may follow one position; logits are made at those positions alone. No gradients.
        """
        batch = {"input_ids": input_ids}
        with torch.no_grad():
            if self.chunked:
                hidden = self._hidden(model, batch)
                device = hidden.device
                hidden, targets = hidden[rows.to(device), places.to(device)], targets.to(device)
                losses = token_losses(hidden, self._head.weight, targets, self._head_bias, self._softcap)
                return losses.to(input_ids.device)
            logits = model(**_inputs(batch), use_cache=False).logits[rows, places]
            return F.cross_entropy(logits.float(), targets, reduction="none")

    @property
    def _head_bias(self) -> torch.Tensor | None:
        return getattr(self._head, "bias", None)

    def _hidden(self, model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the hidden states before the vocabulary projection, `(batch, tokens, d_model)`, on its device."""
        captured: list[torch.Tensor] = []
        backbone: nn.Module = self._base.get_decoder()  # OPT's forward passes its base model by
        handle = backbone.register_forward_hook(lambda _m, _i, output: captured.append(output[0]))
        try:
            # no position at all: for the last one of each row, matmul would copy the whole projection once a row
            nowhere = torch.empty(0, dtype=torch.long, device=batch["input_ids"].device)
            model(**_inputs(batch), use_cache=False, logits_to_keep=nowhere)
        finally:
            handle.remove()
        return captured[0].to(self._head.weight.device)  # of a model spread over devices, tied weights are on the first

    def _reproduces_logits(self, model: Any) -> bool:
        """Compare, on eight tokens, the logits made from the captured hidden states with the model's own."""
        forward = inspect.signature(self._base.forward).parameters
        plain_head = isinstance(self._head, nn.Linear) and "logits_to_keep" in forward
        if not plain_head or self._base.base_model is self._base:
            return False
        device = next(self._base.parameters()).device
        tokens = torch.arange(8, device=device).unsqueeze(0) % self._base.config.get_text_config().vocab_size
        training = model.training
        model.eval()
        with torch.no_grad():
            expected = model(input_ids=tokens, use_cache=False).logits.float()
            hidden = self._hidden(model, {"input_ids": tokens})
            given = _logits(hidden, self._head.weight, self._head_bias, self._softcap).float().to(expected.device)
        model.train(training)
        return torch.allclose(given, expected, rtol=1e-3, atol=1e-3)
