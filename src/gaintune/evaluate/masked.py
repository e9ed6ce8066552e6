"""Masked-LM perplexity of an encoder with the head it was pretrained with, before and after an adaptation.

How the DISeL paper measures what RoBERTa forgets (arXiv 2605.19028, section 4.1 and appendix II.5): the adapted encoder
is paired with its original masked-LM head, whatever head the adaptation trained. The masked tokens are the same for
every model (`gaintune.data.masked`), so models are compared block by block.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from gaintune.adapters.disk import BASE, adapter_labels, check_adapters
from gaintune.config.plan import Plan
from gaintune.data.masked import MaskedBlocks, load_masked_blocks
from gaintune.errors import ConfigError, TrainingError
from gaintune.evaluate.perplexity import autocast
from gaintune.evaluate.walk import Look, look_at_base_and_adapters, with_adapter
from gaintune.models.base import Base
from gaintune.models.heads import load_masked, longest_input
from gaintune.models.loss import IGNORED
from gaintune.progress import Progress, Silent
from gaintune.results.bootstrap import LARGEST_EXPONENT
from gaintune.results.changes import paired_change


@dataclass(frozen=True)
class MaskedLoss:
    """Loss of one model on one domain, block by block: sums over the masked tokens in nats, and their numbers."""

    nll: tuple[float, ...]
    tokens: tuple[int, ...]

    @property
    def perplexity(self) -> float:
        """exp of the mean loss of a masked token."""
        return math.exp(min(math.fsum(self.nll) / sum(self.tokens), LARGEST_EXPONENT))


@dataclass(frozen=True)
class MaskedFigure:
    """One model on one domain; `change` and its interval in % of the base's perplexity, None for the base itself.

    `masked` is the number of masked tokens behind it.
    """

    domain: str
    label: str
    perplexity: float
    change: float | None
    low: float | None
    high: float | None
    masked: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def compare_masked(
    plan: Plan, adapters: Sequence[Path], *, allow_other_base: bool = False, progress: Progress | None = None
) -> list[MaskedFigure]:
    """Measure the plan's encoder, and the encoder with every adapter, on the plan's domains of text.

    An adapter's own head is left out, and the original one put in its place. The masking's seed is the plan's
    `data.seed`.

    Returns:
        For each domain the base, then the adapters in the order given, labelled by their folders.

    Raises:
        AdapterError, BaseMismatchError: an adapter that is damaged or of another base.
        BaseModelError: the base is no encoder with a masked-LM head.
        ConfigError: blocks longer than the encoder takes, `data.beginning_of_text`, or an adapter named twice.
    """
    if plan.data.beginning_of_text != "auto":
        raise ConfigError("data.beginning_of_text is for decoders: an encoder's special tokens are around every block")
    adapter_labels(adapters)  # refuses an adapter that is named twice
    check_adapters(adapters, plan.model, plan.data, allow_other_base=allow_other_base)

    def prepare(base: Base) -> Look[list[MaskedLoss]]:
        longest = longest_input(base.model, base.tokenizer)
        if longest is not None and plan.data.block_size > longest:
            raise ConfigError(
                f"data.block_size is {plan.data.block_size}, but model {base.name!r} takes {longest} tokens at most"
            )
        data = plan.data
        domains = [load_masked_blocks(each, data, base.tokenizer, seed=data.seed) for each in data.domains]

        def look(model: nn.Module, label: str, mixed: torch.dtype | None) -> list[MaskedLoss]:
            return [
                measure_masked(
                    model,
                    domain,
                    batch_size=plan.evaluate.batch_size,
                    mixed_precision=mixed,
                    title=f"{label}: measuring {domain.name}",
                    progress=progress,
                )
                for domain in domains
            ]

        return look

    put_on = partial(with_adapter, plan=plan, allow_other_base=allow_other_base)
    before, adapted = look_at_base_and_adapters(plan, adapters, load_masked, put_on, prepare)
    figures = []
    for number, domain in enumerate(plan.data.domains):
        loss = before[number]
        figures.append(MaskedFigure(domain.name, BASE, loss.perplexity, None, None, None, sum(loss.tokens)))
        for each in adapted:
            found = each.found[number]
            interval = paired_change(each.base[number], found, domain.name, plan.evaluate)
            change = (interval.value, interval.low, interval.high)
            figures.append(MaskedFigure(domain.name, each.label, found.perplexity, *change, sum(loss.tokens)))
    return figures


def measure_masked(
    model: nn.Module,
    blocks: MaskedBlocks,
    *,
    batch_size: int = 4,
    mixed_precision: torch.dtype | None = None,
    title: str = "measuring",
    progress: Progress | None = None,
) -> MaskedLoss:
    """Measure the loss of the masked tokens of every block; logits are made for those alone.

    `mixed_precision` is the autocast dtype of a model kept in fp32, or None for the model's own numbers.

    Raises:
        TrainingError: the loss of some block is not finite; the model is broken.
    """
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    sums: list[float] = []
    try:
        with (
            torch.inference_mode(),
            autocast(device, mixed_precision),
            (progress or Silent()).task(title, blocks.input_ids.numel(), "tokens") as advance,
        ):
            for start in range(0, len(blocks.input_ids), batch_size):
                seen = blocks.input_ids[start : start + batch_size].to(device)
                labels = blocks.labels[start : start + batch_size].to(device)
                sums.extend(_block_losses(model, seen, labels).tolist())
                advance(seen.numel())
    finally:
        model.train(training)
    if not all(map(math.isfinite, sums)):
        raise TrainingError(f"{title}: the loss is not finite, so the model is broken")
    return MaskedLoss(tuple(sums), blocks.scored)


def _block_losses(model: Any, seen: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Summed loss of each block's masked tokens, float64 `(blocks,)`."""
    scored = labels != IGNORED
    with _only(model, scored):
        logits = model(input_ids=seen, attention_mask=torch.ones_like(seen)).logits[0]
    losses = F.cross_entropy(logits.float(), labels[scored], reduction="none").double()
    return torch.zeros(len(labels), dtype=torch.float64, device=labels.device).index_add(
        0, scored.nonzero()[:, 0], losses
    )


@contextlib.contextmanager
def _only(model: Any, scored: torch.Tensor) -> Iterator[None]:
    """Hand the head the hidden states of the scored tokens alone, as one row `(1, scored, d_model)`."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model

    def pick(module: nn.Module, inputs: Any, output: Any) -> Any:
        hidden = output[0][scored].unsqueeze(0)
        if isinstance(output, tuple):
            return (hidden, *output[1:])
        output.last_hidden_state = hidden
        return output

    handle = base.base_model.register_forward_hook(pick)
    try:
        yield
    finally:
        handle.remove()
