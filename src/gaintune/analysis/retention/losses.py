"""Losses of snapshots, each in the numbers it was trained in, kept on disk so that a stopped survey continues."""

from __future__ import annotations

import contextlib
import gc
import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from gaintune.adapters.disk import adapter_weights
from gaintune.analysis.provenance import origin_of
from gaintune.config.plan import Plan
from gaintune.data.load import DomainBlocks
from gaintune.errors import ConfigError
from gaintune.evaluate.benchmarks.run import attached
from gaintune.evaluate.perplexity import measure_domain
from gaintune.methods.attach import Numbers, measuring_numbers
from gaintune.models.base import Base, load_base
from gaintune.progress import Progress
from gaintune.results.losses import DomainLoss
from gaintune.storage.files import canonical_json, sha256_file, write_json
from gaintune.storage.run import read_stored
from gaintune.training.snapshots import snapshots_of


def taken_snapshots(adapters: Sequence[Path], every: int) -> dict[str, dict[int, Path]]:
    """The snapshots to measure, by label and step: labels of the methods, or folders where those are not enough."""
    names = [str(folder) for folder in adapters]
    if not names or len(set(names)) != len(names):
        raise ConfigError(f"name adapters with snapshots, each once (given: {', '.join(names) or 'none'})")
    copies = [snapshots_of(folder) for folder in adapters]
    labels = [origin_of(next(iter(each.values()))).label for each in copies]
    seen = Counter(labels)
    chosen = {}
    for name, label, each in zip(names, labels, copies, strict=True):
        steps = [*list(each)[every - 1 :: every], list(each)[-1]]
        chosen[label if seen[label] == 1 else name] = {step: each[step] for step in dict.fromkeys(steps)}
    return chosen


class SnapshotLosses:
    """Measures a base and adapters on it, one after another; what is in the cache is not measured again.

    What a method made is measured in the numbers it was trained in: weights trained whole are fp32, and lose small
    steps in the base's bf16.
    """

    def __init__(
        self,
        plan: Plan,
        base: Base,
        domains: Sequence[DomainBlocks],
        cache: Path | None,
        allow_other_base: bool,
        progress: Progress,
    ) -> None:
        self._plan = plan
        self._bases = {measuring_numbers(plan.model): base}
        self._domains = domains
        self._cache = cache
        self._allow_other_base = allow_other_base
        self._progress = progress
        self._facts = [base.fingerprint, base.model.device.type, plan.evaluate.batch_size]

    def at(self, adapter: Path | None, numbers: Numbers, title: str) -> dict[str, DomainLoss]:
        """Losses by domain of the base with an adapter, or without one, in some numbers."""
        files = {domain.name: self._file(adapter, numbers, domain) for domain in self._domains}
        if all(file is not None and file.exists() for file in files.values()):
            return {name: read_stored(file, DomainLoss.from_dict) for name, file in files.items() if file is not None}
        with contextlib.ExitStack() as stack:
            base = self._in(numbers)
            model: nn.Module = base.model
            if adapter is not None:
                lent = attached(base, adapter, allow_other_base=self._allow_other_base)
                model, _ = stack.enter_context(lent)
            losses = {
                domain.name: measure_domain(
                    model,
                    domain,
                    batch_size=self._plan.evaluate.batch_size,
                    mixed_precision=numbers.mixed,
                    title=f"{title}: measuring {domain.name}",
                    base=self._plan.model.name if adapter is None else None,
                    progress=self._progress,
                )
                for domain in self._domains
            }
        gc.collect()
        for name, file in files.items():
            if file is not None:
                write_json(file, losses[name].to_dict())
        return losses

    def _in(self, numbers: Numbers) -> Base:
        """The base in some numbers; those that it is needed in stay."""
        if numbers not in self._bases:
            self._bases[numbers] = load_base(self._plan.model, dtype=numbers.load)
        return self._bases[numbers]

    def _file(self, adapter: Path | None, numbers: Numbers, domain: DomainBlocks) -> Path | None:
        if self._cache is None:
            return None
        which = None if adapter is None else sha256_file(adapter_weights(adapter))
        key = canonical_json([*self._facts, numbers.name, which, domain.content_hash])
        return self._cache / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
