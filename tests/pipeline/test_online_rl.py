"""What stage 2 finds in its folder when it goes on after a kill, what it draws from, and what it writes down. The stage
itself runs in tests/integration."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import DatasetTasks, GeneratedTasks, OnlineRlStage
from pipeline.online_rl import (
    Pool,
    StepLog,
    _remove_remains,
    _rows_up_to,
    curriculum_of,
    curriculum_rules,
    judged_rates,
    task_pool,
)
from rewards.task import Task
from rl.gates import Outcome
from rl.loop import StepRecord
from rl.types import Rollout, RolloutGroup, SampledAnswer


def test_only_what_a_run_goes_on_from_is_kept(tmp_path: Path) -> None:
    for folder in (".resume", "checkpoint"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "file").touch()
    for file in ("steps.jsonl", "curriculum.jsonl", "observations.jsonl", "rollouts.parquet"):
        (tmp_path / file).touch()
    _remove_remains(tmp_path)
    kept = {".resume", "steps.jsonl", "curriculum.jsonl", "observations.jsonl"}
    assert {path.name for path in tmp_path.iterdir()} == kept


def test_rows_after_the_last_state_are_undone_and_a_torn_line_with_them(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3)) + '{"step": 4, "lo')
    assert _rows_up_to(path, 2) == [{"step": 1}, {"step": 2}]
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert _rows_up_to(tmp_path / "new.jsonl", 0) == [] and (tmp_path / "new.jsonl").read_text() == ""


# --- what is drawn from ---------------------------------------------------------------------------------------------


def stage(**curriculum) -> OnlineRlStage:
    tasks = curriculum.pop("tasks", {"levels": (1, 3)})
    section = {"tasks": tasks, "group_size": 8, "curriculum": curriculum}
    return OnlineRlStage(name="climb", kind="online_rl", policy="base", **section)


def test_generated_tasks_of_every_slot_and_turn_are_their_own() -> None:
    pool = task_pool(GeneratedTasks(domains=["maths"], levels=(3, 4)), 7, lambda task: True)
    assert pool.endless and pool.cells == {"maths/3": ("maths", 3), "maths/4": ("maths", 4)}
    ids = {pool.task_of("maths/3", slot, turn).task_id for slot in range(5) for turn in range(4)}
    assert len(ids) == 20
    assert pool.task_of("maths/3", 2, 1) == pool.task_of("maths/3", 2, 1)
    assert pool.task_of("maths/3", 2, 0).task_id == f"maths/3/train/{7 * 1_000_003 + 2}"


def test_prompts_of_a_data_set_are_entries_of_one_cell(tmp_path: Path) -> None:
    rows = [{"prompt": f"what is {i}?", "answer": str(i)} for i in range(40)]
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = DatasetTasks(dataset=str(tmp_path / "some.jsonl"), format="prompt_answer")
    pool = task_pool(source, 1, lambda task: task.prompt != "what is 1?")
    assert not pool.endless and set(pool.cells.values()) == {("reasoning", 0)} and pool.num_too_long in (0, 1)
    name = next(iter(pool.cells))
    assert pool.task_of(name, 0, 0) is pool.task_of(name, 9, 2) and pool.tasks[name].prompt.startswith("what is")


def test_a_judges_scores_become_pass_rates(tmp_path: Path) -> None:
    """By prompt, else by domain and level; what could not be judged says nothing."""
    rows = [("maths", 1, "a", 1.0), ("maths", 1, "b", 4.0), ("maths", 2, "c", 5.0), ("code", 1, "d", None)]
    columns = dict(zip(("domain", "level", "prompt", "score"), map(list, zip(*rows))))
    pq.write_table(pa.table(columns), tmp_path / "verdicts.parquet")
    levels = Pool(
        cells={"maths/1": ("maths", 1), "maths/2": ("maths", 2), "code/1": ("code", 1)}, task_of=lambda *_: None
    )
    assert judged_rates(levels, tmp_path / "verdicts.parquet") == {"maths/1": (1.0 + 0.25) / 2, "maths/2": 0.0}
    prompts = Pool(
        cells={"p0": ("maths", 1), "p1": ("maths", 1), "p2": ("maths", 9)}, task_of=lambda *_: None,
        tasks={"p0": asked("b"), "p1": asked("never judged"), "p2": asked("never judged either")},
    )  # fmt: skip
    assert judged_rates(prompts, tmp_path / "verdicts.parquet") == {"p0": 0.25, "p1": 0.625}
    context = SimpleNamespace(inputs={"keep": tmp_path}, seed=1)
    chosen = curriculum_of(stage(judge="keep", judge_strength=10.0), levels, context, fits)
    assert list(zip(*chosen.difficulty.posterior(chosen.entries.cell))) == [(7.25, 4.75), (1.0, 11.0), (1.0, 1.0)]


def test_the_control_arm_knows_no_difficulty() -> None:
    assert curriculum_rules(stage(sampler="uniform")).difficulty.retire_above is None
    rules = curriculum_rules(stage(sampler="thompson", band=(0.3, 0.7)))
    assert rules.difficulty.retire_above == 0.9 and rules.band == (3 / 8, 5 / 8)


# --- what is written down -------------------------------------------------------------------------------------------


def asked(prompt: str) -> Task:
    return Task(task_id=prompt, domain="maths", level=2, prompt=prompt, verifier="number", check={"answer": "2"})


def fits(task: Task) -> bool:
    return True


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
    log = StepLog(context, 9, pool)
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
    resumed = StepLog(context, 9, pool, after=4)
    resumed.close()
    assert (tmp_path / "observations.jsonl").read_text() == "", "undone with its step"
