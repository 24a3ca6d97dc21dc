"""What was expected against what came, by hand."""

from __future__ import annotations

import pytest

from pipeline.report_difficulty import foresight_panel


def row(entry: str, expected: float, passes: int, total: int = 4) -> dict:
    return {"step": 1, "entry": entry, "expected": expected, "passes": passes, "total": total}


def test_a_perfect_forecast_and_its_opposite() -> None:
    cells = {"maths/1": "maths", "code/1": "code"}
    good = [row("maths/1", 0.0, 0), row("maths/1", 0.25, 1), row("code/1", 0.75, 3), row("code/1", 1.0, 4)]
    panel = foresight_panel(good, None, cells, {"maths": 1, "code": 2})
    assert panel is not None and panel["groups"] == 4
    assert panel["spearman"] == pytest.approx(1.0) and panel["ece"] == pytest.approx(0.0)
    bad = foresight_panel([r | {"expected": 1 - r["expected"]} for r in good], None, cells, {})
    assert bad is not None and bad["spearman"] == pytest.approx(-1.0) and bad["ece"] == pytest.approx(0.75)


def test_groups_that_nobody_could_grade_are_no_test_of_a_forecast() -> None:
    assert foresight_panel([row("maths/1", 0.5, 0, total=0)], None, {"maths/1": "maths"}, {}) is None
    assert foresight_panel([], None, {}, {}) is None


def test_posteriors_put_to_the_test_are_a_plot_of_their_own() -> None:
    rows = [{"entry": "maths/1", "domain": "maths", "expected": 0.9, "passes": 60, "total": 64}]
    calibration = {"entries": 1, "spearman": None, "ece": 0.0375, "rows": rows}
    panel = foresight_panel([row("maths/1", 0.5, 2)], calibration, {"maths/1": "maths"}, {"maths": 1})
    assert panel is not None and len(panel["figures"]) == 2
    assert panel["fresh"] == {"entries": 1, "spearman": None, "ece": 0.0375, "answers": 64}
