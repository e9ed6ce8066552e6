"""Why transfer is positive: take from separately learnt gains what they share, or leave it alone, and measure again.

The GAIN paper (arXiv 2604.04516, section 5.1): "After training on each domain, we decompose the scaling update into its
shared and domain-specific components. Removing the shared component halves positive transfer. Keeping only the shared
component retains" a part of it. Transfer here is the mean change of perplexity of domains by adapters that did not
learn them; what is shared is one of `Component`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from torch import nn

from gaintune.adapters import attached, check_adapters, read_record
from gaintune.analysis.positions import PREFIX
from gaintune.analysis.provenance import Provenance, origin_of, provenance, warn_of_other_texts
from gaintune.analysis.transfer import Component, TransferOptions
from gaintune.analysis.transfer.statistics import (
    FloatArray,
    GainVectors,
    Sharing,
    mean_without,
    principal_direction,
    read_gain_vectors,
    sharing_of,
)
from gaintune.config import EvaluateConfig, Plan
from gaintune.data import DomainBlocks, load_domain
from gaintune.errors import ConfigError
from gaintune.evaluate import measure_domain
from gaintune.models import load_base
from gaintune.progress import Progress, Silent
from gaintune.results import Change, DomainLoss, Interval, changes_of, mean_change, share_of_change

Part = Literal["whole", "shared", "own"]
"""What of an adapter's v is left: all of it, the shared component alone, or all but the shared component."""
PARTS: tuple[Part, ...] = get_args(Part)
Key = tuple[Part, str, str]


def shared_component(vectors: GainVectors, component: Component, learnt: str, measured: str) -> FloatArray:
    """What the adapter that learnt one domain shares with the others, `(features,)`, for measuring another domain.

    Only `held-out` depends on the measured domain; only `principal` on the learnt one.
    """
    v = vectors.values
    if component == "mean":
        return v.mean(axis=0)
    if component == "principal":
        direction = principal_direction(v)
        return float(v[vectors.labels.index(learnt)] @ direction) * direction
    own = [vectors.labels.index(measured)] if measured in vectors.labels else []
    return mean_without(v, own)


@dataclass(frozen=True)
class Ablation:
    """Losses of every adapter on every domain, whole and in its two parts.

    Attributes:
        component: what is taken for shared.
        learnt: the domains of the adapters.
        watched: domains that were measured and that no adapter learnt.
        base: losses of the pretrained model by domain.
        losses: losses by part, learnt domain and measured domain.
        settings: what intervals are made with.
    """

    component: Component
    learnt: tuple[str, ...]
    watched: tuple[str, ...]
    base: Mapping[str, DomainLoss]
    losses: Mapping[Key, DomainLoss]
    settings: EvaluateConfig

    @cached_property
    def _changes(self) -> dict[Key, Change]:
        """The change of every loss, with its resamples."""
        changes: dict[Key, Change] = {}
        for domain, base in self.base.items():
            keys = [key for key in self.losses if key[2] == domain]
            found = changes_of(base, [self.losses[key] for key in keys], domain, self.settings)
            changes |= dict(zip(keys, found, strict=True))
        return changes

    def _of(self, part: Part, pairs: Sequence[tuple[str, str]]) -> list[Change]:
        return [self._changes[part, learnt, measured] for learnt, measured in pairs]

    def _mean(self, part: Part, pairs: Sequence[tuple[str, str]]) -> Interval:
        return mean_change(self._of(part, pairs), self.settings)

    @property
    def _across(self) -> list[tuple[str, str]]:
        return [(one, other) for one in self.learnt for other in self.learnt if one != other]

    def change(self, part: Part, learnt: str, measured: str) -> Interval:
        """Change of perplexity of one domain by (a part of) the adapter that learnt another, in %."""
        return self._mean(part, [(learnt, measured)])

    def transfer(self, part: Part) -> Interval:
        """Mean change over all pairs of different learnt domains, in %; negative is positive transfer."""
        return self._mean(part, self._across)

    def in_domain(self, part: Part) -> Interval:
        """Mean change of the domains by their own adapters, in %."""
        return self._mean(part, [(name, name) for name in self.learnt])

    def unseen(self, part: Part) -> Interval | None:
        """Mean change of the domains that no adapter learnt, in %; None where there is none."""
        pairs = [(one, other) for one in self.learnt for other in self.watched]
        return self._mean(part, pairs) if pairs else None

    def left(self, part: Part) -> Interval | None:
        """What a part keeps of the transfer of the whole, in %; None where the whole's own interval holds zero."""
        if not self.transfer("whole").sign:
            return None
        return share_of_change(self._of(part, self._across), self._of("whole", self._across), self.settings)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""

        def plain(interval: Interval | None) -> dict[str, Any] | None:
            return None if interval is None else asdict(interval)

        return {
            "component": self.component,
            "parts": {
                part: {
                    "transfer": plain(self.transfer(part)),
                    "left_of_transfer": plain(self.left(part)),
                    "in_domain": plain(self.in_domain(part)),
                    "unseen": plain(self.unseen(part)),
                }
                for part in PARTS
            },
            "cells": [
                {
                    "part": part,
                    "learnt": learnt,
                    "measured": measured,
                    "perplexity": loss.perplexity,
                    "change": plain(self.change(part, learnt, measured)),
                }
                for (part, learnt, measured), loss in self.losses.items()
            ],
        }


@dataclass(frozen=True)
class Transfer:
    """What gains share, and what that does for transfer; one ablation for each component asked for."""

    sharing: Sharing
    ablations: tuple[Ablation, ...]
    provenance: Provenance

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "sharing": self.sharing.to_dict(),
            "ablations": [each.to_dict() for each in self.ablations],
        }


def survey_transfer(
    plan: Plan,
    adapters: Sequence[Path],
    options: TransferOptions | None = None,
    *,
    allow_other_base: bool = False,
    progress: Progress | None = None,
) -> Transfer:
    """Compare separately trained GAIN adapters, and measure every domain with each of them whole and in parts.

    Args:
        plan: base, domains and how uncertainty is measured. Its domains are those that the adapters learnt, in any
            order; others, and watched ones, are measured as unseen.
        adapters: adapters of method gain or gain-ffn, each trained from the pretrained model on one domain.
        options: what is taken for shared.
        allow_other_base: take adapters that were trained on another base.
        progress: where to show progress; nowhere unless given.

    Raises:
        AdapterError, BaseMismatchError: damaged, of another method, or of another base.
        ConfigError: fewer than two adapters, one that learnt several domains or one that the plan lacks, or a component
            that so few adapters do not have.
        DataError: a domain's text is missing or broken.
    """
    learnt = _by_domain([Path(folder) for folder in adapters], [domain.name for domain in plan.data.measured])
    components = (options or TransferOptions()).components
    _check_components(components, len(learnt))
    vectors = read_gain_vectors(learnt)
    sharing = sharing_of(vectors)
    check_adapters(list(learnt.values()), plan.model, allow_other_base=allow_other_base)
    base = load_base(plan.model)
    domains = [load_domain(domain, plan.data, base.tokenizer) for domain in plan.data.measured]
    warn_of_other_texts(learnt.values(), domains)
    told = provenance(plan, base, domains, {name: origin_of(folder) for name, folder in learnt.items()})
    watched = tuple(domain.name for domain in domains if domain.name not in learnt)
    rows = dict(zip(learnt, vectors.values, strict=True))
    with attached(base, next(iter(learnt.values())), allow_other_base=allow_other_base) as (model, _):
        measure = _Measure(plan, model, vectors, progress or Silent())
        nothing = np.zeros(vectors.values.shape[1])
        before = {domain.name: measure("base", nothing, domain) for domain in domains}
        whole: dict[Key, DomainLoss] = {
            ("whole", name, domain.name): measure(f"{name}, whole", v, domain)
            for name, v in rows.items()
            for domain in domains
        }
        ablations = []
        for component in components:
            losses = dict(whole)
            for name, v in rows.items():
                for domain in domains:
                    shared = shared_component(vectors, component, name, domain.name)
                    losses["shared", name, domain.name] = measure(f"{name}, shared ({component})", shared, domain)
                    losses["own", name, domain.name] = measure(f"{name}, own ({component})", v - shared, domain)
            ablations.append(Ablation(component, tuple(learnt), watched, before, losses, plan.evaluate))
    return Transfer(sharing, tuple(ablations), told)


class _Measure:
    """Measures domains under gains of any values; the same on one domain, such as what all adapters share, once."""

    def __init__(self, plan: Plan, model: nn.Module, vectors: GainVectors, progress: Progress) -> None:
        layers = {name.removeprefix(PREFIX): each for name, each in model.named_modules() if name.startswith(PREFIX)}
        self._gains: list[torch.Tensor] = [cast(Any, layers[name]).gain_v["default"] for name, _ in vectors.modules]
        self._plan, self._model, self._progress = plan, model, progress
        self._known: dict[tuple[str, bytes], DomainLoss] = {}

    def __call__(self, title: str, v: FloatArray, domain: DomainBlocks) -> DomainLoss:
        """Measure a domain with every gain at `1 + v`, `(features,)`; zeros are the pretrained model, bit for bit."""
        key = (domain.name, hashlib.sha256(v.astype(np.float32).tobytes()).digest())
        if key not in self._known:
            ends = np.cumsum([len(gain) for gain in self._gains])[:-1]
            with torch.no_grad():
                for gain, part in zip(self._gains, np.split(v, ends), strict=True):
                    gain.copy_(torch.from_numpy(part))
            self._known[key] = measure_domain(
                self._model,
                domain,
                batch_size=self._plan.evaluate.batch_size,
                title=f"{title}: measuring {domain.name}",
                base=None if v.any() else self._plan.model.name,
                progress=self._progress,
            )
        return self._known[key]


def _by_domain(adapters: Sequence[Path], measured: Sequence[str]) -> dict[str, Path]:
    """Adapters by the one domain each has learnt; ConfigError where that is not one, or not one of the plan's."""
    found: dict[str, Path] = {}
    for folder in adapters:
        record = read_record(folder)
        learnt = () if record is None else tuple(dict.fromkeys(record.domains))
        if len(learnt) != 1:
            said = f"has learnt {', '.join(learnt)}" if learnt else "does not say what it has learnt"
            raise ConfigError(f"{folder} {said}: give adapters that were each trained from the base on one domain")
        (name,) = learnt
        if name in found:
            raise ConfigError(f"{folder} has learnt {name}, and so has {found[name]}: give one adapter a domain")
        if name not in measured:
            raise ConfigError(f"{folder} has learnt {name}, which is not measured; add it with --domain")
        found[name] = folder
    return found


def _check_components(components: Sequence[Component], count: int) -> None:
    if not components or len(set(components)) != len(components):
        raise ConfigError(f"components {', '.join(components)}: name some, each once")
    if "held-out" in components and count < 3:
        raise ConfigError(
            f"held-out: the mean of all adapters but the measured domain's takes three or more, and {count} were given"
        )
