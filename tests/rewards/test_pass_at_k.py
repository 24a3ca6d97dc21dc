"""pass@k by hand, against a count of all subsets, and the bootstrap interval of its mean."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.pass_at_k import mean_with_interval, pass_at_k


@pytest.mark.parametrize(
    ("num_samples", "num_correct", "k", "expected"),
    [
        (4, 1, 1, 1 / 4),
        (4, 1, 2, 1 / 2),  # 3 of the 6 pairs hold the one correct sample
        (4, 2, 2, 5 / 6),  # 1 of the 6 pairs is wrong and wrong
        (8, 0, 8, 0.0),
        (8, 1, 8, 1.0),
        (5, 3, 3, 1.0),  # only two are wrong, so any three hold a correct one
    ],
)
def test_hand_worked_values(num_samples: int, num_correct: int, k: int, expected: float) -> None:
    assert pass_at_k(num_samples, num_correct, k) == pytest.approx(expected)


@given(st.integers(1, 8), st.data())
def test_equals_the_share_of_all_subsets_with_a_correct_sample(num_samples: int, data: st.DataObject) -> None:
    num_correct = data.draw(st.integers(0, num_samples))
    k = data.draw(st.integers(1, num_samples))
    subsets = list(combinations([True] * num_correct + [False] * (num_samples - num_correct), k))
    assert pass_at_k(num_samples, num_correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_differs_from_the_biased_plug_in_estimate() -> None:
    assert abs(pass_at_k(4, 1, 2) - (1 - (1 - 1 / 4) ** 2)) > 0.05


@pytest.mark.parametrize(("num_samples", "num_correct", "k"), [(3, 1, 4), (3, 4, 1), (3, -1, 1), (3, 1, 0), (0, 0, 1)])
def test_impossible_counts_are_refused(num_samples: int, num_correct: int, k: int) -> None:
    with pytest.raises(ValueError):
        pass_at_k(num_samples, num_correct, k)


def test_interval_covers_the_true_mean_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    trials = [mean_with_interval(generator.random(40), num_resamples=300, seed=seed) for seed in range(200)]
    assert 0.88 <= np.mean([trial.low <= 0.5 <= trial.high for trial in trials]) <= 1.0


def test_interval_is_a_point_for_equal_values_and_the_same_for_the_same_seed() -> None:
    point = mean_with_interval([0.25] * 5)
    assert (point.mean, point.low, point.high, point.num_tasks) == (0.25, 0.25, 0.25, 5)
    values = [0.0, 1.0, 0.5, 0.25]
    assert mean_with_interval(values, seed=3) == mean_with_interval(values, seed=3)
    assert mean_with_interval(values).low < 0.4375 < mean_with_interval(values).high


def test_no_tasks_have_no_mean() -> None:
    with pytest.raises(ValueError, match="at least one task"):
        mean_with_interval([])
