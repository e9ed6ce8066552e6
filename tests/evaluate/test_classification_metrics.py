"""Scores of predicted labels, against formulae written another way and a table worked out by hand."""

import json
import math
import random

import numpy as np
import pytest

from gaintune.config import EvaluateConfig
from gaintune.errors import DataError
from gaintune.evaluate import difference, score
from gaintune.evaluate.classification import Predictions, matthews_correlation
from support import refused

SETTINGS = EvaluateConfig(bootstrap_samples=400)


def predictions(truth, predicted, labels=("0", "1"), domain="rows") -> Predictions:
    return Predictions(domain, tuple(labels), tuple(truth), tuple(predicted))


def drawn(count: int, labels: int, seed: int = 0, right: float = 0.6) -> tuple[list[int], list[int]]:
    generator = random.Random(seed)
    truth = [generator.randrange(labels) for _ in range(count)]
    return truth, [each if generator.random() < right else generator.randrange(labels) for each in truth]


def test_every_figure_of_a_table_worked_out_by_hand():
    """Six rows of the class 1, of which four are found; four rows of the class 0, of which three are."""
    truth = [1] * 6 + [0] * 4
    scores = score(predictions(truth, [1, 1, 1, 1, 0, 0, 0, 0, 0, 1]), SETTINGS)
    assert (scores.accuracy.value, scores.majority, scores.rows) == (pytest.approx(0.7), pytest.approx(0.6), 10)
    none, one = scores.classes
    assert (none.precision, none.recall, none.rows, none.predicted) == (3 / 5, 3 / 4, 4, 5)
    assert (one.precision, one.recall, one.rows, one.predicted) == (4 / 5, 4 / 6, 6, 5)
    assert one.f1 == scores.f1 == pytest.approx(2 * 4 / (2 * 4 + 1 + 2))
    assert scores.macro_f1 == pytest.approx((one.f1 + none.f1) / 2)
    tp, tn, fp, fn = 4, 3, 1, 2
    expected = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert scores.matthews == pytest.approx(expected)
    json.dumps(scores.to_dict())


@pytest.mark.parametrize("labels", [2, 3, 5])
def test_matthews_is_the_correlation_of_the_indicators(labels):
    """Gorodkin's definition: covariances of one-hot rows, summed over the labels."""
    truth, given = drawn(300, labels)
    x, y = np.eye(labels)[truth], np.eye(labels)[given]

    def covariance(a, b):
        return np.sum((a - a.mean(axis=0)) * (b - b.mean(axis=0)))

    expected = covariance(x, y) / math.sqrt(covariance(x, x) * covariance(y, y))
    names = [str(number) for number in range(labels)]
    assert matthews_correlation(predictions(truth, given, names).confusion()) == pytest.approx(expected)
    if labels == 2:
        assert expected == pytest.approx(np.corrcoef(truth, given)[0, 1])


@pytest.mark.parametrize("labels", [2, 4])
def test_each_class_is_counted_row_by_row(labels):
    truth, given = drawn(200, labels, seed=1)
    scores = score(predictions(truth, given, [f"c{n}" for n in range(labels)]), SETTINGS)
    for number, each in enumerate(scores.classes):
        right = sum(t == g == number for t, g in zip(truth, given, strict=True))
        assert (each.rows, each.predicted) == (truth.count(number), given.count(number))
        assert (each.recall, each.precision) == (right / truth.count(number), right / given.count(number))
        assert each.f1 == pytest.approx(2 / (1 / each.recall + 1 / each.precision))
    assert scores.f1 is None
    assert scores.accuracy.value == pytest.approx(sum(each.recall * each.rows for each in scores.classes) / 200)


@pytest.mark.parametrize(("right", "rows"), [(32, 32), (0, 32), (7, 10), (1, 1), (390, 400)])
@pytest.mark.parametrize("confidence", [0.95, 0.8])
def test_the_interval_of_an_accuracy_holds_the_shares_it_is_likely_for(right, rows, confidence):
    """Wilson's bounds are the shares p of which the one seen is just z standard errors of p away."""
    answers = predictions([0] * rows, [0] * right + [1] * (rows - right))
    accuracy = score(answers, EvaluateConfig(confidence=confidence)).accuracy
    assert accuracy.value == right / rows
    z = {0.95: 1.959964, 0.8: 1.281552}[confidence]
    for bound, edge in ((accuracy.low, 0.0), (accuracy.high, 1.0)):
        if bound != pytest.approx(edge, abs=1e-12):
            assert abs(accuracy.value - bound) == pytest.approx(z * math.sqrt(bound * (1 - bound) / rows), rel=1e-5)
    if (right, rows, confidence) == (32, 32, 0.95):
        assert (accuracy.low, accuracy.high) == (pytest.approx(0.8928, abs=1e-4), 1.0)


def test_classes_that_no_row_has_or_is_given_do_not_count():
    """A classifier of three labels on a domain that has two of them."""
    truth, given = [0, 0, 1, 1, 1], [0, 1, 1, 1, 0]
    two = score(predictions(truth, given, ("0", "1")), SETTINGS)
    three = score(predictions(truth, given, ("0", "1", "2")), SETTINGS)
    assert three.macro_f1 == two.macro_f1 == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert three.f1 == two.f1 == pytest.approx(2 / 3)
    assert score(predictions(truth, [0, 1, 1, 1, 2], ("0", "1", "2")), SETTINGS).f1 is None


def test_differences_are_paired():
    truth, given = drawn(300, 2, seed=3)
    first = predictions(truth, given)
    same = difference(first, first, SETTINGS)
    assert same.value == same.low == same.high == 0.0
    mended = list(given)
    wrong = [row for row in range(300) if truth[row] != given[row]][:30]
    for row in wrong:
        mended[row] = truth[row]
    gained = difference(first, predictions(truth, mended), SETTINGS)
    assert gained.value == pytest.approx(0.1)
    up, down = 31 / 302, 1 / 302  # one row more each way: Bonett and Price
    half = 1.959964 * math.sqrt((up + down - (up - down) ** 2) / 302)
    assert (gained.low, gained.high) == (pytest.approx(up - down - half), pytest.approx(up - down + half))
    assert gained.low > 0
    back = difference(predictions(truth, mended), first, SETTINGS)
    assert (back.value, back.low, back.high) == pytest.approx((-gained.value, -gained.high, -gained.low))


def test_labels_are_compared_by_name_and_rows_must_be_the_same():
    first = predictions([0, 1, 1], [0, 1, 0], ("a", "b"))
    assert difference(first, predictions([1, 0, 0], [1, 0, 0], ("b", "a")), SETTINGS).value == pytest.approx(1 / 3)
    other = predictions([0, 1, 0], [0, 1, 0], ("a", "b"))
    refused(DataError, "not of the same rows", difference, first, other, SETTINGS)
    refused(DataError, "2 true and 1 predicted", predictions, [0, 1], [0])
    refused(DataError, "label numbers", predictions, [0, 2], [0, 1])


def test_what_has_no_spread_has_no_correlation_and_no_interval():
    always = score(predictions([0, 1, 0], [0, 0, 0]), SETTINGS)
    assert always.matthews == 0.0 and always.classes[1].precision == always.classes[1].f1 == always.f1 == 0.0
    one = predictions([1], [1])
    assert (difference(one, one, SETTINGS).low, difference(one, one, SETTINGS).high) == (None, None)
