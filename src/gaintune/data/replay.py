"""Replay: rows of earlier domains mixed into a new domain's, in an exact ratio that a seed makes repeatable."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import ROUND_HALF_UP, Decimal

import torch
from torch.nn import functional as F

from gaintune.data.examples import IGNORED, Examples
from gaintune.data.split import drawn_order


def replayed_rows(new: int, ratio: float) -> int:
    """How many rows are replayed beside so many new ones: `ratio * new`, halves rounded up."""
    return int((Decimal(str(ratio)) * new).to_integral_value(ROUND_HALF_UP))


def with_replay(new: Examples, earlier: Sequence[Examples], ratio: float, seed: int) -> Examples:
    """All rows of a new domain, and after them rows of the earlier ones; training shuffles them together.

    The earlier domains share the replayed rows evenly, the earliest having one more where it does not come out even. A
    domain's rows are drawn without repetition; one with fewer rows than its share is gone through again. Every epoch
    sees the same rows.

    Args:
        new: the new domain's training rows.
        earlier: the earlier domains' training rows, in the order they were learnt.
        ratio: replayed rows for each new row.
        seed: seed of the draw.

    Returns:
        `new` itself where nothing is replayed. Rows shorter than the longest are filled up with tokens that are not
        scored.
    """
    count = replayed_rows(len(new), ratio)
    if not earlier or count == 0:
        return new
    share, more = divmod(count, len(earlier))
    parts = [new]
    for number, domain in enumerate(earlier):
        wanted = share + (number < more)
        order = drawn_order(len(domain), seed, f"replay {number} in {len(earlier)}")
        parts.append(_rows(domain, [order[index % len(order)] for index in range(wanted)]))
    return _joined(parts)


def _rows(examples: Examples, numbers: Sequence[int]) -> Examples:
    return Examples(**examples[torch.tensor(numbers, dtype=torch.long)])


def _joined(parts: Sequence[Examples]) -> Examples:
    """All rows under each other, of the longest length; positions where any part has them."""
    length = max(part.input_ids.shape[1] for part in parts)
    positions = None
    if any(part.position_ids is not None for part in parts):
        positions = torch.cat([_positions(part, length) for part in parts])
    return Examples(
        torch.cat([F.pad(part.input_ids, (0, length - part.input_ids.shape[1])) for part in parts]),
        torch.cat([F.pad(part.labels, (0, length - part.labels.shape[1]), value=IGNORED) for part in parts]),
        positions,
    )


def _positions(part: Examples, length: int) -> torch.Tensor:
    """Positions of a part's rows: running where a row is one stream of text; its filling is a text by itself."""
    rows, own = part.input_ids.shape
    positions = torch.arange(own).repeat(rows, 1) if part.position_ids is None else part.position_ids
    filling = torch.arange(length - own, dtype=positions.dtype).repeat(rows, 1)
    return torch.cat([positions, filling], dim=1)
