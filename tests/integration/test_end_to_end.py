"""The smallest whole run, on real vLLM, Ray and TRL: killed in every stage, resumed, finished, repeated, looked at."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from real_runs import ROOT, complete, events, kill, processes_of, start, wait_for

from rl.health import DEFAULT_LIMITS

RECIPE = "recipes/smoke.yaml"
STAGES = ["seedling", "keep", "warm", "climb", "tidy", "score"]
STALE = "the report of an earlier run"
# A trainer's first progress may be its last second; that its process is up comes seconds before.
MIDDLE = {"seedling": "actor_started", "warm": "actor_started", "tidy": "actor_started"}
pytestmark = pytest.mark.timeout(1500)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run directory whose run was killed -9 in the middle of every stage and before its report, then finished."""
    run_dir = tmp_path_factory.mktemp("run") / "smoke"
    log = run_dir.parent / "log.txt"
    words = ("run", RECIPE, "--set", f"run.dir={run_dir}")
    for stage in STAGES:
        since = time.time()
        process = start(*words, log=log)

        def inside(event, stage=stage):
            return event.get("stage") == stage and event["event"] == MIDDLE.get(stage, "progress")

        wait_for(process, run_dir, inside, after=since, log=log)
        kill(process)
        assert not (run_dir / stage / "COMPLETE").exists(), f"{stage} was over before it could be killed"

    def last_is_over(event):
        return event.get("stage") == STAGES[-1] and event["event"] == "stage_completed"

    report = run_dir / "report.html"
    report.write_text(STALE)
    since = time.time()
    process = start(*words, log=log)
    wait_for(process, run_dir, last_is_over, after=since, log=log)
    kill(process)
    assert report.read_text() == STALE, "the report was written before the run could be killed"
    since = time.time()
    assert complete(*words, log=log) == 0, log.read_text()[-3000:]
    assert not [e for e in events(run_dir) if e["time"] >= since and e["event"] == "stage_started"]
    return run_dir, words, log


def test_every_stage_was_interrupted_and_is_complete_once(finished):
    run_dir, _, _ = finished
    counts = Counter((event["event"], event.get("stage")) for event in events(run_dir))
    for stage in STAGES:
        assert counts["stage_started", stage] >= 2, "the kill did not interrupt it"
        assert counts["stage_completed", stage] == 1
        assert (run_dir / stage / "COMPLETE").exists() and (run_dir / stage / "manifest.json").exists()
    assert not list(run_dir.glob("*.partial"))
    report = (run_dir / "report.html").stat()
    assert report.st_size > 10_000
    assert all(report.st_mtime_ns >= path.stat().st_mtime_ns for path in run_dir.glob("*/manifest.json"))


def test_at_least_half_was_pruned_and_every_verdict_has_a_reason(finished):
    import pyarrow.parquet as pq

    verdicts = pq.read_table(finished[0] / "keep" / "verdicts.parquet").to_pylist()
    assert sum(row["kept"] for row in verdicts) <= len(verdicts) / 2
    assert all(row["reason"] and row["decision_reason"] for row in verdicts)


def test_no_token_was_trained_on_beyond_the_staleness_bound(finished):
    import pyarrow.parquet as pq

    rollouts = pq.read_table(finished[0] / "climb" / "rollouts.parquet").to_pylist()
    steps = [json.loads(line) for line in (finished[0] / "climb" / "steps.jsonl").read_text().splitlines()]
    assert len(rollouts) == sum(step["groups"] for step in steps) * 8  # every rollout is logged
    for row in rollouts:
        assert len(row["token_versions"]) == len(row["answer_ids"]) == len(row["logprobs"])
        assert all(0 <= row["step"] - 1 - version <= 1 for version in row["token_versions"])
    assert {step["version"] for step in steps} == {1, 2, 3}


def test_engine_and_learner_agree_at_the_same_version(finished):
    steps = [json.loads(line) for line in (finished[0] / "climb" / "steps.jsonl").read_text().splitlines()]
    measured = [step["mismatch_k3"] for step in steps if "mismatch_k3" in step]
    # fp32 on both sides: 1e-9, or 1e-7 where one token's router, between two experts alike, falls the other way.
    # Weights that were not synced, or packed wrongly, are off by 0.1 and more (docs/log.md).
    assert measured and max(measured) < 1e-4


def test_every_health_limit_has_a_number_to_judge(finished):
    steps = [json.loads(line) for line in (finished[0] / "climb" / "steps.jsonl").read_text().splitlines()]
    measured = {name for step in steps for name in step}
    assert DEFAULT_LIMITS.keys() - measured == {"router/agreement"}  # only where routes are recorded


def test_the_same_command_again_does_no_work(finished):
    run_dir, words, log = finished
    before = {path: path.stat().st_mtime_ns for path in run_dir.glob("*/manifest.json")}
    begin = time.monotonic()
    out = subprocess.run(
        [sys.executable, "-X", "importtime", str(ROOT / "cli.py"), *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert time.monotonic() - begin < 10  # the promise itself, not a benchmark
    assert out.returncode == 0 and "nothing to do" in out.stdout.lower()
    assert "pass@1" in out.stdout and "pass@4" in out.stdout
    assert len(re.findall(r"\d\.\d{3} \(\d\.\d{3}–\d\.\d{3}\)", out.stdout)) == 8  # two k for each of four checkpoints
    assert not any(f" {heavy}\n" in out.stderr for heavy in ("torch", "ray", "vllm", "trl"))
    assert before == {path: path.stat().st_mtime_ns for path in run_dir.glob("*/manifest.json")}


def test_status_reads_the_run_from_its_folder(finished):
    out = subprocess.run(
        [sys.executable, str(ROOT / "cli.py"), "status", str(finished[0])],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert out.returncode == 0
    assert all(stage in out.stdout for stage in STAGES)


def test_the_last_checkpoint_loads_in_plain_transformers_and_plain_vllm(finished):
    """No Drover in the process: what is shipped must stand on its own."""
    script = """
import sys
checkpoint, kind = sys.argv[1], sys.argv[2]
messages = [{"role": "user", "content": "Compute 4+3."}]
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(checkpoint)
text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
ids = tokenizer.encode(text, add_special_tokens=False)
if kind == "transformers":
    import torch
    model, info = AutoModelForCausalLM.from_pretrained(checkpoint, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    out = model.generate(torch.tensor([ids]), max_new_tokens=48, do_sample=False)[0][len(ids):].tolist()
else:
    from vllm import LLM, SamplingParams
    llm = LLM(checkpoint, dtype="float32", enforce_eager=True, max_model_len=256)
    params = SamplingParams(temperature=0, max_tokens=48)
    out = llm.generate([{"prompt_token_ids": ids}], params)[0].outputs[0].token_ids
print("ANSWER", repr(tokenizer.decode(out, skip_special_tokens=True)))
"""
    answers = []
    for kind in ("transformers", "vllm"):
        out = subprocess.run(
            [sys.executable, "-c", script, str(finished[0] / "tidy" / "checkpoint"), kind],
            capture_output=True,
            text=True,
            timeout=300,
            cwd="/",
            env=plain_vllm_environment(),
        )
        assert out.returncode == 0, out.stderr[-3000:]
        answers += [line for line in out.stdout.splitlines() if line.startswith("ANSWER")]
    assert answers[0] == answers[1] and "Answer:" in answers[0]


def plain_vllm_environment() -> dict[str, str]:
    import os

    return os.environ | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "TORCH_COMPILE_DISABLE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }


def test_a_change_to_one_stage_runs_that_stage_and_what_follows(finished):
    run_dir, words, log = finished
    since = time.time()
    assert complete(*words, "--set", "stages.tidy.beta=0.2", log=log) == 0, log.read_text()[-3000:]
    started = [e["stage"] for e in events(run_dir) if e["time"] >= since and e["event"] == "stage_started"]
    assert started == ["tidy", "score"]


def test_a_killed_learner_ends_the_run_and_is_named(finished, tmp_path):
    run_dir, log = tmp_path / "smoke", tmp_path / "log.txt"
    words = ("run", RECIPE, "--set", f"run.dir={run_dir}", "--set", "stages.climb.steps=500")
    words += ("--set", "stages.climb.policy=recipes/tiny_base/", "--only", "climb")
    since = time.time()
    process = start(*words, log=log)
    wait_for(process, run_dir, lambda e: e["event"] == "progress", after=since, log=log)
    pid = next(e["pid"] for e in events(run_dir) if e["event"] == "actor_started" and "learner" in e["actor"])
    import os

    os.kill(pid, signal.SIGKILL)
    assert process.wait(timeout=120) == 4
    assert "climb-learner" in log.read_text()
    assert processes_of(run_dir) == []


def test_ctrl_c_stops_within_ten_seconds_and_leaves_nothing_behind(finished, tmp_path):
    run_dir, log = tmp_path / "smoke", tmp_path / "log.txt"
    words = ("run", RECIPE, "--set", f"run.dir={run_dir}", "--set", "stages.climb.steps=500")
    words += ("--set", "stages.climb.policy=recipes/tiny_base/", "--only", "climb")
    since = time.time()
    process = start(*words, log=log)
    wait_for(process, run_dir, lambda e: e["event"] == "progress", after=since, log=log)
    asked = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert time.monotonic() - asked < 10  # the promise itself, not a benchmark
    assert processes_of(run_dir) == []
    assert not (run_dir / "climb" / "COMPLETE").exists()
    assert Path(run_dir / "events.jsonl").exists()
