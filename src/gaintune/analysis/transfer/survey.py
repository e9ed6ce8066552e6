"""Split separately trained gains into what they share and the rest, and measure the transfer of each part.

The GAIN paper (arXiv 2604.04516, section 5.1, "Why does positive transfer occur?") trains one adapter a domain, each
from the pretrained model, finds that "cross-domain correlations are near zero" and that a part "of the variance is
shared across all domains. In this shared component, all five domains agree on which dimensions to suppress and which to
amplify". It gives no formula for that part, so `Sharing` has what the sentence may mean, each by name. "After training
on each domain, we decompose the scaling update into its shared and domain-specific components. Removing the shared
component halves positive transfer. Keeping only the shared component retains" a part of it. Transfer here is the mean
change of perplexity of domains by adapters that were not trained on them; what is shared is one of `Component`. A
shared part may keep transfer merely by its size, or by how far it moves which features, whatever the signs: the
controls of `controls_of` measure that.
"""

from __future__ import annotations

import hashlib
import itertools
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from torch import nn

from gaintune.adapters import attached, check_adapters, read_record
from gaintune.analysis.gains.survey import read_factors
from gaintune.analysis.positions import PREFIX
from gaintune.analysis.provenance import Provenance, origin_of, provenance, warn_of_other_texts
from gaintune.analysis.transfer import Component, Control, TransferOptions
from gaintune.config import EvaluateConfig, Plan
from gaintune.data import DomainBlocks, load_domain
from gaintune.errors import AdapterError, ConfigError
from gaintune.evaluate import measure_domain
from gaintune.models import load_base
from gaintune.progress import Progress
from gaintune.results import Change, DomainLoss, FloatArray, Interval, changes_of, mean_change, share_of_change

Split = Literal["whole", "shared", "own"]
"""What of an adapter's v is left: all of it, the shared component alone, or all but the shared component."""
SPLITS: tuple[Split, ...] = get_args(Split)
Part = Split | Control
Key = tuple[Part, str, str]


@dataclass(frozen=True)
class GainVectors:
    """The vectors v that adapters add to a gain of 1, float64 `(adapters, features)`; 0 is the pretrained model.

    `modules` has the name and the number of features of each module, in the order of the vectors.
    """

    labels: tuple[str, ...]
    modules: tuple[tuple[str, int], ...]
    values: FloatArray


def read_gain_vectors(adapters: Mapping[str, Path]) -> GainVectors:
    """Read v of several GAIN or GAIN-FFN adapters, labeled, from their folders alone.

    Raises:
        AdapterError: damaged, or of another method.
        ConfigError: fewer than two adapters, or adapters with gains in different modules.
    """
    if len(adapters) < 2:
        raise ConfigError(f"what adapters share takes two or more of them, and {len(adapters)} was given")
    rows, modules = [], ()
    for folder in adapters.values():
        factors = read_factors(folder)
        if factors.method.line != "gains":
            raise AdapterError(f"{folder}: factors of (IA)3; give adapters of method gain or gain-ffn")
        own = tuple((name, len(factors.values[name])) for name in sorted(factors.values))
        if rows and own != modules:
            odd = sorted({*own} ^ {*modules})[0][0]
            raise ConfigError(f"{folder}: its gains are in other modules than {next(iter(adapters))}'s, such as {odd}")
        modules = own
        rows.append(np.concatenate([factors.values[name] - 1.0 for name, _ in own]))
    return GainVectors(tuple(adapters), modules, np.stack(rows))


@dataclass(frozen=True)
class Sharing:
    """Figures of what N vectors v share. "Energy" is a sum of squares: variance around the pretrained model, v = 0.

    Attributes:
        labels: what the adapters are called.
        correlations: Pearson correlation of each two vectors over features, `(N, N)`.
        cosines: cosine of each two, `(N, N)`.
        mean_share: energy of N copies of the mean vector over that of all vectors, `N |mean|^2 / sum_i |v_i|^2`. Of N
            vectors with nothing in common it is 1 / N (`chance_share`).
        common_share: the same without what is there by chance, `(N * mean_share - 1) / (N - 1)`: the mean product of
            two different vectors over the mean square of one; 0 for vectors with nothing in common, 1 for equal ones.
        principal_share: energy along the first principal direction (not centered) over that of all vectors.
        explained: for each adapter, the share of its energy along the mean vector (of which it is a part).
        explained_by_others: for each adapter, the share of its energy along the mean of the other adapters.
        agreeing: share of the features in which all signs agree; `2 / 2^N` by chance.
        agreeing_energy: share of all energy in those features.
    """

    labels: tuple[str, ...]
    correlations: FloatArray
    cosines: FloatArray
    mean_share: float
    common_share: float
    principal_share: float
    explained: tuple[float, ...]
    explained_by_others: tuple[float, ...]
    agreeing: float
    agreeing_energy: float

    @property
    def chance_share(self) -> float:
        """The `mean_share` of as many vectors with nothing in common."""
        return 1.0 / len(self.labels)

    @property
    def pairs(self) -> list[float]:
        """The correlations of different adapters, each once."""
        return self.correlations[np.triu_indices(len(self.labels), 1)].tolist()

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        arrays = {name: getattr(self, name).tolist() for name in ("correlations", "cosines")}
        return {**asdict(self), **arrays, "chance_share": self.chance_share}


def sharing_of(vectors: GainVectors) -> Sharing:
    """Compute what the vectors have in common; ConfigError where one of them is zero or constant."""
    v = vectors.values
    count = len(v)
    still = next((label for label, row in zip(vectors.labels, v, strict=True) if np.ptp(row) == 0.0), None)
    if still is not None:
        raise ConfigError(f"the gains of {still} are all alike: they hold nothing that could be shared")
    gram = v @ v.T
    energy, mean = float(np.trace(gram)), v.mean(axis=0)
    mean_share = count * float(mean @ mean) / energy
    agree = np.abs(np.sign(v).sum(axis=0)) == count
    return Sharing(
        labels=vectors.labels,
        correlations=np.atleast_2d(np.corrcoef(v)),
        cosines=gram / np.sqrt(np.outer(np.diag(gram), np.diag(gram))),
        mean_share=mean_share,
        common_share=(count * mean_share - 1.0) / (count - 1.0),
        principal_share=float(np.linalg.eigvalsh(gram)[-1]) / energy,
        explained=tuple(_along(row, mean) for row in v),
        explained_by_others=tuple(_along(row, count * mean - row) for row in v),
        agreeing=float(agree.mean()),
        agreeing_energy=float(np.square(v[:, agree]).sum()) / energy,
    )


def _along(vector: FloatArray, direction: FloatArray) -> float:
    """Return the share of a vector's energy along a direction; 0 where there is no direction."""
    length = float(direction @ direction)
    return 0.0 if length == 0.0 else float(vector @ direction) ** 2 / (length * float(vector @ vector))


def shared_component(vectors: GainVectors, component: Component, trained: str, measured: str) -> FloatArray:
    """Return what the adapter of one domain shares with the others, `(features,)`, for measuring another domain.

    With v_k the vector of domain k, of N, i the trained domain and j the measured one:

    - mean: `s = sum_k v_k / N`, the same for all. It holds v_i / N and v_j / N even where nothing is common.
    - held-out: `s_j`, the mean over k != j. It holds nothing of v_j, but v_i still.
    - principal: `s_i = <v_i, p> p`, with p the unit direction along which all have the most energy, not centered.
    - cross-fitted: `s_ij = c d`, with d the mean over k other than i and j, and the coefficient of least squares
      `c = <v_i, d> / <d, d>`. Only the number c comes from v_i. It is 0 for vectors with nothing in common, and
      negative for opposed ones. What is left, `v_i - c d`, is orthogonal to d.

    A domain that no adapter was trained on leaves out none as the measured one.
    """
    v, own = vectors.values, vectors.values[vectors.labels.index(trained)]
    if component == "principal":
        direction = np.linalg.eigh(v @ v.T)[1][:, -1] @ v
        direction /= np.linalg.norm(direction)
        return float(own @ direction) * direction
    left_out = {"mean": (), "held-out": (measured,), "cross-fitted": (trained, measured)}[component]
    mean = v[[label not in left_out for label in vectors.labels]].mean(axis=0)
    if component != "cross-fitted":
        return mean
    energy = float(mean @ mean)
    return float(own @ mean) / energy * mean if energy else mean


def controls_of(
    whole: FloatArray, shared: FloatArray, trained: str, controls: Sequence[Control], seed: int
) -> dict[Control, FloatArray]:
    """Return the vectors that are measured beside a shared part, each `(features,)` and of the shared part's norm.

    `signs` has the shared part's magnitudes with random signs, one draw for each adapter, by its domain and the seed.
    `norm` is the whole adapter times `|shared| / |whole|`.
    """
    made: dict[Control, FloatArray] = {}
    for control in controls:
        if control == "signs":
            generator = np.random.default_rng([seed, zlib.crc32(trained.encode())])
            made[control] = shared * generator.choice((1.0, -1.0), size=len(shared))
        else:
            made[control] = whole * float(np.linalg.norm(shared) / np.linalg.norm(whole))
    return made


@dataclass(frozen=True)
class Ablation:
    """Losses of every adapter on every domain, by part, trained domain and measured domain, and the base's by domain.

    `watched` are domains that no adapter was trained on. `sizes` has the norm of the shared part over that of the whole
    vector, by trained and measured domain.
    """

    component: Component
    trained: tuple[str, ...]
    watched: tuple[str, ...]
    base: Mapping[str, DomainLoss]
    losses: Mapping[Key, DomainLoss]
    settings: EvaluateConfig
    controls: tuple[Control, ...] = ()
    sizes: Mapping[tuple[str, str], float] = field(default_factory=dict)

    @property
    def parts(self) -> tuple[Part, ...]:
        """What was measured of every adapter: the parts, and the controls after them."""
        return (*SPLITS, *self.controls)

    @cached_property
    def _changes(self) -> dict[Key, Change]:
        """The change of every loss, with its resamples."""
        changes: dict[Key, Change] = {}
        for domain, base in self.base.items():
            keys = [key for key in self.losses if key[2] == domain]
            moved = changes_of(base, [self.losses[key] for key in keys], domain, self.settings)
            changes |= dict(zip(keys, moved, strict=True))
        return changes

    @property
    def reports_sizes(self) -> bool:
        """Whether the norms of the shared parts belong to the result: beside controls, and for projections."""
        return bool(self.controls) or self.component == "cross-fitted"

    def _across(self, part: Part) -> list[Change]:
        return [self._changes[part, *pair] for pair in itertools.permutations(self.trained, 2)]

    def change(self, part: Part, trained: str, measured: str) -> Interval:
        """Return the change of perplexity of one domain by (a part of) the adapter of another, in %."""
        return mean_change([self._changes[part, trained, measured]], self.settings)

    def transfer(self, part: Part) -> Interval:
        """Return the mean change over all pairs of different trained domains, in %; negative is positive transfer."""
        return mean_change(self._across(part), self.settings)

    def in_domain(self, part: Part) -> Interval:
        """Return the mean change of the domains by their own adapters, in %."""
        return mean_change([self._changes[part, name, name] for name in self.trained], self.settings)

    def unseen(self, part: Part) -> Interval | None:
        """Return the mean change of the domains that no adapter was trained on, in %; None where there is none."""
        changes = [self._changes[part, *pair] for pair in itertools.product(self.trained, self.watched)]
        return mean_change(changes, self.settings) if changes else None

    def left(self, part: Part) -> Interval | None:
        """Return what a part keeps of the whole's transfer, in %; None where the whole's own interval holds zero."""
        if not self.transfer("whole").sign:
            return None
        return share_of_change(self._across(part), self._across("whole"), self.settings)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        figures = {
            "transfer": self.transfer, "left_of_transfer": self.left, "in_domain": self.in_domain, "unseen": self.unseen
        }  # fmt: skip
        parts = {part: {name: figure(part) for name, figure in figures.items()} for part in self.parts}
        sizes = [[*pair, size] for pair, size in self.sizes.items()]
        return {
            "component": self.component,
            **({"controls": list(self.controls), "shared_norms": sizes} if self.reports_sizes else {}),
            "parts": {part: {name: each and asdict(each) for name, each in own.items()} for part, own in parts.items()},
            "cells": [
                dict(zip(("part", "learnt", "measured"), key, strict=True))
                | {"perplexity": loss.perplexity, "change": asdict(self.change(*key))}
                for key, loss in self.losses.items()
            ],
        }


@dataclass(frozen=True)
class Transfer:
    """The sharing of gains, and its part in transfer; an ablation for each component."""

    sharing: Sharing
    ablations: tuple[Ablation, ...]
    provenance: Provenance

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {"sharing": self.sharing.to_dict(), "ablations": [ablation.to_dict() for ablation in self.ablations]}


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
        plan: base, domains and how uncertainty is measured. Its domains are those of the adapters, in any order;
            others, and watched ones, are measured as unseen.
        adapters: adapters of method gain or gain-ffn, each trained from the pretrained model on one domain.
        options: what is taken for shared, and the controls.

    Raises:
        AdapterError, BaseMismatchError: damaged, of another method, or of another base.
        ConfigError: fewer than two adapters, one trained on several domains or on one that the plan lacks, or a
            component that so few adapters do not have.
        DataError: a domain's text is missing or broken.
    """
    folders = _by_domain([Path(folder) for folder in adapters], [domain.name for domain in plan.data.measured])
    chosen = options or TransferOptions()
    _check_options(chosen, len(folders))
    vectors = read_gain_vectors(folders)
    sharing = sharing_of(vectors)
    check_adapters(list(folders.values()), plan.model, allow_other_base=allow_other_base)
    base = load_base(plan.model)
    domains = [load_domain(domain, plan.data, base.tokenizer) for domain in plan.data.measured]
    warn_of_other_texts(folders.values(), domains)
    made_from = provenance(plan, base, domains, {name: origin_of(folder) for name, folder in folders.items()})
    watched = tuple(domain.name for domain in domains if domain.name not in folders)
    pairs = [(name, v, domain) for name, v in zip(folders, vectors.values, strict=True) for domain in domains]
    with attached(base, next(iter(folders.values())), allow_other_base=allow_other_base) as (model, _):
        measure = _measurer(plan, model, vectors, progress)
        before = {domain.name: measure("base", np.zeros(vectors.values.shape[1]), domain) for domain in domains}
        whole: dict[Key, DomainLoss] = {
            ("whole", name, domain.name): measure(f"{name}, whole", v, domain) for name, v, domain in pairs
        }
        ablations = []
        for component in chosen.components:
            losses, sizes = dict(whole), {}
            for name, v, domain in pairs:
                shared = shared_component(vectors, component, name, domain.name)
                sizes[name, domain.name] = float(np.linalg.norm(shared) / np.linalg.norm(v))
                parts: dict[Part, FloatArray] = {"shared": shared, "own": v - shared}
                parts |= controls_of(v, shared, name, chosen.controls, plan.evaluate.seed)
                for part, vector in parts.items():
                    losses[part, name, domain.name] = measure(f"{name}, {part} ({component})", vector, domain)
            ablation = Ablation(
                component, tuple(folders), watched, before, losses, plan.evaluate, chosen.controls, sizes
            )
            ablations.append(ablation)
    return Transfer(sharing, tuple(ablations), made_from)


def _measurer(
    plan: Plan, model: nn.Module, vectors: GainVectors, progress: Progress | None
) -> Callable[[str, FloatArray, DomainBlocks], DomainLoss]:
    """Return a function that measures a domain with every gain at `1 + v`; equal gains on one domain only once."""
    gains = [cast(Any, model.get_submodule(PREFIX + name)).gain_v["default"] for name, _ in vectors.modules]
    ends = np.cumsum([features for _, features in vectors.modules])[:-1]
    known: dict[tuple[str, bytes], DomainLoss] = {}

    def measure(title: str, v: FloatArray, domain: DomainBlocks) -> DomainLoss:
        key = (domain.name, hashlib.sha256(v.astype(np.float32).tobytes()).digest())
        if key not in known:
            with torch.no_grad():
                for gain, part in zip(gains, np.split(v, ends), strict=True):
                    gain.copy_(torch.from_numpy(part))
            title, base = f"{title}: measuring {domain.name}", None if v.any() else plan.model.name
            size = plan.evaluate.batch_size
            known[key] = measure_domain(model, domain, batch_size=size, title=title, base=base, progress=progress)
        return known[key]

    return measure


def _by_domain(adapters: Sequence[Path], measured: Sequence[str]) -> dict[str, Path]:
    """Return adapters by the one domain of each; ConfigError where that is not one, or not one of the plan's."""
    folders: dict[str, Path] = {}
    for folder in adapters:
        record = read_record(folder)
        trained = () if record is None else tuple(dict.fromkeys(record.domains))
        if len(trained) != 1:
            says = f"was trained on {', '.join(trained)}" if trained else "does not say what it was trained on"
            raise ConfigError(f"{folder} {says}: give adapters that were each trained from the base on one domain")
        (name,) = trained
        if name in folders:
            raise ConfigError(f"{folder} was trained on {name}, and so was {folders[name]}: give one adapter a domain")
        if name not in measured:
            raise ConfigError(f"{folder} was trained on {name}, which is not measured; add it with --domain")
        folders[name] = folder
    return folders


def _check_options(options: TransferOptions, count: int) -> None:
    components, controls = options.components, options.controls
    if not components or len(set(components)) != len(components):
        raise ConfigError(f"components {', '.join(components)}: name some, each once")
    if len(set(controls)) != len(controls):
        raise ConfigError(f"controls {', '.join(controls)}: name each once")
    for component, left_out in (("held-out", "the measured domain's"), ("cross-fitted", "two domains'")):
        if component in components and count < 3:
            raise ConfigError(
                f"{component}: the mean of all adapters but {left_out} takes three or more, and {count} were given"
            )
