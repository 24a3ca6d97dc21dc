"""Agreement numbers against values worked by hand."""

from __future__ import annotations

import numpy as np
import pytest

from judges.calibrate import agreement, auroc, ranks, spearman


def test_ties_share_the_mean_of_their_ranks() -> None:
    assert ranks(np.array([30.0, 10.0, 20.0, 20.0])).tolist() == [4.0, 1.0, 2.5, 2.5]


def test_spearman_by_hand() -> None:
    # ranks 1 2 3 4 5 and 2 1 4 3 5: d² sums to 4, 1 - 6·4 / (5·24) = 0.8
    assert spearman(np.array([1, 2, 3, 4, 5]), np.array([20, 10, 40, 30, 500])) == pytest.approx(0.8)


def test_spearman_with_ties_is_pearson_of_mean_ranks() -> None:
    # ranks (1.5, 1.5, 3) and (1, 2, 3): covariance 0.5, variances 0.5 and 2/3
    value = spearman(np.array([7, 7, 9]), np.array([1, 2, 3]))
    assert value == pytest.approx(0.5 / np.sqrt(0.5 * 2 / 3))  # 0.866; the no-ties formula gives 0.875
    assert value != pytest.approx(1 - 6 * 0.5 / (3 * 8))


def test_auroc_by_hand_counts_a_tie_as_half() -> None:
    # positives 3, 1 against negatives 2, 1: 3>2, 3>1, 1<2, 1=1 → (1 + 1 + 0 + 0.5) / 4
    value = auroc(np.array([3.0, 1.0, 2.0, 1.0]), np.array([True, True, False, False]))
    assert value == pytest.approx(0.625)


def test_what_the_data_cannot_give_is_none_not_zero() -> None:
    assert spearman(np.array([1.0, 1.0]), np.array([0.0, 1.0])) is None
    assert spearman(np.array([]), np.array([])) is None
    assert auroc(np.array([1.0, 2.0]), np.array([True, True])) is None
    agreed = agreement([2.0, 3.0], [0.0, 0.0], seed=0)
    assert agreed.spearman.value is None and agreed.auroc_easy.value is None
    assert "undefined" in str(agreed)


def test_a_judge_that_is_right_has_spearman_minus_one_and_auroc_one() -> None:
    agreed = agreement([1.0, 2.0, 3.0, 4.0], [1.0, 0.9, 0.5, 0.0], seed=0)
    assert agreed.num_easy == 2
    assert agreed.spearman.value == pytest.approx(-1.0)
    assert agreed.auroc_easy.value == pytest.approx(1.0)
    backwards = agreement([4.0, 3.0, 2.0, 1.0], [1.0, 0.9, 0.5, 0.0], seed=0)
    assert backwards.auroc_easy.value == pytest.approx(0.0)


def test_interval_holds_the_value_narrows_with_data_and_repeats() -> None:
    rng = np.random.default_rng(3)

    def drawn(count: int) -> tuple[list[float], list[float]]:
        rates = rng.uniform(size=count)
        return (2.0 - rates + rng.normal(scale=0.4, size=count)).tolist(), rates.tolist()

    few, many = drawn(30), drawn(600)
    small, large = agreement(*few, seed=1).spearman, agreement(*many, seed=1).spearman
    for estimate in (small, large):
        assert estimate.value is not None and estimate.low is not None and estimate.high is not None
        assert estimate.low < estimate.value < estimate.high
    assert small.high - small.low > 2 * (large.high - large.low)  # type: ignore[operator]
    assert agreement(*few, seed=1) == agreement(*few, seed=1)
    assert agreement(*few, seed=1) != agreement(*few, seed=2)


@pytest.mark.parametrize("scores, rates", [([1.0], [0.1, 0.2]), ([float("nan")], [0.5]), ([1.0], [1.5])])
def test_senseless_input_is_refused(scores: list[float], rates: list[float]) -> None:
    with pytest.raises(ValueError):
        agreement(scores, rates, seed=0)
