"""How much separately learnt gains have in common: correlations, the share of common variance, agreement of signs.

The GAIN paper (arXiv 2604.04516, section 5.1, "Why does positive transfer occur?") trains one adapter a domain, each
from the pretrained model, finds that "cross-domain correlations are near zero" and that a part "of the variance is
shared across all domains. In this shared component, all five domains agree on which dimensions to suppress and which to
amplify". It gives no formula for that part, so `Sharing` has what the sentence may mean, each by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gaintune.analysis.gains.survey import read_factors
from gaintune.errors import AdapterError, ConfigError
from gaintune.results import FloatArray


@dataclass(frozen=True)
class GainVectors:
    """What several adapters add to a gain of 1, all modules of an adapter one after another.

    Attributes:
        labels: what the adapters are called.
        modules: name and number of features of each module, in the order of the vectors.
        values: v, float64 `(adapters, features)`; 0 is the pretrained model.
    """

    labels: tuple[str, ...]
    modules: tuple[tuple[str, int], ...]
    values: FloatArray


def read_gain_vectors(adapters: Mapping[str, Path]) -> GainVectors:
    """Read v of several GAIN or GAIN-FFN adapters, labelled, from their folders alone.

    Raises:
        AdapterError: damaged, or of another method.
        ConfigError: fewer than two adapters, or adapters with gains in different places.
    """
    if len(adapters) < 2:
        raise ConfigError(f"what adapters share takes two or more of them, and {len(adapters)} was given")
    rows, modules = [], None
    for folder in adapters.values():
        factors = read_factors(folder)
        if factors.method.line != "gains":
            raise AdapterError(f"{folder}: factors of (IA)3; give adapters of method gain or gain-ffn")
        own = tuple((name, len(factors.values[name])) for name in sorted(factors.values))
        if modules is not None and own != modules:
            odd = sorted({*own} ^ {*modules})[0][0]
            raise ConfigError(f"{folder}: its gains are in other places than {next(iter(adapters))}'s, such as {odd}")
        modules = own
        rows.append(np.concatenate([factors.values[name] - 1.0 for name, _ in own]))
    assert modules is not None
    return GainVectors(tuple(adapters), modules, np.stack(rows))


@dataclass(frozen=True)
class Sharing:
    """What N vectors v have in common. "Energy" is a sum of squares: variance around the pretrained model, v = 0.

    Attributes:
        labels: what the adapters are called.
        correlations: Pearson correlation of each two vectors over features, `(N, N)`.
        cosines: cosine of each two, `(N, N)`.
        mean_share: energy of N copies of the mean vector over that of all vectors, `N |mean|^2 / sum_i |v_i|^2`. Of N
            vectors with nothing in common it is 1 / N (`chance_share`).
        common_share: the same without what is there by chance, `(N * mean_share - 1) / (N - 1)`: the mean product of
            two different vectors over the mean square of one; 0 for vectors with nothing in common, 1 for equal ones.
        principal_share: energy along the first principal direction (no centring) over that of all vectors.
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
        """`mean_share` of as many vectors with nothing in common."""
        return 1.0 / len(self.labels)

    @property
    def pairs(self) -> list[float]:
        """The correlations of different adapters, each once."""
        return self.correlations[np.triu_indices(len(self.labels), 1)].tolist()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        plain = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in vars(self).items()}
        return {**plain, "chance_share": self.chance_share}


def sharing_of(vectors: GainVectors) -> Sharing:
    """Compute what the vectors have in common; ConfigError where one of them is zero or constant."""
    v = vectors.values
    count = len(v)
    still = [label for label, row in zip(vectors.labels, v, strict=True) if np.ptp(row) == 0.0]
    if still:
        raise ConfigError(f"the gains of {still[0]} are all alike: it has learnt nothing that could be shared")
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
    """Share of a vector's energy along a direction; 0 where there is no direction."""
    length = float(direction @ direction)
    return 0.0 if length == 0.0 else float(vector @ direction) ** 2 / (length * float(vector @ vector))


def principal_direction(values: FloatArray) -> FloatArray:
    """The unit vector `(features,)` along which vectors `(adapters, features)` have the most energy, not centred."""
    _, vectors = np.linalg.eigh(values @ values.T)
    direction = vectors[:, -1] @ values
    return direction / np.linalg.norm(direction)


def mean_without(values: FloatArray, left_out: Sequence[int]) -> FloatArray:
    """The mean of the vectors but some."""
    return np.delete(values, list(left_out), axis=0).mean(axis=0)
