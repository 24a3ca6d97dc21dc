"""What every step of stage 2 leaves behind, and what a kill undoes of it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
from stages import asked, fits, stage

from pipeline.step_log import StepLog, rows_up_to
from pipeline.task_pool import Pool, curriculum_of
from rewards.task import Task
from rl.gates import Outcome
from rl.loop import StepRecord
from rl.types import Rollout, RolloutGroup, SampledAnswer


def test_rows_after_the_last_state_are_undone_and_a_torn_line_with_them(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3)) + '{"step": 4, "lo')
    assert rows_up_to(path, 2) == [{"step": 1}, {"step": 2}]
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert rows_up_to(tmp_path / "new.jsonl", 0) == [] and (tmp_path / "new.jsonl").read_text() == ""


def group(slot: str, scores) -> RolloutGroup:
    task = Task(task_id=f"t{slot}", domain="maths", level=2, prompt="1+1", verifier="number", check={"answer": "2"})
    answer = SampledAnswer(token_ids=[4, 5], logprobs=[-0.1, -0.2], versions=[3, 3], finish_reason="stop")
    rollouts = [Rollout(task=task, group_id=slot, answer=answer, text="", score=s, reason="") for s in scores]
    return RolloutGroup(group_id=slot, task=task, prompt_ids=[1], rollouts=rollouts, leased_at_version=3)


@pytest.mark.parametrize("cells", [{"maths/2": ("maths", 2)}, {"p0": ("maths", 2), "p1": ("maths", 2)}])
def test_a_step_leaves_its_rollouts_what_its_groups_said_and_the_posteriors(tmp_path: Path, cells) -> None:
    tasks = {} if "maths/2" in cells else dict.fromkeys(cells, asked("1+1"))
    pool = Pool(cells=cells, task_of=lambda *_: None, tasks=tasks)
    curriculum = curriculum_of(stage(gate="dapo", decay=1.0), pool, SimpleNamespace(inputs={}, seed=1), fits)
    (turns,) = curriculum.plan(range(1))
    seen = [
        Outcome(slot=0, turn=0, choice=turns[0], passes=0, total=2, version=3, answers=2, tokens=4, trained_tokens=0,
                kept=False),
        Outcome(slot=0, turn=1, choice=turns[1], passes=1, total=2, version=4, answers=2, tokens=4, trained_tokens=4,
                kept=True),
    ]  # fmt: skip
    curriculum.learn(5, seen, turns)
    told = []
    context = SimpleNamespace(
        work=tmp_path, scratch=tmp_path / ".resume", progress=lambda *args, **rates: told.append(rates)
    )
    log = StepLog(context, 9)
    metrics = {"pass_rate": 0.25, "tokens_per_s": 9.0, "step": 5, "groups_lost": {}, "generated_tokens": 8, "groups": 2,
               "trained_tokens": 4, "zero_signal_groups": 1, "discarded_tokens": 4, "empty_slots": 0, "ungraded": 0,
               "states": {"active": 1}}  # fmt: skip
    log.write(
        StepRecord(
            step=5, metrics=metrics, groups=[group("0.1", [1.0, 0.0])], discarded=[group("0", [0.0, 0.0])],
            outcomes=seen, renewed=[], curriculum=curriculum,
        )
    )  # fmt: skip
    log.close()
    log.finish()
    rows = pq.read_table(tmp_path / "rollouts.parquet", columns=["group_id", "step"]).to_pylist()
    assert [(row["group_id"], row["step"]) for row in rows] == [("0.1", 5), ("0.1", 5), ("0", 0), ("0", 0)]
    observations = [json.loads(line) for line in (tmp_path / "observations.jsonl").read_text().splitlines()]
    assert [(row["turn"], row["version"], row["passes"], row["total"], row["kept"]) for row in observations] == [
        (0, 3, 0, 2, False), (1, 4, 1, 2, True)
    ]  # fmt: skip
    assert observations[0]["entry"] in cells and observations[0]["expected"] == 0.5
    posteriors = [json.loads(line) for line in (tmp_path / "curriculum.jsonl").read_text().splitlines()]
    cell = next(row for row in posteriors if row["cell"] == "maths/2")
    assert (cell["step"], cell["sampled"], cell["alpha"], cell["beta"]) == (5, 2, 2.0, 4.0)
    states = [row for row in posteriors if "state" in row]
    assert {row["cell"] for row in states} == ({turns[0].entry, turns[1].entry} if tasks else {"maths/2"})
    assert log.summary()["tokens_discarded"] == 4 and log.summary()["signal_share"] == 0.5
    for _ in range(2):  # lost twice, and both times again by the run that goes on
        log = StepLog(context, 9, after=4)
        for _ in range(2):
            log.write_lost(group("7.1", [None, None]))
        log.close()
    parts = {path.stem: pq.read_table(path).num_rows for path in (tmp_path / ".resume" / "rollouts").iterdir()}
    assert parts == {"lost-7.1-1": 2, "lost-7.1-2": 2}
    resumed = StepLog(context, 9, after=4)
    resumed.close()
    assert (tmp_path / "observations.jsonl").read_text() == "", "undone with its step"
