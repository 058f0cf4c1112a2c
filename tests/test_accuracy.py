"""Intervals of accuracies, against scipy's and against what they promise."""

import random

import pytest
from scipy.stats import binomtest

from lorasp.evaluation.accuracy import accuracy, mean_accuracy


@pytest.mark.parametrize("correct, questions", [(0, 1), (1, 1), (0, 10), (7, 10), (26, 100), (3950, 14042)])
def test_the_interval_is_wilson_s(correct, questions):
    found = accuracy(correct, questions)
    theirs = binomtest(correct, questions).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    assert found.accuracy == correct / questions


def test_a_mean_counts_every_part_the_same():
    parts = [accuracy(9, 10), accuracy(100, 1000)]
    found = mean_accuracy(parts)
    assert found.accuracy == pytest.approx(0.5) and found.questions == 1010
    # The variance is nearly the small part's alone: half of its half-width.
    assert found.high - found.low == pytest.approx((parts[0].high - parts[0].low) / 2, rel=0.15)


def test_the_mean_s_interval_holds_the_truth_in_about_95_of_100_draws():
    numbers, truths = random.Random(0), [0.25, 0.4, 0.9, 0.6]
    held = 0
    for _ in range(1000):
        found = mean_accuracy([accuracy(sum(numbers.random() < p for _ in range(40)), 40) for p in truths])
        held += found.low <= sum(truths) / 4 <= found.high
    assert 930 <= held <= 975
