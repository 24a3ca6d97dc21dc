"""Stage `online_rl`: brings engines and learner up, hands the loop what it needs, and writes down what happened.

Artifacts: `checkpoint/`, `rollouts.parquet` (every answer), `steps.jsonl` (a row of metrics a step),
`curriculum.jsonl` (every posterior after every step).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pipeline.config import DatasetTasks, GeneratedTasks, OnlineRlStage, TaskSource
from pipeline.data import load_tasks, task_to_json
from pipeline.engines import engine_settings
from pipeline.stage import InfrastructureError, StageContext
from rewards.task import Task
from rl.curriculum import Curriculum
from rl.learner import LearnerSettings, PolicyLearner
from rl.loop import AsyncLoop, LoopSettings, StepRecord, TaskPool
from rl.types import SampledAnswer, SampleRequest, StepReport, SyncReport, TrainBatch

GRADER_THREADS = 2


def run(context: StageContext) -> dict[str, Any]:
    from model.checkpoint import architecture_digest
    from model.tokenizer import decode_answer, encode_prompt, load_tokenizer, stop_token_ids
    from rewards.grade import grade
    from rewards.sandbox import Sandbox, SandboxUnavailable

    stage = context.stage
    assert isinstance(stage, OnlineRlStage)
    checkpoint = context.checkpoint(stage.policy)
    cluster = context.cluster
    engine = engine_settings(stage.dtype, checkpoint, context.seed)
    cluster.prestart_generators(engine, architecture_digest(checkpoint))
    learner = cluster.start(f"{stage.name}-learner", PolicyLearner, learner_settings(stage, checkpoint, context.seed))
    tokenizer = load_tokenizer(checkpoint)
    cells, task_of = task_cells(stage.tasks, context.seed)
    try:
        learner.call("start", timeout_s=context.recipe.cluster.start_deadline_s)
        actors = cluster.generators(engine, architecture_digest(checkpoint))
        with Sandbox() as sandbox, ThreadPoolExecutor(GRADER_THREADS, "grader") as graders:
            log = StepLog(context, stage.steps)
            loop = AsyncLoop(
                loop_settings(stage, tuple(stop_token_ids(tokenizer, checkpoint)), cluster.shared_dir),
                TaskPool(
                    task_of=task_of,
                    encode=lambda prompt: encode_prompt(tokenizer, prompt),
                    decode=lambda ids: decode_answer(tokenizer, ids),
                    grade=lambda task, text: grade(task, text, sandbox),
                ),
                Curriculum(cells, seed=context.seed, **stage.curriculum.model_dump()),
                [RemoteGenerator(actor, stage.deadline_s) for actor in actors],
                RemoteLearner(learner, stage.deadline_s),
                graders,
                on_step=log.write,
                on_event=context.emit,
            )
            try:
                asyncio.run(loop.run())
            finally:
                log.close()
        learner.call("save", str(context.work / "checkpoint"), timeout_s=stage.deadline_s)
    except SandboxUnavailable as error:
        raise InfrastructureError(str(error)) from error
    finally:
        cluster.stop(learner)
    return log.summary()


class RemoteGenerator:
    """A generator actor behind the loop's protocol, every call with a deadline."""

    def __init__(self, actor: Any, deadline_s: float) -> None:
        self.actor, self.deadline_s = actor, deadline_s

    async def sample(self, request: SampleRequest) -> list[SampledAnswer]:
        return await self.actor.call_async("sample", request, timeout_s=self.deadline_s)

    async def take_weights(self, path: str, version: int, expected_digest: str | None = None) -> SyncReport:
        return await self.actor.call_async("take_weights", path, version, expected_digest, timeout_s=self.deadline_s)


class RemoteLearner:
    """The learner actor behind the loop's protocol."""

    def __init__(self, actor: Any, deadline_s: float) -> None:
        self.actor, self.deadline_s = actor, deadline_s

    async def step(self, batch: TrainBatch, publish_to: str | None = None) -> StepReport:
        return await self.actor.call_async("step", batch, publish_to, timeout_s=self.deadline_s)


class StepLog:
    """Appends what every step leaves behind."""

    def __init__(self, context: StageContext, num_steps: int) -> None:
        import pyarrow as pa

        self.context, self.num_steps = context, num_steps
        self.steps: list[dict[str, Any]] = []
        self._steps = (context.work / "steps.jsonl").open("w")
        self._curriculum = (context.work / "curriculum.jsonl").open("w")
        self._writer: Any = None
        self._schema = pa.schema([
            ("task_json", pa.string()), ("task_id", pa.string()), ("domain", pa.string()), ("level", pa.int32()),
            ("group_id", pa.string()), ("step", pa.int32()), ("version", pa.int32()),
            ("prompt_ids", pa.list_(pa.int32())), ("answer_ids", pa.list_(pa.int32())), ("text", pa.string()),
            ("score", pa.float64()), ("reason", pa.string()), ("finish_reason", pa.string()),
            ("logprobs", pa.list_(pa.float32())), ("token_versions", pa.list_(pa.int32())),
        ])

    def write(self, record: StepRecord) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.steps.append(record.metrics)
        self._steps.write(json.dumps(record.metrics) + "\n")
        self._steps.flush()
        for cell, posterior in record.curriculum.posteriors.items():
            domain, _, level = cell.partition("/")
            row = {"step": record.step, "domain": domain, "level": level, "alpha": round(posterior.alpha, 3),
                   "beta": round(posterior.beta, 3), "sampled": record.curriculum.sampled[cell]}  # fmt: skip
            self._curriculum.write(json.dumps(row) + "\n")
        if self._writer is None:
            self._writer = pq.ParquetWriter(self.context.work / "rollouts.parquet", self._schema)
        rows = [
            {
                "task_json": json.dumps(task_to_json(group.task)), "task_id": group.task.task_id,
                "domain": group.task.domain, "level": group.task.level, "group_id": group.group_id,
                "step": record.step, "version": group.leased_at_version, "prompt_ids": group.prompt_ids,
                "answer_ids": rollout.answer.token_ids, "text": rollout.text, "score": rollout.score,
                "reason": rollout.reason, "finish_reason": rollout.answer.finish_reason,
                "logprobs": rollout.answer.logprobs, "token_versions": rollout.answer.versions,
            }
            for group in record.groups
            for rollout in group.rollouts
        ]  # fmt: skip
        self._writer.write_table(pa.Table.from_pylist(rows, schema=self._schema))
        metrics = record.metrics
        self.context.progress(
            record.step, self.num_steps, "steps", pass_rate=round(metrics["pass_rate"], 3),
            tokens_per_s=round(metrics["tokens_per_s"]), staleness=round(metrics.get("staleness_mean", 0.0), 2),
        )

    def close(self) -> None:
        self._steps.close()
        self._curriculum.close()
        if self._writer is not None:
            self._writer.close()

    def summary(self) -> dict[str, Any]:
        first, last = self.steps[:5], self.steps[-5:]
        groups = sum(step["groups"] for step in self.steps)
        return {
            "steps": len(self.steps),
            "tokens_generated": self.steps[-1]["generated_tokens"],
            "tokens_trained": self.steps[-1]["trained_tokens"],
            "pass_rate_first_steps": _mean(first, "pass_rate"),
            "pass_rate_last_steps": _mean(last, "pass_rate"),
            "signal_share": 1 - sum(step["zero_signal_groups"] for step in self.steps) / groups,
            "staleness_max": max(step.get("staleness_max", 0.0) for step in self.steps),
            "mismatch_k3": _mean(self.steps, "mismatch_k3"),
            "groups_lost": self.steps[-1]["groups_lost"],
            "ungraded": sum(step["ungraded"] for step in self.steps),
        }


def _mean(rows: list[dict[str, Any]], key: str) -> float:
    values = [row[key] for row in rows if key in row]
    return sum(values) / len(values) if values else 0.0


def learner_settings(stage: OnlineRlStage, checkpoint: Path, seed: int) -> LearnerSettings:
    return LearnerSettings(
        checkpoint=str(checkpoint), dtype=stage.dtype, learning_rate=stage.learning_rate,
        warmup_steps=stage.warmup_steps, weight_decay=stage.weight_decay, max_grad_norm=stage.max_grad_norm,
        micro_batch_tokens=stage.micro_batch_tokens, temperature=stage.temperature, train_router=stage.train_router,
        clip_low=stage.objective.clip_low, clip_high=stage.objective.clip_high,
        mismatch_cap=stage.objective.mismatch_cap, seed=seed,
    )


def loop_settings(stage: OnlineRlStage, stop_token_ids: tuple[int, ...], shared: Path) -> LoopSettings:
    return LoopSettings(
        groups_per_step=stage.groups_per_step, group_size=stage.group_size, num_steps=stage.steps,
        max_staleness=stage.max_staleness, max_answer_tokens=stage.max_answer_tokens, temperature=stage.temperature,
        stop_token_ids=stop_token_ids, advantage=stage.objective.advantage,
        overlong_penalty=stage.objective.overlong_penalty, weights_path=str(shared / "v{version}.safetensors"),
    )


def task_cells(source: TaskSource, seed: int) -> tuple[dict[str, str], Callable[[str, int], Task]]:
    """The curriculum's cells → domain, and how a cell becomes a task. Generated tasks: a cell is a (domain, level) and
    never runs dry. A data set: a cell is one prompt."""
    if isinstance(source, DatasetTasks):
        tasks = {task.task_id: task for task in load_tasks(source, seed)}
        return {name: task.domain for name, task in tasks.items()}, lambda cell, slot: tasks[cell]
    assert isinstance(source, GeneratedTasks)
    from rewards.domains import generate

    cells: dict[str, str] = {
        f"{domain}/{level}": domain
        for domain in source.domains
        for level in range(source.levels[0], source.levels[1] + 1)
    }

    def task_of(cell: str, slot: int) -> Task:
        domain, level = cell.split("/")
        return generate(domain, int(level), seed * 1_000_003 + slot, "train")

    return cells, task_of
