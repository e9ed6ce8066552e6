"""From predicted labels to figures: accuracy with its interval, every class, and paired differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gaintune.config import EvaluateConfig
from gaintune.errors import DataError
from gaintune.results import Interval, paired_shares

POSITIVE = ("1", "equivalent")  # the class of GLUE's F1: MRPC's paraphrases, and 1 where labels are 0 and 1


@dataclass(frozen=True)
class Predictions:
    """The true and the predicted label of every row of one domain, as numbers counted in the order of `labels`."""

    domain: str
    labels: tuple[str, ...]
    truth: tuple[int, ...]
    predicted: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.truth or len(self.truth) != len(self.predicted):
            raise DataError(
                f"{len(self.truth)} true and {len(self.predicted)} predicted labels: need one of each a row"
            )
        numbers = {*self.truth, *self.predicted}
        if not numbers <= set(range(len(self.labels))):
            raise DataError(f"label numbers {sorted(numbers)} for the labels {', '.join(self.labels)}")

    @property
    def right(self) -> NDArray[np.float64]:
        """1 where the prediction is right, else 0, `(rows,)`."""
        return np.asarray(np.equal(self.truth, self.predicted), np.float64)

    @property
    def names(self) -> list[str]:
        """The true label of every row."""
        return [self.labels[number] for number in self.truth]

    def confusion(self) -> NDArray[np.int64]:
        """Rows of each true label (first axis) that were given each label (second axis)."""
        counts = np.zeros((len(self.labels), len(self.labels)), np.int64)
        np.add.at(counts, (np.asarray(self.truth), np.asarray(self.predicted)), 1)
        return counts


@dataclass(frozen=True)
class ClassFigures:
    """One class: of the rows given its label the share that have it, of the rows that have it the share found.

    `rows` have the label, `predicted` were given it. A share of no rows is 0, as is the F1 of nothing.
    """

    label: str
    precision: float
    recall: float
    f1: float
    rows: int
    predicted: int


@dataclass(frozen=True)
class Scores:
    """How well the labels of one domain are predicted.

    Attributes:
        accuracy: share of rows with the right label, and its interval over rows.
        majority: share of the most frequent label: what always giving it would reach.
        matthews: Matthews correlation (CoLA's metric in GLUE; more than two classes after Gorodkin 2004), -1 to 1; 0
            where one label is never given, or all rows have the same.
        macro_f1: unweighted mean of the F1 of the classes that some row has or was given.
        f1: F1 of the class called 1 or equivalent (MRPC's metric in GLUE); None where there are more than two such
            classes, or none is called so.
        classes: each class, in the order of the labels.
        rows: how many rows were measured.
    """

    domain: str
    accuracy: Interval
    majority: float
    matthews: float
    macro_f1: float
    f1: float | None
    classes: tuple[ClassFigures, ...]
    rows: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def score(predictions: Predictions, settings: EvaluateConfig) -> Scores:
    """All figures of one model on one domain."""
    counts = predictions.confusion()
    classes = tuple(_class_figures(label, number, counts) for number, label in enumerate(predictions.labels))
    present = [each for each in classes if each.rows + each.predicted]
    positive = [each.f1 for each in present if each.label in POSITIVE] if len(present) <= 2 else []
    return Scores(
        domain=predictions.domain,
        accuracy=wilson(int(np.trace(counts)), len(predictions.truth), settings.confidence),
        majority=int(counts.sum(axis=1).max()) / int(counts.sum()),
        matthews=matthews_correlation(counts),
        macro_f1=math.fsum(each.f1 for each in present) / len(present),
        f1=positive[0] if positive else None,
        classes=classes,
        rows=len(predictions.truth),
    )


def difference(first: Predictions, second: Predictions, settings: EvaluateConfig) -> Interval:
    """Accuracy of the second less that of the first, paired row by row, with the interval of `paired_shares`.

    Predictions less themselves are exactly 0. Other ones that are right on the same rows differ by 0 too, but how many
    rows were asked says how sure that is.

    Raises:
        DataError: they are not of the same rows.
    """
    if (first.domain, first.names) != (second.domain, second.names):
        raise DataError(f"predictions for {first.domain} and {second.domain} are not of the same rows")
    right = first.right
    return paired_shares(right, right if second is first else second.right, settings.confidence)


def wilson(right: int, rows: int, confidence: float) -> Interval:
    """A share of rows with Wilson's score interval (1927), which has a width at 0 and at 1 too."""
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share, spread = right / rows, z**2 / rows
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread**2 / 4) / (1 + spread)
    return Interval(share, max(0.0, middle - half), min(1.0, middle + half))


def _class_figures(label: str, number: int, counts: NDArray[np.int64]) -> ClassFigures:
    right = int(counts[number, number])
    rows, predicted = int(counts[number].sum()), int(counts[:, number].sum())
    precision = right / predicted if predicted else 0.0
    recall = right / rows if rows else 0.0
    f1 = 2 * right / (rows + predicted) if rows + predicted else 0.0
    return ClassFigures(label, precision, recall, f1, rows, predicted)


def matthews_correlation(counts: Sequence[Sequence[int]] | NDArray[np.int64]) -> float:
    """Correlation of true and given labels, from the rows of each pair of them, `(labels, labels)`."""
    table = np.asarray(counts, np.float64)
    rows, given, total = table.sum(axis=1), table.sum(axis=0), table.sum()
    spread = (total**2 - rows @ rows) * (total**2 - given @ given)
    return float((np.trace(table) * total - rows @ given) / math.sqrt(spread)) if spread > 0 else 0.0
