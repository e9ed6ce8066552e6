"""What may act on an update beside the gradient of the loss: the border between training and methods or penalties."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from gaintune.models.loss import Objective
from gaintune.progress import Progress, Silent


class UpdateRule(Protocol):
    """A rule that is called around every update of one adaptation.

    Steps are counted from 0. What a rule must remember between updates it writes with the checkpoints and reads back,
    so that a stopped run ends with the same bytes.
    """

    def start(self, model: nn.Module, steps: int) -> None:
        """Before the first update, and before `load`; `steps` is the number of updates of this adaptation.

        The weights are those the adaptation starts from, also when it continues from a checkpoint.
        """
        ...

    def before_update(self, model: nn.Module, step: int) -> None:
        """Gradients are complete (accumulated, reduced, unscaled) and not clipped yet: add to them here."""
        ...

    def after_update(self, model: nn.Module, step: int) -> None:
        """The weights have moved; the gradients are still there."""
        ...

    def save(self, folder: Path) -> None:
        """Write the rule's state into a checkpoint's folder, as safetensors or JSON."""
        ...

    def load(self, folder: Path) -> None:
        """Take the state back from a checkpoint's folder."""
        ...


class Rows(Protocol):
    """What is trained on: `gaintune.data.examples.Examples`, or rows of another objective."""

    @property
    def tokens(self) -> int:
        """All tokens of one pass."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> dict[str, torch.Tensor]: ...


@dataclass(frozen=True)
class Place:
    """Where an adaptation stands in a sequence of them.

    Attributes:
        previous: folder of the adapter it carries on, None for the first one.
        first: updates of the adaptations before it.
        total: updates of all adaptations; None for this one's alone.
    """

    previous: Path | None = None
    first: int = 0
    total: int | None = None


@dataclass(frozen=True)
class Lesson:
    """What an adaptation was trained on and how its loss is computed, for rules that look at it afterwards."""

    rows: Rows
    objective: Objective
    title: str
    collate: Callable[[list[dict[str, torch.Tensor]]], Mapping[str, Any]] | None = None
    mixed_precision: torch.dtype | None = None
    progress: Progress = field(default_factory=Silent)


class StageRule:
    """An update rule that does nothing; rules of methods and penalties say what they do instead.

    Beside `UpdateRule`, a rule may learn from the rows of a stage once it is over, and keep something with the adapter
    for the next one.
    """

    def start(self, model: nn.Module, steps: int) -> None:
        """See `UpdateRule`."""

    def before_update(self, model: nn.Module, step: int) -> None:
        """See `UpdateRule`."""

    def after_update(self, model: nn.Module, step: int) -> None:
        """See `UpdateRule`."""

    def save(self, folder: Path) -> None:
        """See `UpdateRule`."""

    def load(self, folder: Path) -> None:
        """See `UpdateRule`."""

    def finish(self, model: nn.Module, lesson: Lesson) -> None:
        """After the last update of the adaptation, in every process."""

    def keep(self, folder: Path) -> None:
        """Write beside the adapter, before its manifest, what the next adaptation needs; in the process that writes."""
