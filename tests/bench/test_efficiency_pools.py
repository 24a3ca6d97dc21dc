"""What the pools of the efficiency bench are made of, without a model: pass rates are given."""

import json
import sys
from collections import Counter
from pathlib import Path

import pytest

from pipeline.data import read_examples
from rewards.task import split_of

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture
def pools(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(BENCH)])  # behind ours: bench/model.py is another `model`
    import efficiency_pools

    yield efficiency_pools
    for name in ("efficiency_pools", "pinned_run", "worked_answers"):
        sys.modules.pop(name)


def measured(folder, rates):
    cells = {cell: {"1": {"value": rate}} for cell, rate in rates.items()}
    place = folder / "start" / "run" / "rates"
    place.mkdir(parents=True)
    (place / "results.json").write_text(json.dumps({"policies": [{"cells": cells}]}))


def cells_of(path):
    return Counter(f"{example.task.domain}/{example.task.level}" for example in read_examples(path))


def test_nine_prompts_in_ten_of_the_dead_pool_are_hopeless_and_levels_of_a_kind_are_equal(pools, tmp_path, monkeypatch):
    monkeypatch.setattr(pools, "POOL_PROMPTS", 200)
    measured(
        tmp_path, {"maths/2": 0.5, "code/3": 0.1, "maths/20": 0.0, "code/22": 0.029, "maths/1": 0.98, "code/9": 0.05}
    )
    dead, filtered = pools.pool_file(tmp_path, "dead"), pools.pool_file(tmp_path, "filtered")
    assert cells_of(dead) == {"maths/2": 10, "code/3": 10, "maths/20": 60, "code/22": 60, "maths/1": 60}
    assert cells_of(filtered) == {"maths/2": 100, "code/3": 100}  # 0.05 is neither
    prompts = [example.task.prompt for example in read_examples(dead)]
    assert len(set(prompts)) == len(prompts) and {split_of(prompt) for prompt in prompts} == {"train"}
    shape = pools.shape(tmp_path, "dead")
    assert shape["shares"] == {"0–0.03": 0.6, "0.1–0.3": 0.05, "0.5–0.7": 0.05, "0.97–1": 0.3}
    assert shape["prompts_and_live"] == {"code": [70, 10], "maths": [130, 10]}


def test_without_labels_the_same_prompts_can_be_checked_as_before(pools, tmp_path, monkeypatch):
    monkeypatch.setattr(pools, "POOL_PROMPTS", 20)
    measured(tmp_path, {"maths/2": 0.5, "code/3": 0.1})
    labelled = read_examples(pools.pool_file(tmp_path, "filtered"))
    bare = read_examples(pools.pool_file(tmp_path, "filtered", labels=False))
    assert {(one.task.domain, one.task.level) for one in bare} == {("all", 0)}
    parts = [[(one.task.prompt, one.task.verifier, one.task.check) for one in some] for some in (labelled, bare)]
    assert parts[0] == parts[1] and len(bare) == 20


def test_what_is_taught_is_not_trained_on_and_nothing_held_out_is_either(pools, tmp_path, monkeypatch):
    monkeypatch.setattr(pools, "GYM_TAUGHT", 500)
    pools.gym_source(tmp_path).write_bytes((BENCH.parent / "recipes" / "reasoning_gym.jsonl.gz").read_bytes())
    pools.gym_start(tmp_path)
    taught = read_examples(tmp_path / "start_gym" / "taught.jsonl.gz")
    trained = read_examples(pools.pool_path(tmp_path, "gym"))
    prompts = [{example.task.prompt for example in some} for some in (taught, trained)]
    assert len(prompts[0]) == 500 < len(prompts[1]) and not prompts[0] & prompts[1]
    assert {split_of(prompt) for prompt in prompts[0] | prompts[1]} == {"train"}
    assert any(example.answer.count("\n") > 2 for example in taught)  # worked
    files = tmp_path / "start_gym" / "taught.jsonl.gz", pools.pool_path(tmp_path, "gym")
    before = [path.read_bytes() for path in files]
    pools.gym_start(tmp_path)  # again: a run that goes on finds the same files
    assert before == [path.read_bytes() for path in files]


def test_held_out_tasks_are_as_many_from_every_level(pools, tmp_path):
    assert pools.held_out(tmp_path, "dead", 240)["tasks_per_level"] == 6
    assert pools.held_out(tmp_path, "filtered", 120)["tasks_per_level"] == 3
    gym = pools.held_out(tmp_path, "gym", 120)
    assert (gym["limit"], gym["split"], gym["dataset"]) == (120, "held_out", str(tmp_path / "gym.jsonl.gz"))
