"""Which posteriors are put to the test: from the hardest to the easiest, evenly, of what was tried."""

from __future__ import annotations

import pytest

from pipeline.calibrate_difficulty import evenly_chosen
from pipeline.config import GeneratedTasks, OnlineRlStage
from pipeline.task_pool import Pool, curriculum_of
from rl.curriculum import Curriculum
from rl.difficulty import Observation


def tried(passes: dict[str, int]) -> Curriculum:
    cells = {name: ("maths", level) for level, name in enumerate("abcdefgh", start=1)}
    rules = {"ordered_levels": False}  # these are not
    stage = OnlineRlStage(name="climb", kind="online_rl", policy="x", tasks=GeneratedTasks(), curriculum=rules)
    chooser = curriculum_of(stage, Pool(cells=cells, task_of=lambda *_: None), _Context(), lambda task: True)  # type: ignore[arg-type, return-value]
    chooser.difficulty.learn(0, [Observation(name, count, 16, 0) for name, count in passes.items()])
    return chooser


class _Context:
    seed = 1


def test_they_span_what_was_tried() -> None:
    chooser = tried({"b": 16, "c": 0, "d": 8, "e": 4, "f": 12})
    assert list(evenly_chosen(chooser, 3)) == ["c", "d", "b"]
    assert evenly_chosen(chooser, 3)["d"] == pytest.approx(9 / 18)
    assert list(evenly_chosen(chooser, 99)) == ["c", "e", "d", "f", "b"]
    assert evenly_chosen(chooser, 1) and not evenly_chosen(tried({}), 5)
