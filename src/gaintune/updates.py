"""What may act on an update beside the gradient of the loss: the border between training and methods or penalties."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from torch import nn


class UpdateRule(Protocol):
    """A rule that is called around every update of one adaptation.

    Steps are counted from 0. What a rule must remember between updates it writes with the checkpoints and reads back,
    so that a stopped run ends with the same bytes.
    """

    def start(self, model: nn.Module, steps: int) -> None:
        """Before the first update, and before `load`; `steps` is the number of updates of this adaptation."""
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
