"""The evaluate stage without an engine: what is counted, what is left out, and that every answer is on disk."""

from __future__ import annotations

import asyncio
import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest

from model.tokenizer import build_tokenizer, decode_answer
from pipeline import evaluate
from pipeline.config import ClusterSettings, DatasetTasks, EvaluateStage
from pipeline.errors import DataError, InfrastructureError
from pipeline.evaluate import GradedAnswer, all_of, checkpoint_digest, estimates, request_seed, summarise
from pipeline.stage import StageContext
from rewards.task import split_of
from rl.types import SampledAnswer, SampleRequest


def graded(task_id: str, scores: list[float | None], **over: Any) -> list[GradedAnswer]:
    domain, level, _ = task_id.split("/")
    base = {"policy": "p", "task_id": task_id, "domain": domain, "level": int(level), "prompt": "?", "text": "!",
            "reason": "sandbox: gone", "finish_reason": "stop", "num_tokens": 10}  # fmt: skip
    return [GradedAnswer(**(base | over), sample=i, score=score) for i, score in enumerate(scores)]


def test_pass_at_k_is_the_mean_of_the_tasks_worked_by_hand():
    # Task one: 1 of 4 right, pass@1 = 1/4, pass@2 = 1 - C(3,2)/C(4,2) = 1/2. Task two: 4 of 4.
    summary = summarise(graded("maths/1/0", [1, 0, 0, 0]) + graded("code/2/0", [1, 1, 1, 1]), [1, 2], seed=0)
    assert summary["pass_at_k"]["1"]["value"] == pytest.approx((0.25 + 1) / 2)
    assert summary["pass_at_k"]["2"]["value"] == pytest.approx((0.5 + 1) / 2)
    assert summary["pass_at_k"]["1"]["low"] <= 0.625 <= summary["pass_at_k"]["1"]["high"]
    assert summary["domains"]["maths"]["2"]["value"] == pytest.approx(0.5)
    assert summary["levels"]["2"]["1"]["value"] == 1.0
    assert summary["cells"]["maths/1"]["1"] | {"low": 0, "high": 0} == {"value": 0.25, "low": 0, "high": 0, "tasks": 1}


def test_ungraded_answers_are_counted_and_never_zero():
    summary = summarise(graded("maths/1/0", [1, 1, None, None]), [1], seed=0)
    assert summary["pass_at_k"]["1"]["value"] == 1.0  # as zeros they would give 0.5
    assert summary["ungraded"] == {"sandbox: gone": 2}


def test_a_task_with_fewer_graded_answers_than_k_is_left_out_of_that_k_only():
    summary = summarise(graded("maths/1/0", [1, None, None]) + graded("maths/1/1", [0, 0, 0]), [1, 2], seed=0)
    assert summary["left_out"] == {"1": 0, "2": 1}
    assert summary["pass_at_k"]["1"]["value"] == 0.5
    assert summary["pass_at_k"]["2"] == {"value": 0.0, "low": 0.0, "high": 0.0, "tasks": 1}
    assert estimates([(0, 0)], [1], seed=0) == {"1": None}


def test_partial_credit_is_not_a_pass():
    assert summarise(graded("code/1/0", [0.99, 1.0]), [1], seed=0)["pass_at_k"]["1"]["value"] == 0.5


def test_lengths_and_truncation_are_over_answers_that_were_sampled():
    answers = graded("maths/1/0", [1, 0], finish_reason="length", num_tokens=30)
    answers += graded("maths/1/1", [0, 0]) + graded("maths/1/2", [None], finish_reason=evaluate.UNASKED, num_tokens=0)
    summary = summarise(answers, [1], seed=0)
    assert (summary["mean_answer_tokens"], summary["truncated_share"], summary["tokens_generated"]) == (20, 0.5, 80)


def test_request_seeds_differ_by_task_and_fit_an_engine():
    seeds = {request_seed(17, f"maths/1/{i}") for i in range(1000)} | {request_seed(18, "maths/1/0")}
    assert len(seeds) == 1001
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_checkpoint_digest_is_of_the_bytes_in_the_order_of_the_names(tmp_path):
    (tmp_path / "model-2.safetensors").write_bytes(b"two")
    (tmp_path / "model-1.safetensors").write_bytes(b"one")
    (tmp_path / "config.json").write_text("{}")
    assert checkpoint_digest(tmp_path) == hashlib.sha256(b"onetwo").hexdigest()


def test_the_first_error_ends_all_work_and_is_raised_as_itself():
    cancelled = []

    async def fails() -> None:
        raise InfrastructureError("generator-0 died")

    async def waits() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            cancelled.append(True)

    with pytest.raises(InfrastructureError, match="generator-0 died"):
        asyncio.run(all_of([waits(), fails()]))
    assert cancelled == [True]


# --- a whole stage, with an engine that answers from a list ---------------------------------------------------------


class KnowingEngine:
    """Answers "3 + 4" right in one of two samples; notes how many requests it had at once."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.seeds, self.at_once, self.most_at_once = tokenizer, set(), 0, 0

    async def call_async(self, method: str, request: SampleRequest, *, timeout_s: float) -> list[SampledAnswer]:
        assert method == "sample" and timeout_s > 0
        assert "assistant" in decode_answer(self.tokenizer, request.prompt_ids)
        assert request.stop_token_ids == (self.tokenizer.eos_token_id,)
        self.seeds.add(request.seed)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        await asyncio.sleep(0.01)
        self.at_once -= 1
        answers = []
        for i in range(request.num_samples):
            ids = self.tokenizer.encode("Answer: 7" if i % 2 else "Answer: 8", add_special_tokens=False)
            answers.append(SampledAnswer(token_ids=ids, logprobs=[0.0] * len(ids), versions=[0] * len(ids),
                                         finish_reason="stop"))  # fmt: skip
        return answers


def test_a_stage_leaves_results_and_every_answer(tmp_path):
    tokenizer = build_tokenizer(["user assistant 3 + 4 Answer: 7"], 300)
    for policy, positions in (("base", 256), ("tuned", 64)):
        folder = tmp_path / policy / "checkpoint"
        tokenizer.save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps({"max_position_embeddings": positions}))
        (folder / "model.safetensors").write_bytes(policy.encode())
    long = "and so on " * 12  # more than the tuned checkpoint can read
    prompts = [held_out_prompt("3 + 4"), held_out_prompt("3 + 4 " + long)]
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text("".join(json.dumps({"question": p, "answer": "#### 7"}) + "\n" for p in prompts))
    source = DatasetTasks(dataset=str(tasks), format="gsm8k", split="held_out")
    engine = KnowingEngine(tokenizer)
    events: list[tuple[str, dict]] = []
    stage = EvaluateStage(name="score", kind="evaluate", policies=["base", "tuned"], tasks=source, k=[1, 2],
                          samples=4, max_answer_tokens=16)  # fmt: skip
    context = context_of(stage, tmp_path, engine, events)

    metrics = evaluate.run(context)

    results = json.loads((context.work / "results.json").read_text())
    base, tuned = results["policies"]
    assert (results["num_tasks"], results["samples"], results["k"]) == (2, 4, [1, 2])
    assert base["pass_at_k"]["1"]["value"] == tuned["pass_at_k"]["1"]["value"] == 0.5
    assert base["pass_at_k"]["2"]["value"] == pytest.approx(5 / 6)  # 1 - C(2,2)/C(4,2)
    assert tuned["left_out"] == {"1": 1, "2": 1} and sum(tuned["ungraded"].values()) == 4
    assert base["checkpoint_digest"] == hashlib.sha256(b"base").hexdigest()
    assert metrics["pass_at_k"]["base"] == {"1": 0.5, "2": pytest.approx(5 / 6)}
    assert metrics["tokens_generated"] == base["tokens_generated"] + tuned["tokens_generated"] > 0
    assert len(engine.seeds) == 2, "the same task has the same seed under both checkpoints"

    rows = pq.read_table(context.work / "answers.parquet").to_pylist()
    assert len(rows) == 2 * 2 * 4
    assert {row["score"] for row in rows} == {0.0, 1.0, None}
    assert [row["sample"] for row in rows[:4]] == [0, 1, 2, 3]
    progress = [fields for name, fields in events if name == "progress"]
    assert (progress[-1]["done"], progress[-1]["total"]) == (16, 16)


def test_a_checkpoint_without_a_chat_template_is_a_data_error(tmp_path):
    tokenizer = build_tokenizer(["a b"], 300)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "base" / "checkpoint")
    (tmp_path / "base" / "checkpoint" / "config.json").write_text('{"max_position_embeddings": 64}')
    stage = EvaluateStage(name="score", kind="evaluate", policies=["base"], tasks={"tasks_per_level": 1})
    with pytest.raises(DataError, match="chat template"):
        evaluate.run(context_of(stage, tmp_path, None, []))


def held_out_prompt(start: str) -> str:
    return next(prompt for i in range(1000) if split_of(prompt := f"{start} ({i})") == "held_out")


def context_of(stage: EvaluateStage, root: Path, engine: Any, events: list) -> StageContext:
    work = root / "work"
    work.mkdir()
    cluster: Any = SimpleNamespace(generators=lambda settings, digest, count: [engine])
    recipe: Any = SimpleNamespace(cluster=ClusterSettings())
    inputs = {policy: root / policy for policy in stage.policies}

    def emit(name: str, **fields: Any) -> None:
        events.append((name, fields))

    return StageContext(stage=stage, recipe=recipe, work=work, inputs=inputs, seed=3, cluster=cluster, emit=emit)
