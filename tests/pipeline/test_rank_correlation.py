"""Spearman's rank correlation, by hand."""

from __future__ import annotations

import pytest

from pipeline.rank_correlation import spearman


def test_spearman_by_hand():
    assert spearman([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1.0)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1.0)
    # Ranks 0, 1, 2 and 0.5, 0.5, 2: covariance 1.5, variances 2 and 1.5.
    assert spearman([1, 2, 3], [5, 5, 9]) == pytest.approx(1.5 / (2 * 1.5) ** 0.5)
    assert spearman([1, 1, 1], [1, 2, 3]) is None
