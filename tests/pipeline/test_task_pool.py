"""What stage 2 draws from, and what a recipe makes of its curriculum."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from stages import asked, fits, stage

from pipeline.config import DatasetTasks, EvaluateStage, GeneratedTasks, OnlineRlStage
from pipeline.data import Example, write_examples
from pipeline.errors import DataError
from pipeline.task_pool import (
    Pool,
    cells_of,
    curriculum_of,
    curriculum_rules,
    held_out_prompts,
    judged_rates,
    task_pool,
)
from rewards.task import Task, split_of


def test_generated_tasks_of_every_slot_and_turn_are_their_own() -> None:
    pool = task_pool(GeneratedTasks(domains=["maths"], levels=(3, 4)), 7, lambda task: True)
    assert pool.endless and pool.cells == {"maths/3": ("maths", 3), "maths/4": ("maths", 4)}
    ids = {pool.task_of("maths/3", slot, turn).task_id for slot in range(5) for turn in range(4)}
    assert len(ids) == 20
    assert pool.task_of("maths/3", 2, 1) == pool.task_of("maths/3", 2, 1)
    assert pool.task_of("maths/3", 2, 0).task_id == f"maths/3/train/{7 * 1_000_003 + 2}"


def test_generated_tasks_that_leave_no_room_are_drawn_again_and_levels_of_such_left_out() -> None:
    source = GeneratedTasks(domains=["maths"], levels=(2, 8))

    def short(task: Task) -> bool:
        return len(task.prompt) < 27

    free, pool = task_pool(source, 7, fits), task_pool(source, 7, short)
    assert 0 < pool.num_too_long < 7 and len(pool.cells) == 7 - pool.num_too_long
    drawn = {(name, slot): pool.task_of(name, slot, 0) for name in pool.cells for slot in range(40)}
    assert all(short(task) and task.level == pool.cells[name][1] for (name, _), task in drawn.items())
    first = {key: free.task_of(*key, 0) for key in drawn}
    redrawn = [key for key in drawn if drawn[key] != first[key]]
    assert redrawn and not any(short(first[key]) for key in redrawn), "what fits stays what it was"
    assert task_pool(source, 7, lambda task: False).cells == {}


def test_one_id_for_two_prompts_is_refused_and_one_prompt_twice_is_one(tmp_path: Path) -> None:
    prompts = [f"what is {i}?" for i in range(40)]
    one, other = [prompt for prompt in prompts if split_of(prompt) == "train"][:2]
    path = tmp_path / "some.jsonl"
    source = DatasetTasks(dataset=str(path), format="examples")
    write_examples(path, [Example(replace(asked(prompt), task_id="x"), "") for prompt in (one, one)])
    pool = task_pool(source, 1, fits)
    assert (len(pool.cells), pool.num_too_long) == (1, 0)
    write_examples(path, [Example(replace(asked(prompt), task_id="x"), "") for prompt in (one, other)])
    with pytest.raises(DataError, match=r"some\.jsonl: task_id 'x' stands for two prompts"):
        task_pool(source, 1, fits)


def test_prompts_of_a_data_set_are_entries_of_one_cell(tmp_path: Path) -> None:
    rows = [{"prompt": f"what is {i}?", "answer": str(i)} for i in range(40)]
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = DatasetTasks(dataset=str(tmp_path / "some.jsonl"), format="prompt_answer")
    pool = task_pool(source, 1, lambda task: task.prompt != "what is 1?")
    assert not pool.endless and set(pool.cells.values()) == {("reasoning", 0)} and pool.num_too_long in (0, 1)
    name = next(iter(pool.cells))
    assert pool.task_of(name, 0, 0) is pool.task_of(name, 9, 2) and pool.tasks[name].prompt.startswith("what is")


def test_floors_of_more_domains_than_there_is_room_for_are_refused_by_name() -> None:
    pool = Pool(cells={f"p{i}": (f"domain {i}", 1) for i in range(11)}, task_of=lambda *_: None)
    context = SimpleNamespace(inputs={}, seed=1)
    with pytest.raises(DataError, match=r"climb\.curriculum\.domain_floor: 0\.1 for each .* 11 domains .* 0\.09$"):
        curriculum_of(stage(), pool, context, fits)
    assert curriculum_of(stage(domain_floor=0.09), pool, context, fits).mix.floor == 0.09


def test_prompts_near_any_held_out_one_are_kept_out_however_few_are_evaluated(tmp_path: Path) -> None:
    rows = [{"prompt": f"what is {i}?", "answer": str(i)} for i in range(40)]
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = DatasetTasks(dataset=str(tmp_path / "some.jsonl"), format="prompt_answer", split="held_out", limit=1)
    score = EvaluateStage(name="score", kind="evaluate", policies=["climb"], tasks=tasks)
    context = SimpleNamespace(recipe=SimpleNamespace(stages=[stage(), score]), seed=1)
    expected = {row["prompt"] for row in rows if split_of(row["prompt"]) == "held_out"}
    assert set(held_out_prompts(context)) == expected and len(expected) > 1


def test_prompts_of_unknown_level_are_told_apart_by_length() -> None:
    def of_length(length: int, level: int = 0, domain: str = "maths") -> Task:
        return replace(asked("x" * length), task_id=f"{domain}{level}/{length}", level=level, domain=domain)

    tasks = [of_length(n) for n in range(1, 101)] + [of_length(7, level=3)] + [of_length(n, 0, "code") for n in (1, 90)]
    pool = Pool(
        cells={one.task_id: (one.domain, one.level) for one in tasks}, task_of=lambda *_: None,
        tasks={one.task_id: one for one in tasks},
    )  # fmt: skip
    cells = cells_of(pool, 4)
    assert [cells[f"maths0/{n}"][1] for n in (1, 25, 26, 50, 51, 75, 76, 100)] == [-1, -1, -2, -2, -3, -3, -4, -4]
    assert cells["maths3/7"] == ("maths", 3) and cells["code0/1"] == cells["code0/90"] == ("code", 0), "too few"
    assert set(cells_of(pool, 99).values()) >= {("maths", -5)} and ("maths", -6) not in cells_of(pool, 99).values()
    assert cells_of(pool, 1) == pool.cells
    chosen = curriculum_of(stage(length_classes=4), pool, SimpleNamespace(inputs={}, seed=1), fits)
    assert chosen.entries.cells[0] == ("maths", -1) and not chosen.entries.ladders, "a class is no rung"


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


def test_a_group_has_an_answer_more_than_the_k_of_its_advantage() -> None:
    section = stage().model_dump() | {"objective": {"advantage": "pass_at_k", "pass_at_k": 4}}
    assert curriculum_rules(OnlineRlStage(**section)).smallest_group == 5
    assert curriculum_rules(stage()).smallest_group == 2


def test_the_control_arm_knows_no_difficulty() -> None:
    assert curriculum_rules(stage(sampler="uniform")).difficulty.retire_above is None
    rules = curriculum_rules(stage(sampler="thompson", band=(0.3, 0.7)))
    assert rules.difficulty.retire_above == 0.9 and rules.band == (3 / 8, 5 / 8)
