"""How true the curriculum's posteriors are at the end of a run: each against a fresh pass rate of the final policy.

Called by `pipeline/online_rl.py`, once the last step is taken. Writes `calibration.json`: of each entry asked, the pass
rate expected of the final policy and what came. Nobody trains on the answers: an entry that is a prompt is asked
FRESH_ANSWERS times, a (domain, level) by FRESH_TASKS of its tasks with seeds that no run draws, a part each.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config import EvaluateStage, OnlineRlStage
from pipeline.evaluate import PASSED, Examination, Pace
from pipeline.rank_correlation import calibration_error, spearman
from pipeline.stage import StageContext
from rewards.sandbox import Sandbox
from rewards.task import Task
from rl.curriculum import Curriculum

FRESH_ANSWERS, FRESH_TASKS = 64, 16
FIRST_FRESH = 2**50  # slots of fresh tasks: beyond those of any run, within the first turn's
CALIBRATION = "calibration.json"


def calibrate(
    context: StageContext, curriculum: Curriculum, task_of: Callable[[str, int, int], Task], checkpoint: Path,
    sandbox: Sandbox,
) -> dict[str, Any]:  # fmt: skip
    """Ask the final policy; leaves CALIBRATION and returns its figures without the entries."""
    stage = context.stage
    assert isinstance(stage, OnlineRlStage)
    expected = evenly_chosen(curriculum, stage.curriculum.calibrate_entries)
    num_tasks = FRESH_TASKS if curriculum.entries.endless else 1
    tasks = {name: [task_of(name, FIRST_FRESH + i, 0) for i in range(num_tasks)] for name in expected}
    examined = EvaluateStage(
        name=stage.name, kind="evaluate", policies=[stage.name], tasks=stage.tasks, k=[1],
        samples=FRESH_ANSWERS // num_tasks, max_answer_tokens=stage.max_answer_tokens, temperature=stage.temperature,
        dtype=stage.dtype,
    )  # fmt: skip
    asking = replace(context, stage=examined)
    pace = Pace(asking, total=len(expected) * FRESH_ANSWERS, policy="calibration")
    answers = Examination(asking, stage.name, checkpoint, sandbox, pace).answers(
        [t for some in tasks.values() for t in some]
    )
    scores = defaultdict(list)
    for answer in answers:
        if answer.score is not None:
            scores[answer.task_id].append(answer.score >= PASSED)
    rows: list[dict[str, Any]] = []
    for name, rate in expected.items():
        seen = [right for task in tasks[name] for right in scores[task.task_id]]
        if seen:
            rows.append({"entry": name, "domain": curriculum.domain_of(name), "expected": round(rate, 4),
                         "passes": sum(seen), "total": len(seen)})  # fmt: skip
    pairs = [(row["expected"], row["passes"] / row["total"]) for row in rows]
    figures = {
        "entries": len(rows),
        "spearman": spearman([expected for expected, _ in pairs], [seen for _, seen in pairs]),
        "ece": calibration_error(pairs),
    }
    (context.work / CALIBRATION).write_text(json.dumps(figures | {"rows": rows}, indent=1))
    return figures


def evenly_chosen(curriculum: Curriculum, count: int) -> dict[str, float]:
    """Entry → pass rate expected, of `count` that were tried, evenly from the hardest to the easiest."""
    (tried,) = np.nonzero(curriculum.difficulty.tried)
    mean = curriculum.difficulty.mean(tried)
    order = np.argsort(mean, kind="stable")
    places = np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int)
    return {curriculum.entries.names[tried[order[i]]]: float(mean[order[i]]) for i in places}
