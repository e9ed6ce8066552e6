"""Masked-LM perplexity of an encoder with the head it was pretrained with, before and after an adaptation.

How the DISeL paper measures what RoBERTa forgets (arXiv 2605.19028, section 4.1 and appendix II.5): the adapted encoder
is paired with its original masked-LM head, whatever head the adaptation trained. The masked tokens are the same for
every model (`gaintune.data.load_masked_blocks`), so models are compared block by block.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from gaintune.adapters import BASE, check_adapters
from gaintune.config import Plan
from gaintune.data import IGNORED, MaskedBlocks, load_masked_blocks
from gaintune.errors import ConfigError, TrainingError
from gaintune.evaluate.base_and_adapters import Measure, measure_base_and_adapters
from gaintune.evaluate.batches import run_batches
from gaintune.evaluate.compare import Figure
from gaintune.models import Base, load_masked, longest_input
from gaintune.progress import Progress
from gaintune.results import DomainLoss, paired_change


def compare_masked(
    plan: Plan, adapters: Sequence[Path], *, allow_other_base: bool = False, progress: Progress | None = None
) -> list[Figure]:
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
    check_adapters(adapters, plan.model, plan.data, allow_other_base=allow_other_base)

    def prepare(base: Base) -> Measure[list[DomainLoss]]:
        longest = longest_input(base.model, base.tokenizer)
        if longest is not None and plan.data.block_size > longest:
            raise ConfigError(
                f"data.block_size is {plan.data.block_size}, but model {base.name!r} takes {longest} tokens at most"
            )
        data = plan.data
        domains = [load_masked_blocks(each, data, base.tokenizer, seed=data.seed) for each in data.domains]

        def measure(model: nn.Module, label: str, mixed: torch.dtype | None) -> list[DomainLoss]:
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

        return measure

    before, adapted = measure_base_and_adapters(plan, adapters, load_masked, prepare, allow_other_base=allow_other_base)
    figures = []
    for number, domain in enumerate(plan.data.domains):
        loss = before[number]
        masked = sum(loss.tokens)
        figures.append(Figure(domain.name, BASE, loss.perplexity, masked=masked))
        for each in adapted:
            loss = each.adapted[number]
            interval = paired_change(each.base[number], loss, domain.name, plan.evaluate)
            change = (interval.value, interval.low, interval.high)
            figures.append(Figure(domain.name, each.label, loss.perplexity, *change, masked=masked))
    return figures


def measure_masked(
    model: nn.Module,
    blocks: MaskedBlocks,
    *,
    batch_size: int = 4,
    mixed_precision: torch.dtype | None = None,
    title: str = "measuring",
    progress: Progress | None = None,
) -> DomainLoss:
    """Measure the loss of the masked tokens of every block; logits are made for those alone.

    `mixed_precision` is the autocast dtype of a model kept in fp32, or None for the model's own numbers.

    Raises:
        TrainingError: the loss of some block is not finite; the model is broken.
    """
    device = next(model.parameters()).device
    sums: list[float] = []

    def step(start: int) -> int:
        seen, labels = (each[start : start + batch_size].to(device) for each in (blocks.input_ids, blocks.labels))
        sums.extend(_block_losses(model, seen, labels).tolist())
        return seen.numel()

    run_batches(
        model,
        range(0, len(blocks.input_ids), batch_size),
        step,
        total=blocks.input_ids.numel(),
        mixed_precision=mixed_precision,
        title=title,
        progress=progress,
    )
    if not all(map(math.isfinite, sums)):
        raise TrainingError(f"{title}: the loss is not finite, so the model is broken")
    return DomainLoss(tuple(sums), blocks.scored)


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
