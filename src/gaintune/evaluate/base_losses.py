"""Losses of an untouched base on disk, shared by runs over the same base and texts: each is measured once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gaintune.data.examples import DomainBlocks, Examples
from gaintune.results.losses import DomainLoss
from gaintune.storage.locks import locked
from gaintune.storage.run import canonical_json, make_folder, read_json, write_json


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
            numbers: what the base computes with, as `Numbers.name`.
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
        return DomainLoss.from_dict(read_json(file))


def _rows_hash(rows: Examples) -> str:
    digest = hashlib.sha256()
    for tensor in (rows.input_ids, rows.labels, rows.position_ids):
        digest.update(b"none" if tensor is None else f"{tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    return digest.hexdigest()
