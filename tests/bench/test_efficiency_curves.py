"""How curves of score by tokens are read, by hand."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

SOURCE = Path(__file__).resolve().parents[2] / "bench" / "efficiency_curves.py"
spec = importlib.util.spec_from_file_location("efficiency_curves", SOURCE)
curves = importlib.util.module_from_spec(spec)
spec.loader.exec_module(curves)


def curve(*points, start=0.3):
    points = ((0, start), *points)
    return [{"generated_tokens": tokens, "seconds": tokens / 10, "pass_at_1": score} for tokens, score in points]


def test_what_a_score_took_lies_between_two_checkpoints_in_proportion():
    one = curve((100, 0.4), (200, 0.6))
    assert curves.needed(one, "generated_tokens", 0.5) == pytest.approx(150)
    assert curves.needed(one, "seconds", 0.35) == pytest.approx(5)
    assert curves.needed(one, "seconds", 0.61) == float("inf")


def test_a_score_that_falls_again_does_not_count_as_reached():
    """0.6 and 0.4 are two looks at one level: 0.5 each."""
    assert curves.monotone([0.4, 0.6, 0.4, 0.7], 0.3) == pytest.approx([0.4, 0.5, 0.5, 0.7])
    assert curves.monotone([0.2, 0.1], 0.3) == [0.3, 0.3]
    one = curve((100, 0.4), (200, 0.6), (300, 0.4), (400, 0.7))
    assert curves.needed(one, "generated_tokens", 0.55) == pytest.approx(325)


def test_one_seed_that_never_gets_there_is_told_and_none_stands_for_the_others():
    assert curves.spread([5.0], "k", 9.0) == "5 k" and curves.spread([2.28, 12.4], "k", 20.0) == "2.3 k (2.3–12)"
    assert curves.spread([5.0, 6.0, float("inf")], "k", 9.0) == "6 k (5–not by 9)"
    assert curves.spread([float("inf")] * 2, "k", 9.0) == "not by 9 k"


def test_the_fit_finds_the_sigmoid_that_made_the_points():
    tokens = np.geomspace(1e4, 1e6, 12)
    scores = 0.3 + (0.7 - 0.3) / (1 + (8e4 / tokens) ** 1.5)
    end, middle, slope, error = curves.sigmoid_fit(tokens, scores, 0.3)
    assert (end, slope) == (pytest.approx(0.7, abs=0.02), pytest.approx(1.5, abs=0.15)) and error < 0.005
    assert middle == pytest.approx(8e4, rel=0.1)


def test_trials_are_told_from_runs():
    one = curve((100, 0.4), start=0.25)
    runs = [{"pool": "dead", "arm": arm, "seed": 1, "start": 0.25, "curve": one[1:]} for arm in ("A", "A.hot", "C-x")]
    assert curves.by_arm(runs, trials=False) == {"dead": {"A": [one], "C-x": [one]}}
    assert curves.by_arm(runs, trials=True) == {"dead": {"A.hot": [one]}}
