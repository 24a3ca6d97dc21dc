"""What was expected against what came, by hand."""

from __future__ import annotations

import pytest

from pipeline.report_difficulty import binned, calibration_error, foresight_panel


def row(entry: str, expected: float, passes: int, total: int = 4) -> dict:
    return {"step": 1, "entry": entry, "expected": expected, "passes": passes, "total": total}


def test_bins_and_their_error_by_hand() -> None:
    bins = binned([(0.12, 0.0), (0.18, 0.5), (0.5, 0.75), (1.0, 1.0)])
    assert bins == [(pytest.approx(0.15), 0.25, 2), (0.5, 0.75, 1), (1.0, 1.0, 1)]
    assert calibration_error(bins) == pytest.approx((2 * 0.1 + 0.25 + 0.0) / 4)


def test_a_perfect_forecast_and_its_opposite() -> None:
    cells = {"maths/1": "maths", "code/1": "code"}
    good = [row("maths/1", 0.0, 0), row("maths/1", 0.25, 1), row("code/1", 0.75, 3), row("code/1", 1.0, 4)]
    panel = foresight_panel(good, cells, {"maths": 1, "code": 2})
    assert panel is not None and panel["groups"] == 4
    assert panel["spearman"] == pytest.approx(1.0) and panel["ece"] == pytest.approx(0.0)
    bad = foresight_panel([r | {"expected": 1 - r["expected"]} for r in good], cells, {})
    assert bad is not None and bad["spearman"] == pytest.approx(-1.0) and bad["ece"] == pytest.approx(0.75)


def test_groups_that_nobody_could_grade_are_no_test_of_a_forecast() -> None:
    assert foresight_panel([row("maths/1", 0.5, 0, total=0)], {"maths/1": "maths"}, {}) is None
    assert foresight_panel([], {}, {}) is None
