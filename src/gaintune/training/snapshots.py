"""Copies of an adapter kept while it is trained, each an adapter folder of its own, to look at it over time."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback

from gaintune.adapters import AdapterRecord, save_adapter
from gaintune.errors import AdapterError, ConfigError
from gaintune.storage import check_replaceable, discard_whole, first_process

STEP = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class Snapshots:
    """Which copies are kept of an adaptation: every so many updates and after the last one.

    Attributes:
        folder: where they go, as `step-000050` and so on.
        every: updates between two copies.
        record: the finished adapter's record; a copy's says in `settings["snapshot"]` after how many updates it is.
    """

    folder: Path
    every: int
    record: AdapterRecord

    def keep(self, model: nn.Module, step: int, steps: int) -> None:
        """Write the adapter as it is after `step` of `steps` updates."""
        settings = {**self.record.settings, "snapshot": {"step": step, "steps": steps}}
        save_adapter(model, self.folder / f"step-{step:06d}", replace(self.record, settings=settings))

    def forget_after(self, step: int) -> None:
        """Delete copies of later updates, which are about to be done anew."""
        for entry in self.folder.glob("step-*"):
            if _step(entry) > step:
                discard_whole(entry)


class KeepSnapshots(TrainerCallback):
    """Keeps the copies, in the process that writes."""

    def __init__(self, model: nn.Module, snapshots: Snapshots) -> None:
        self._model = model
        self._snapshots = snapshots

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if first_process():
            self._snapshots.forget_after(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step, steps = state.global_step, state.max_steps
        if first_process() and (step % self._snapshots.every == 0 or step == steps):
            self._snapshots.keep(self._model, step, steps)


@dataclass(frozen=True)
class Shelf:
    """Where the copies of one adapter lie: beside it once it is finished, among its unfinished work before."""

    finished: Path
    unfinished: Path

    @classmethod
    def of(cls, out: Path, unfinished: Path) -> Shelf:
        """The shelf of an adapter that is to be written to `out`."""
        return cls(out.with_name(f"{out.name}.snapshots"), unfinished / "snapshots")

    def check(self) -> None:
        """Refuse to put copies of one adapter beside those of another, or beside anything else.

        Raises:
            ConfigError, AdapterError, RunDirectoryError: something is there, and no run of this adapter wrote it.
        """
        if self.finished.exists() and (self.unfinished.exists() or not self.unfinished.parent.exists()):
            raise ConfigError(
                f"{self.finished} exists already, from an adapter that is gone; delete it, or name another folder"
            )
        for entry in self.finished.glob("*"):  # what a run that stopped put there, and will take back
            _step(entry)
            check_replaceable(entry)

    def reopen(self) -> None:
        """Go on with what was closed by a run that stopped before its adapter was written."""
        if self.finished.exists():
            self.finished.replace(self.unfinished)

    def close(self) -> None:
        """Put the copies, if there are any, beside the adapter that is written next."""
        if self.unfinished.exists():
            self.unfinished.replace(self.finished)


def snapshots_of(adapter: str | Path) -> dict[int, Path]:
    """The copies kept of an adapter, by the number of updates after which each was made.

    Args:
        adapter: an adapter's folder (of `gaintune adapt`, or of a stage of a run), or the folder of the copies itself.

    Raises:
        AdapterError: no such folder, or no copies were kept.
    """
    adapter = Path(adapter)
    if not adapter.is_dir():
        raise AdapterError(f"{adapter}: no such adapter folder")
    places = [adapter, adapter.with_name(f"{adapter.name}.snapshots")]
    if adapter.name == "adapter":
        places.append(adapter.with_name("snapshots"))
    for place in places:
        found = {_step(entry): entry for entry in place.glob("step-*") if entry.is_dir()}
        if found:
            return dict(sorted(found.items()))
    raise AdapterError(
        f"{adapter}: no snapshots of it were kept; adapt with --set train.snapshot_steps=N, and it keeps one every N "
        f"updates in {places[-1].name}"
    )


def _step(entry: Path) -> int:
    """The number of updates in a copy's name, such as 50 in step-000050."""
    found = STEP.fullmatch(entry.name)
    if found is None:
        raise AdapterError(f"{entry}: not a snapshot's name, such as step-000050; move it elsewhere")
    return int(found[1])
