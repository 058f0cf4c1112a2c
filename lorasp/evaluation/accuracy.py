"""Accuracies of multiple choice, with 95 % intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

_Z = 1.959963984540054  # of 95 %


@dataclass(frozen=True)
class Accuracy:
    """Shares from 0 to 1; low and high: the ends of the 95 % interval. correct is None for a mean of accuracies."""

    accuracy: float
    low: float
    high: float
    questions: int
    correct: int | None = None


def accuracy(correct: int, questions: int) -> Accuracy:
    """Of independent questions: Wilson's interval, which stays within 0 to 1 and does not vanish at the ends.

    Wilson (1927): (p + z²/2n ± z·√(p(1-p)/n + z²/4n²)) / (1 + z²/n).
    """
    share, square = correct / questions, _Z**2 / questions
    middle = (share + square / 2) / (1 + square)
    half = _Z * math.sqrt(share * (1 - share) / questions + square / (4 * questions)) / (1 + square)
    return Accuracy(share, max(0.0, middle - half), min(1.0, middle + half), questions, correct)


def mean_accuracy(parts: Sequence[Accuracy]) -> Accuracy:
    """The mean in which each part counts the same, however many questions it has (macro average).

    Its interval is z standard errors on either side; a part's variance is taken at the middle of its Wilson interval
    and n + z², so that a part of which all are right or wrong has one as well.
    """
    count = len(parts)
    variance = sum(
        (part.low + part.high) / 2 * (1 - (part.low + part.high) / 2) / (part.questions + _Z**2) for part in parts
    )
    share, half = sum(part.accuracy for part in parts) / count, _Z * math.sqrt(variance) / count
    return Accuracy(share, max(0.0, share - half), min(1.0, share + half), sum(part.questions for part in parts))
