"""A reply becomes the expected rating, or no score at all."""

from __future__ import annotations

import math

import pytest

from judges.verdict import JudgeFailure, Verdict, read_verdict


def logs(*masses: float) -> list[float]:
    return [math.log(mass) if mass else -math.inf for mass in masses]


def test_score_is_the_expected_rating_not_the_likeliest() -> None:
    verdict = read_verdict(logs(0.1, 0.0, 0.2, 0.4, 0.3))
    assert isinstance(verdict, Verdict)
    assert verdict.score == pytest.approx(0.1 * 1 + 0.2 * 3 + 0.4 * 4 + 0.3 * 5)  # 3.8; the likeliest is 4
    assert verdict.reason == "mass 0.40 on 4, 0.30 on 5"


def test_probabilities_are_renormalised_over_the_labels() -> None:
    verdict = read_verdict(logs(0.0, 0.1, 0.0, 0.3, 0.0))  # 0.6 on words that are no label
    assert isinstance(verdict, Verdict)
    assert verdict.probabilities == pytest.approx((0.0, 0.25, 0.0, 0.75, 0.0))
    assert verdict.score == pytest.approx(3.5)  # without renormalising: 1.4


def test_mass_elsewhere_is_a_failure_and_has_no_score() -> None:
    failure = read_verdict(logs(0.01, 0.01, 0.01, 0.01, 0.009))
    assert isinstance(failure, JudgeFailure)
    assert failure.reason == "off-label" and "0.049" in failure.detail
    assert not hasattr(failure, "score")
    assert isinstance(read_verdict(logs(0.01, 0.01, 0.01, 0.01, 0.011)), Verdict)


@pytest.mark.parametrize(
    "label_logprobs",
    [
        [math.nan, -1.0, -1.0, -1.0, -2.0],
        [math.inf, -1.0, -1.0, -1.0, -2.0],
        [2.5, 1.0, 0.3, 0.2, 0.1],  # logits, not log-probabilities
        logs(0.5, 0.5, 0.5, 0.0, 0.0),  # not one distribution
        logs(0.5, 0.5),  # a label is missing
    ],
)
def test_what_is_no_distribution_is_a_failure(label_logprobs: list[float]) -> None:
    failure = read_verdict(label_logprobs)
    assert isinstance(failure, JudgeFailure) and failure.reason == "not probabilities"


def test_all_mass_below_the_floor_of_floats_is_off_label() -> None:
    failure = read_verdict([-math.inf] * 5)
    assert isinstance(failure, JudgeFailure) and failure.reason == "off-label"
