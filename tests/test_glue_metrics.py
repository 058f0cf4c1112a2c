"""The metrics of GLUE against their formulas, on fixed predictions."""

import math

import pytest

from lorasp.evaluation.glue_metrics import glue_metrics, majority_baseline

LABELS = [1, 1, 1, 0, 0, 1, 0, 1, 0, 0, 1, 1]
PREDICTED = [1, 0, 1, 0, 1, 1, 0, 1, 0, 1, 1, 0]
SCORES = [0.0, 1.25, 5.0, 3.2, 3.2, 4.8]
GUESSED = [0.3, 1.0, 4.1, 3.9, 2.2, 3.9]


def counts():
    pairs = list(zip(LABELS, PREDICTED, strict=True))
    return [pairs.count(pair) for pair in ((1, 1), (0, 0), (0, 1), (1, 0))]  # tp, tn, fp, fn


def test_accuracy_f1_and_matthews_are_their_formulas():
    tp, tn, fp, fn = counts()
    assert (tp, tn, fp, fn) == (5, 3, 2, 2)
    found = glue_metrics(("accuracy", "f1", "matthews"), LABELS, PREDICTED)
    assert found["accuracy"] == pytest.approx((tp + tn) / 12)
    assert found["f1"] == pytest.approx(2 * tp / (2 * tp + fp + fn))
    margins = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    assert found["matthews"] == pytest.approx((tp * tn - fp * fn) / math.sqrt(margins))


def pearson(xs, ys):
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    covariance = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
    deviations = [math.sqrt(sum((v - mean) ** 2 for v in values)) for values, mean in ((xs, mean_x), (ys, mean_y))]
    return covariance / math.prod(deviations)


def ranks(values):
    """From 1; equal values share the mean of theirs."""
    return [sum(v < x for v in values) + (sum(v == x for v in values) + 1) / 2 for x in values]


def test_pearson_and_spearman_are_their_formulas():
    found = glue_metrics(("pearson", "spearman"), SCORES, GUESSED)
    assert found["pearson"] == pytest.approx(pearson(SCORES, GUESSED))
    assert found["spearman"] == pytest.approx(pearson(ranks(SCORES), ranks(GUESSED)))


def test_the_baseline_answers_with_the_commonest_label_of_training():
    found = majority_baseline(("accuracy", "f1"), [0, 1, 1], LABELS, is_regression=False)
    assert found["answer"] == 1 and found["accuracy"] == pytest.approx(7 / 12)
    assert found["f1"] == pytest.approx(2 * 7 / (2 * 7 + 5))
    assert majority_baseline(("matthews",), [0, 1], LABELS, is_regression=False) == {"answer": 0, "matthews": 0.0}
    mean = majority_baseline(("pearson",), SCORES, SCORES, is_regression=True)
    assert mean == {"answer": pytest.approx(sum(SCORES) / 6)}
