"""The metrics equal scipy's and their definitions, also where they are degenerate."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from lowbit import metrics


def test_correlations_equal_scipy_with_ties() -> None:
    rng = np.random.default_rng()
    for _ in range(20):
        x, y = rng.integers(0, 6, 40), rng.normal(size=40)
        assert metrics.spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
        assert metrics.pearson(x, y) == pytest.approx(stats.pearsonr(x, y).statistic)


def test_matthews_and_f1_equal_their_counts() -> None:
    rng = np.random.default_rng()
    for _ in range(20):
        predicted, true = rng.integers(0, 2, 50), rng.integers(0, 2, 50)
        tp, tn = int((predicted & true).sum()), int(((1 - predicted) & (1 - true)).sum())
        fp, fn = int((predicted & (1 - true)).sum()), int(((1 - predicted) & true).sum())
        root = ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)) ** 0.5
        assert metrics.matthews(predicted, true) == pytest.approx((tp * tn - fp * fn) / root)
        assert metrics.f1(predicted, true) == pytest.approx(2 * tp / (2 * tp + fp + fn))
        assert metrics.accuracy(predicted, true) == (tp + tn) / 50


def test_constant_predictions_score_zero_not_nan() -> None:
    assert metrics.matthews([1, 1, 1], [0, 1, 0]) == 0
    assert metrics.pearson([2.0, 2.0], [0.0, 1.0]) == 0
    assert metrics.f1([0, 0], [0, 0]) == 0
    assert np.isnan(metrics.accuracy([], []))
