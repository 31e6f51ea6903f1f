"""The metrics of GLUE, small and exact, in numpy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike


def accuracy(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Fraction of equal entries; NaN for no entries."""
    return float(np.mean(np.asarray(predictions) == np.asarray(labels))) if np.size(labels) else float("nan")


def f1(predictions: ArrayLike, labels: ArrayLike) -> float:
    """F1 of class 1: 2 TP / (2 TP + FP + FN); 0 where there is neither a predicted nor a true positive."""
    predicted, true = np.asarray(predictions) == 1, np.asarray(labels) == 1
    total = predicted.sum() + true.sum()
    return float(2 * (predicted & true).sum() / total) if total else 0.0


def matthews(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Matthews correlation of two classes 0 and 1; 0 where predictions or labels are constant."""
    return pearson(np.asarray(predictions, dtype=float), np.asarray(labels, dtype=float))


def pearson(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Pearson correlation; 0 where either side is constant."""
    x, y = (v - v.mean() for v in (np.asarray(predictions, np.float64), np.asarray(labels, np.float64)))
    size = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / size) if size else 0.0


def spearman(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Spearman correlation: Pearson's of the ranks, ties getting their mean rank."""
    return pearson(_ranks(predictions), _ranks(labels))


def _ranks(values: ArrayLike) -> np.ndarray:
    _, inverse, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


METRICS: dict[str, Callable[[ArrayLike, ArrayLike], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}
