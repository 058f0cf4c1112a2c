"""GLUE's metrics, by scikit-learn and scipy, of predictions that are all there."""

import math
import warnings
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

Values = Sequence[float]


def _matthews(labels: Values, predictions: Values) -> float:
    from sklearn.metrics import matthews_corrcoef

    return matthews_corrcoef(labels, predictions)


def _accuracy(labels: Values, predictions: Values) -> float:
    from sklearn.metrics import accuracy_score

    return accuracy_score(labels, predictions)


def _f1(labels: Values, predictions: Values) -> float:
    """Of class 1, which says that the sentences mean the same."""
    from sklearn.metrics import f1_score

    return f1_score(labels, predictions, zero_division=0.0)


def _pearson(labels: Values, predictions: Values) -> float:
    from scipy.stats import pearsonr

    return pearsonr(labels, predictions).statistic


def _spearman(labels: Values, predictions: Values) -> float:
    from scipy.stats import spearmanr

    return spearmanr(labels, predictions).statistic


# scikit-learn and scipy.stats take seconds to import, which only a run that scores with them waits for.
_METRICS: dict[str, Callable[[Values, Values], float]] = {
    "matthews": _matthews,
    "accuracy": _accuracy,
    "f1": _f1,
    "pearson": _pearson,
    "spearman": _spearman,
}


def glue_metrics(names: Sequence[str], labels: Values, predictions: Values) -> dict[str, float]:
    """The named metrics, from -1 or 0 to 1; NaN of correlations where all predictions (or labels) are equal."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of constant predictions, which NaN tells
        return {name: float(_METRICS[name](labels, predictions)) for name in names}


def majority_baseline(
    names: Sequence[str], trained: Values, labels: Values, *, is_regression: bool
) -> dict[str, float]:
    """The metrics of one who answers every row with the commonest label of the rows that are `trained` (the smallest
    of equals), or of scores with their mean; `answer` is that. Without correlations, which a constant has none of.
    """
    counts = Counter(trained)
    answer = float(np.mean(trained)) if is_regression else min(counts, key=lambda label: (-counts[label], label))
    found = glue_metrics(names, labels, [answer] * len(labels))
    return {"answer": answer, **{name: value for name, value in found.items() if not math.isnan(value)}}
