"""Stage 2 when its processes die or stop answering: real engines, a real learner, real signals."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml
from real_runs import ROOT, at_step, complete, events, kill, start, wait_for

GROUPS, STEPS = 2, 30


def recipe(tmp_path: Path, **stage: Any) -> tuple[Path, Path]:
    """(recipe, run directory) of a short stage 2."""
    climb = {
        "name": "climb", "kind": "online_rl", "policy": f"{ROOT / 'recipes' / 'tiny_base'}/",
        "tasks": {"domains": ["maths"], "levels": [1, 3]}, "steps": STEPS, "groups_per_step": GROUPS, "group_size": 8,
        "max_staleness": 1, "max_answer_tokens": 48, "save_every_steps": 2, "warmup_steps": 1,
    } | stage  # fmt: skip
    path, run_dir = tmp_path / "recipe.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump({"run": {"name": "recovery", "dir": str(run_dir), "seed": 5}, "stages": [climb]}))
    return path, run_dir


def pid_of(run_dir: Path, actor: str) -> int:
    return [event["pid"] for event in events(run_dir) if event.get("actor") == actor and "pid" in event][-1]


def test_a_killed_generator_is_replaced_and_a_killed_run_goes_on_with_every_task_once(tmp_path: Path) -> None:
    path, run_dir = recipe(tmp_path)
    log, began = tmp_path / "log.txt", time.time()
    process = start("run", str(path), log=log)
    wait_for(process, run_dir, at_step(3), after=began, log=log)
    os.kill(pid_of(run_dir, "generator-0"), signal.SIGKILL)
    died = wait_for(process, run_dir, lambda event: event["event"] == "generator_died", after=began, log=log)
    up = wait_for(process, run_dir, lambda event: event["event"] == "generator_up", after=died["time"], log=log)
    assert up["incarnation"] == 1
    told = died["reason"].split("\n")[0]  # to people and in metrics
    assert told in {f"actor generator-0 died during {call}" for call in ("sample", "take_weights")}
    wait_for(process, run_dir, at_step(7), after=up["time"], log=log)
    kill(process)  # the whole run, with -9
    assert not (run_dir / "climb").exists()
    second = time.time()
    assert complete("run", str(path), log=log) == 0, log.read_text()[-3000:]
    notes = [event["text"] for event in events(run_dir) if event["event"] == "note" and event["time"] > second]
    assert any(note.startswith("resumed after step") for note in notes), notes
    steps = [json.loads(line) for line in (run_dir / "climb" / "steps.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == list(range(1, STEPS + 1))
    rollouts = pq.read_table(run_dir / "climb" / "rollouts.parquet", columns=["group_id", "step"]).to_pylist()
    trained = [row["group_id"] for row in rollouts if row["step"]]
    assert sorted(trained, key=int) == [str(slot) for slot in range(GROUPS * STEPS) for _ in range(8)]
    assert all(int(row["group_id"]) // GROUPS == row["step"] - 1 for row in rollouts if row["step"])
    assert not (run_dir / "climb" / "state").exists() and not (run_dir / "climb" / "rollouts").exists()


def test_a_learner_that_stops_answering_ends_the_run_by_name_within_its_deadline(tmp_path: Path) -> None:
    path, run_dir = recipe(tmp_path, deadline_s=10.0)
    log, began = tmp_path / "log.txt", time.time()
    process = start("run", str(path), log=log)
    wait_for(process, run_dir, at_step(2), after=began, log=log)
    os.kill(pid_of(run_dir, "climb-learner-0"), signal.SIGSTOP)
    assert process.wait(timeout=60) == 4
    assert re.search(r"climb-learner-0: (step|save_state) did not answer within 10 s", log.read_text())
