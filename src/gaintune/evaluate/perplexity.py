"""Perplexity over rows of tokens, through the same loss that training uses."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from gaintune.data import DomainBlocks, Examples
from gaintune.errors import BaseModelError, DivergedError
from gaintune.evaluate.batches import run_batches
from gaintune.models import NextTokenLoss, require_rows
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
        model: a causal language model, with or without an adapter; left in the mode it was in.
        examples: the rows.
        bytes_per_row: UTF-8 bytes of the scored tokens of each row.
        batch_size: rows in a forward pass.
        mixed_precision: autocast dtype of a model kept in fp32, or None for the model's own numbers.
        title: what a progress bar says.
        progress: where to show it.

    Returns:
        Summed loss in nats, scored tokens and bytes, for every row.

    Raises:
        DivergedError: the loss of some row is not finite; the model is broken.
        ConfigError: rows are longer than the model takes, or hold several texts that it does not keep apart.
    """
    sums: list[float] = []
    _each_batch(
        model,
        examples,
        lambda losses: sums.extend(losses.double().sum(dim=1).tolist()),
        batch_size=batch_size,
        mixed_precision=mixed_precision,
        title=title,
        progress=progress,
    )
    if not all(torch.isfinite(torch.tensor(sums))):
        raise _broken(title)
    return DomainLoss(nll=tuple(sums), tokens=examples.scored, bytes=tuple(bytes_per_row))


def measure_domain(
    model: nn.Module,
    domain: DomainBlocks,
    *,
    batch_size: int,
    mixed_precision: torch.dtype | None = None,
    title: str,
    base: str | None = None,
    progress: Progress | None = None,
) -> DomainLoss:
    """Measure a model's loss on a domain's validation rows, as `measure` does.

    Args:
        model, batch_size, mixed_precision, title, progress: as in `measure`.
        domain: the domain.
        base: name of the base, where the model is nothing else; None where something was learnt.

    Raises:
        BaseModelError: the loss of some row is not finite, and `base` says that no training can have done it.
        DivergedError, ConfigError: as in `measure`.
    """
    try:
        return measure(
            model,
            domain.validation,
            domain.validation_bytes,
            batch_size=batch_size,
            mixed_precision=mixed_precision,
            title=title,
            progress=progress,
        )
    except DivergedError:
        if base is None:
            raise
        numbers = str(mixed_precision or next(model.parameters()).dtype).removeprefix("torch.")
        raise BaseModelError(
            f"{base}: the base's own loss on {domain.name} is not finite in {numbers}: its weights are broken, or "
            "these numbers too small for it (model.dtype, model.quantization)"
        ) from None


def measure_tokens(
    model: nn.Module,
    examples: Examples,
    *,
    batch_size: int = 4,
    mixed_precision: torch.dtype | None = None,
    title: str = "measuring",
    progress: Progress | None = None,
) -> torch.Tensor:
    """The loss of every token but the first of each row, `(rows, length - 1)` in nats, fp32 on the CPU.

    Tokens that are not scored have 0. Arguments and errors are those of `measure`.
    """
    kept: list[torch.Tensor] = []
    _each_batch(
        model,
        examples,
        lambda losses: kept.append(losses.float().cpu()),
        batch_size=batch_size,
        mixed_precision=mixed_precision,
        title=title,
        progress=progress,
    )
    losses = torch.cat(kept)
    if not bool(losses.isfinite().all()):
        raise _broken(title)
    return losses


def _each_batch(
    model: nn.Module,
    examples: Examples,
    take: Callable[[torch.Tensor], None],
    *,
    batch_size: int,
    mixed_precision: torch.dtype | None,
    title: str,
    progress: Progress | None,
) -> None:
    """Hand over the losses of one batch after the other, `(rows, length - 1)`, in inference mode."""
    device = next(model.parameters()).device
    require_rows(model, examples.input_ids.shape[1], packed=examples.position_ids is not None)
    loss = NextTokenLoss(model)

    def step(batch: dict[str, torch.Tensor]) -> int:
        take(loss.per_token(model, {name: tensor.to(device) for name, tensor in batch.items()}))
        return batch["input_ids"].numel()

    run_batches(
        model,
        examples.batches(batch_size),
        step,
        total=examples.tokens,
        mixed_precision=mixed_precision,
        title=title,
        progress=progress,
    )


def _broken(title: str) -> DivergedError:
    return DivergedError(
        f"{title}: the loss is not finite, so the model is broken. If it was just trained, lower the learning rate and "
        "run it anew; if it is a base, its weights are broken, or its numbers too small for it (model.dtype)"
    )


@dataclass(frozen=True)
class BaseLosses:
    """A folder of losses by what decides them: base, numbers, device, batch size and the tokens that are scored."""

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
        """A domain's losses from the folder, else from `measure`; whoever asks meanwhile waits for the first.

        Args:
            domain: the domain; its name does not matter.
            measure: measures its validation rows.
            fingerprint: of the base.
            numbers: what the base computes with, as `Precision.name`.
            device: kind of device, such as `cuda`: another one rounds otherwise.
            batch_size: rows in a forward pass, for the same reason.
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
