"""Losses and perplexity of running text and of masked tokens, through the same loss that training uses."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import nn
from torch.nn import functional as F

from gaintune.data import IGNORED, DomainBlocks, Examples, MaskedBlocks
from gaintune.errors import BaseModelError, DivergedError, TrainingError
from gaintune.evaluate.batches import LoopOptions, run_batches
from gaintune.models import NextTokenLoss, require_rows, without_adapter
from gaintune.progress import Progress
from gaintune.results import DomainLoss
from gaintune.storage import canonical_json, locked, make_folder, read_stored, write_json


def measure(
    model: nn.Module,
    examples: Examples,
    bytes_per_row: Sequence[int],
    *,
    batch_size: int = 4,
    mixed_precision: torch.dtype | None = None,
    title: str = "measuring",
    progress: Progress | None = None,
) -> DomainLoss:
    """Measure a model's loss on rows of tokens; the first token of a row is never scored.

    Args:
        model: a causal language model, with or without an adapter; its mode is restored.
        examples: the rows.
        bytes_per_row: UTF-8 bytes of the scored tokens of each row.
        batch_size: rows in a forward pass.
        mixed_precision: autocast dtype of a model kept in fp32, or None for the model's own precision.
        title, progress: title of the progress bar, and where to show it.

    Returns:
        Summed loss in nats, scored tokens and bytes, for every row.

    Raises:
        DivergedError: the loss of some row is not finite; the model is broken.
        ConfigError: rows are longer than the model takes, or hold several texts that it does not keep apart.
    """
    sums: list[float] = []
    options: LoopOptions = {"mixed_precision": mixed_precision, "title": title, "progress": progress}

    def take(losses: torch.Tensor) -> None:
        sums.extend(losses.double().sum(dim=1).tolist())

    _each_batch(model, examples, batch_size, take, options)
    return DomainLoss(nll=tuple(sums), tokens=examples.scored, bytes=tuple(bytes_per_row))


def measure_domain(
    model: nn.Module, domain: DomainBlocks, *, batch_size: int, base: str | None = None, **options: Unpack[LoopOptions]
) -> DomainLoss:
    """Measure a model's loss on a domain's validation rows, as `measure` does.

    Args:
        base: name of the base, if the model is the untouched base; None if something was trained.

    Raises:
        BaseModelError: the loss of some row is not finite, and `base` says that no training can have caused it.
        DivergedError, ConfigError: as in `measure`.
    """
    try:
        return measure(model, domain.validation, domain.validation_bytes, batch_size=batch_size, **options)
    except DivergedError:
        if base is None:
            raise
        precision = str(options.get("mixed_precision") or next(model.parameters()).dtype).removeprefix("torch.")
        raise BaseModelError(
            f"{base}: the base's own loss on {domain.name} is not finite in {precision}: its weights are broken, or "
            "these numbers too small for it (model.dtype, model.quantization)"
        ) from None


def measure_tokens(
    model: nn.Module, examples: Examples, *, batch_size: int = 4, **options: Unpack[LoopOptions]
) -> torch.Tensor:
    """Measure the loss of every token but the first of each row, `(rows, length - 1)` in nats, fp32 on the CPU.

    Tokens that are not scored have 0. Arguments and errors are those of `measure`.
    """
    parts: list[torch.Tensor] = []
    _each_batch(model, examples, batch_size, lambda losses: parts.append(losses.float().cpu()), options)
    return torch.cat(parts)


def _each_batch(
    model: nn.Module, examples: Examples, batch_size: int, take: Callable[[torch.Tensor], None], options: LoopOptions
) -> None:
    """Hand the losses of each batch, `(rows, length - 1)`, to `take`."""
    device = next(model.parameters()).device
    require_rows(model, examples.input_ids.shape[1], packed=examples.position_ids is not None)
    loss = NextTokenLoss(model)

    def step(batch: dict[str, torch.Tensor]) -> int:
        losses = loss.per_token(model, {name: tensor.to(device) for name, tensor in batch.items()})
        if not bool(losses.isfinite().all()):
            raise DivergedError(
                f"{options.get('title', 'measuring')}: the loss is not finite, so the model is broken. If it was just "
                "trained, lower the learning rate and run it anew; if it is a base, its weights are broken, or its "
                "numbers too small for it (model.dtype)"
            )
        take(losses)
        return batch["input_ids"].numel()

    run_batches(model, examples.batches(batch_size), step, total=examples.tokens, **options)


def measure_masked(
    model: nn.Module, blocks: MaskedBlocks, *, batch_size: int = 4, **options: Unpack[LoopOptions]
) -> DomainLoss:
    """Measure the loss of the masked tokens of every block; logits are made for those alone.

    Raises:
        TrainingError: the loss of some block is not finite; the model is broken.
    """
    device = next(model.parameters()).device
    sums: list[float] = []

    def step(start: int) -> int:
        ids, labels = (rows[start : start + batch_size].to(device) for rows in (blocks.input_ids, blocks.labels))
        sums.extend(_block_losses(model, ids, labels).tolist())
        return ids.numel()

    starts = range(0, len(blocks.input_ids), batch_size)
    run_batches(model, starts, step, total=blocks.input_ids.numel(), **options)
    if not all(map(math.isfinite, sums)):
        raise TrainingError(f"{options.get('title', 'measuring')}: the loss is not finite, so the model is broken")
    return DomainLoss(tuple(sums), blocks.scored)


def _block_losses(model: Any, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum the loss of each block's masked tokens, float64 `(blocks,)`."""
    scored = labels != IGNORED
    with _only(model, scored):
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
    losses = F.cross_entropy(logits.float(), labels[scored], reduction="none").double()
    sums = torch.zeros(len(labels), dtype=torch.float64, device=labels.device)
    return sums.index_add(0, scored.nonzero()[:, 0], losses)


@contextlib.contextmanager
def _only(model: Any, scored: torch.Tensor) -> Iterator[None]:
    """Give the head the hidden states of the scored tokens alone, as one row `(1, scored, d_model)`."""

    def pick(module: nn.Module, inputs: Any, output: Any) -> Any:
        hidden = output[0][scored].unsqueeze(0)
        if isinstance(output, tuple):
            return (hidden, *output[1:])
        output.last_hidden_state = hidden
        return output

    handle = without_adapter(model).base_model.register_forward_hook(pick)
    try:
        yield
    finally:
        handle.remove()


@dataclass(frozen=True)
class BaseLosses:
    """A folder of a base's losses by what decides them: base, precision, device, batch size and scored tokens."""

    folder: Path

    def get(
        self,
        domain: DomainBlocks,
        measure: Callable[[], DomainLoss],
        *,
        fingerprint: str,
        numbers: str,
        device: str,
        batch_size: int,
    ) -> DomainLoss:
        """Read a domain's losses from the folder, else from `measure`; other processes wait for the first.

        The domain's name does not matter. `numbers` are the base's `Precision.name`; the kind of `device`, such as
        `cuda`, and the batch size matter because they change the rounding.
        """
        facts = [fingerprint, numbers, device, batch_size, _rows_hash(domain.validation), domain.validation_bytes]
        key = hashlib.sha256(canonical_json(facts).encode()).hexdigest()[:32]
        file = self.folder / f"{key}.json"
        if not file.exists():
            make_folder(self.folder)
            with locked(self.folder / f".{key}.lock", f"measuring the base on {domain.name}"):
                if not file.exists():
                    write_json(file, measure().to_dict())
        return read_stored(file, DomainLoss.from_dict)


def _rows_hash(rows: Examples) -> str:
    digest = hashlib.sha256()
    for tensor in (rows.input_ids, rows.labels, rows.position_ids):
        digest.update(b"none" if tensor is None else f"{tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    return digest.hexdigest()
