"""A curriculum in full on the real engine: a pool that grows, groups in parts and of different sizes, states, floors.
Killed in the middle and resumed, it ends with the bits of the run that nobody disturbed."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import yaml
from real_runs import ROOT, at_step, complete, events, start, wait_for

from pipeline.data import Example, write_examples
from rewards.domains import generate
from rewards.task import split_of

BASE = ROOT / "recipes" / "tiny_base"
STEPS = 4


def write_recipe(folder: Path) -> tuple[Path, Path]:
    """(recipe, run directory)"""
    folder.mkdir(exist_ok=True)
    pool = [Example(generate(domain, level, seed, "train"), "") for domain in ("maths", "code") for level in (1, 2, 3)
            for seed in range(8)]  # fmt: skip
    write_examples(folder.parent / "pool.jsonl.gz", pool)
    climb = {
        "name": "climb", "kind": "online_rl", "policy": f"{BASE}/", "steps": STEPS, "groups_per_step": 3,
        "group_size": 8, "max_staleness": 0, "max_answer_tokens": 48, "save_every_steps": 1, "warmup_steps": 1,
        "learning_rate": 4e-4, "checkpoint_every_steps": 2, "updates_per_step": 2, "last_rate_share": 0.5,
        "tasks": {"dataset": str(folder.parent / "pool.jsonl.gz"), "format": "examples"},
        "curriculum": {
            "sampler": "thompson", "gate": "speed", "allocator": "knapsack", "largest_group": 16,
            "calibrate_entries": 4, "retest_every_steps": 2, "band": [0.7, 0.95], "prefix_share": 0.9,
            "renew": {"every_steps": 2, "prompts": 6, "synthetic_share": 0.5},
        },
    }  # fmt: skip
    held_out = {"domains": ["maths"], "levels": [1, 2], "tasks_per_level": 2, "split": "held_out"}
    score = {"name": "score", "kind": "evaluate", "policies": ["climb"], "tasks": held_out, "k": [1], "samples": 2}
    path, run_dir = folder / "recipe.yaml", folder / "run"
    run = {"name": "curriculum", "dir": str(run_dir), "seed": 5}
    path.write_text(yaml.safe_dump({"run": run, "stages": [climb, score]}))
    return path, run_dir


def outputs(run_dir: Path) -> dict[str, Any]:
    """Digests of what a stage left, but for the log with its times."""
    manifest = json.loads((run_dir / "climb" / "manifest.json").read_text())["outputs"]
    return {name: digest for name, digest in manifest.items() if name != "steps.jsonl"}


def test_killed_in_the_middle_of_its_curriculum_it_ends_with_the_same_bits(tmp_path: Path) -> None:
    path, whole = write_recipe(tmp_path / "whole")
    log = tmp_path / "log.txt"
    assert complete("run", str(path), log=log) == 0, log.read_text()[-3000:]

    path, killed = write_recipe(tmp_path / "killed")
    began = time.time()
    process = start("run", str(path), log=log)
    wait_for(process, killed, at_step(2), after=began, log=log)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    assert complete("run", str(path), log=log) == 0, log.read_text()[-3000:]
    assert sum("resumed after step" in event.get("text", "") for event in events(killed)) >= 1
    assert outputs(killed) == outputs(whole)

    climb = whole / "climb"
    renewed = [json.loads(line) for line in (climb / "renewed.jsonl").read_text().splitlines()]
    assert renewed and {split_of(row["task"]["prompt"]) for row in renewed} == {"train"}
    assert sum(event["event"] == "pool_renewed" for event in events(whole)) >= 1
    asked = [json.loads(line)["entry"] for line in (climb / "observations.jsonl").read_text().splitlines()]
    assert len(set(asked)) > 1
    sizes = {json.loads(line)["size"] for line in (climb / "observations.jsonl").read_text().splitlines()}
    assert len(sizes) > 1, "the knapsack gave everybody the same"
    steps = [json.loads(line) for line in (climb / "steps.jsonl").read_text().splitlines()]
    assert sum(step["groups_begun"] for step in steps) > 0, "no answer went on from an earlier one"
    assert steps[-1]["learning_rate"] == 4e-4 / 2 and all("last_clip_share" in step for step in steps)
    calibration = json.loads((climb / "calibration.json").read_text())
    assert calibration["entries"] == 4 and all(row["total"] == 64 for row in calibration["rows"])
    kept = {path.name for path in (climb / "checkpoints").iterdir()}
    assert kept == {"step-000002", "step-000004"}
    last = (climb / "checkpoints" / "step-000004" / "model.safetensors").read_bytes()
    assert last == (climb / "checkpoint" / "model.safetensors").read_bytes()
