"""Rank correlation and calibration, by hand."""

from __future__ import annotations

import pytest

from pipeline.rank_correlation import binned, calibration_error, spearman


def test_spearman_by_hand():
    assert spearman([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1.0)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1.0)
    # Ranks 0, 1, 2 and 0.5, 0.5, 2: covariance 1.5, variances 2 and 1.5.
    assert spearman([1, 2, 3], [5, 5, 9]) == pytest.approx(1.5 / (2 * 1.5) ** 0.5)
    assert spearman([1, 1, 1], [1, 2, 3]) is None


def test_bins_and_their_error_by_hand():
    pairs = [(0.12, 0.0), (0.18, 0.5), (0.5, 0.75), (1.0, 1.0)]
    assert binned(pairs) == [(pytest.approx(0.15), 0.25, 2), (0.5, 0.75, 1), (1.0, 1.0, 1)]
    assert calibration_error(pairs) == pytest.approx((2 * 0.1 + 0.25 + 0.0) / 4)
    assert calibration_error([]) == 0.0
