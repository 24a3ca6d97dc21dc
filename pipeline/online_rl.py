"""Stage `online_rl`: brings engines and learner up, hands the loop what it needs, and writes down what happened.

Artifacts: `checkpoint/`, `rollouts.parquet` (every answer), `steps.jsonl` (a row of metrics a step),
`curriculum.jsonl` (every posterior after every step).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import DatasetTasks, GeneratedTasks, OnlineRlStage, TaskSource
from pipeline.data import load_tasks, task_to_json
from pipeline.engines import engine_settings
from pipeline.stage import DataError, GateStopped, InfrastructureError, StageContext
from pipeline.trainer_actor import fp8_settings
from rewards.task import Task
from rl.controller import LeaseExhausted
from rl.curriculum import Curriculum
from rl.learner import LearnerSettings, PolicyLearner
from rl.loop import AsyncLoop, HealthStop, LoopSettings, NothingGraded, StepRecord, TaskPool
from rl.types import RolloutGroup, SampledAnswer, SampleRequest, StepReport, SyncReport, TrainBatch

if TYPE_CHECKING:
    from pipeline.cluster import Actor

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
    tokenizer = load_tokenizer(checkpoint)
    room = engine.max_model_len - stage.max_answer_tokens
    pool = task_pool(stage.tasks, context.seed, lambda task: len(encode_prompt(tokenizer, task.prompt)) <= room)
    if pool.num_too_long:
        context.emit("note", text=f"{pool.num_too_long} prompts are longer than {room} tokens and are left out")
    if not pool.cells:
        raise DataError(f"stages.{stage.name}.tasks: no task fits; lower max_answer_tokens or give other tasks")
    learners: list[Actor] = []
    try:
        for settings in learner_settings(stage, checkpoint, context):
            learners.append(cluster.start(f"{stage.name}-learner-{settings.rank}", PolicyLearner, settings))
        asyncio.run(_start_all(learners, context.recipe.cluster.start_deadline_s))
        actors = cluster.generators(engine, architecture_digest(checkpoint))
        with Sandbox() as sandbox, ThreadPoolExecutor(GRADER_THREADS, "grader") as graders:
            log = StepLog(context, stage.steps, pool)
            loop = AsyncLoop(
                loop_settings(stage, tuple(stop_token_ids(tokenizer, checkpoint)), cluster.shared_dir),
                TaskPool(
                    task_of=pool.task_of,
                    encode=lambda prompt: encode_prompt(tokenizer, prompt),
                    decode=lambda ids: decode_answer(tokenizer, ids),
                    grade=lambda task, text: grade(task, text, sandbox),
                ),
                Curriculum(pool.domains, seed=context.seed, **stage.curriculum.model_dump()),
                [RemoteGenerator(actor, stage.deadline_s) for actor in actors],
                RemoteLearner(learners, stage.deadline_s),
                graders,
                on_step=log.write,
                on_lost=log.write_lost,
                on_event=context.emit,
            )
            try:
                asyncio.run(loop.run(publish_first=stage.fp8 is not None))
            finally:
                log.close()
        learners[0].call("save", str(context.work / "checkpoint"), timeout_s=stage.deadline_s)
    except HealthStop as error:
        raise GateStopped(str(error)) from error
    except (SandboxUnavailable, LeaseExhausted, NothingGraded) as error:
        raise InfrastructureError(str(error)) from error
    finally:
        for learner in learners:
            cluster.stop(learner)
    return log.summary()


async def _start_all(learners: Sequence[Actor], deadline_s: float) -> None:
    """Together: they wait for each other. Ended by the last one's answer, or the first error or deadline."""
    await asyncio.gather(*(learner.call_async("start", timeout_s=deadline_s) for learner in learners))


class RemoteGenerator:
    """A generator actor behind the loop's protocol, every call with a deadline."""

    def __init__(self, actor: Actor, deadline_s: float) -> None:
        self.actor, self.deadline_s = actor, deadline_s

    async def sample(self, request: SampleRequest) -> list[SampledAnswer]:
        return await self.actor.call_async("sample", request, timeout_s=self.deadline_s)

    async def take_weights(self, path: str, version: int, expected_digest: str | None = None) -> SyncReport:
        return await self.actor.call_async("take_weights", path, version, expected_digest, timeout_s=self.deadline_s)


class RemoteLearner:
    """The learner actors behind the loop's protocol: all step, the first one publishes and reports."""

    def __init__(self, actors: Sequence[Actor], deadline_s: float) -> None:
        self.actors, self.deadline_s = actors, deadline_s

    async def step(self, batch: TrainBatch, publish_to: str | None = None) -> StepReport:
        reports = await asyncio.gather(
            *(
                actor.call_async("step", batch, publish_to if rank == 0 else None, timeout_s=self.deadline_s)
                for rank, actor in enumerate(self.actors)
            )
        )
        return reports[0]

    async def publish(self, path: str) -> str:
        return await self.actors[0].call_async("publish", path, timeout_s=self.deadline_s)


class StepLog:
    """Appends what every step leaves behind."""

    def __init__(self, context: StageContext, num_steps: int, pool: Pool) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.context, self.num_steps, self.pool = context, num_steps, pool
        self.steps: list[dict[str, Any]] = []
        self._steps = (context.work / "steps.jsonl").open("w")
        self._curriculum = (context.work / "curriculum.jsonl").open("w")
        self._schema = pa.schema(
            [
                ("task_json", pa.string()),
                ("task_id", pa.string()),
                ("domain", pa.string()),
                ("level", pa.int32()),
                ("group_id", pa.string()),
                ("step", pa.int32()),
                ("version", pa.int32()),
                ("prompt_ids", pa.list_(pa.int32())),
                ("answer_ids", pa.list_(pa.int32())),
                ("text", pa.string()),
                ("score", pa.float64()),
                ("reason", pa.string()),
                ("finish_reason", pa.string()),
                ("logprobs", pa.list_(pa.float32())),
                ("token_versions", pa.list_(pa.int32())),
            ]
        )
        self._writer = pq.ParquetWriter(context.work / "rollouts.parquet", self._schema)

    def write(self, record: StepRecord) -> None:
        """One step's row of metrics, its rollouts, and the posterior of every cell tried so far."""
        self.steps.append(record.metrics)
        self._steps.write(json.dumps(record.metrics) + "\n")
        self._steps.flush()
        for cell, sampled in record.curriculum.sampled.items():
            posterior, (domain, level) = record.curriculum.posteriors[cell], self.pool.cells[cell]
            row = {"step": record.step, "cell": cell, "domain": domain, "level": level, "sampled": sampled,
                   "alpha": round(posterior.alpha, 3), "beta": round(posterior.beta, 3)}  # fmt: skip
            self._curriculum.write(json.dumps(row) + "\n")
        self._write_rollouts(record.groups, record.step)
        metrics = record.metrics
        self.context.progress(
            record.step,
            self.num_steps,
            "steps",
            pass_rate=round(metrics["pass_rate"], 3),
            tokens_per_s=round(metrics["tokens_per_s"]),
            staleness=round(metrics.get("staleness_mean", 0.0), 2),
        )

    def write_lost(self, group: RolloutGroup) -> None:
        """A group that nobody could grade: its rollouts stand under step 0, which trains on nothing."""
        self._write_rollouts([group], step=0)

    def _write_rollouts(self, groups: Sequence[RolloutGroup], step: int) -> None:
        import pyarrow as pa

        rows = [
            {
                "task_json": json.dumps(task_to_json(group.task)), "task_id": group.task.task_id,
                "domain": group.task.domain, "level": group.task.level, "group_id": group.group_id,
                "step": step, "version": group.leased_at_version, "prompt_ids": group.prompt_ids,
                "answer_ids": rollout.answer.token_ids, "text": rollout.text, "score": rollout.score,
                "reason": rollout.reason, "finish_reason": rollout.answer.finish_reason,
                "logprobs": rollout.answer.logprobs, "token_versions": rollout.answer.versions,
            }
            for group in groups
            for rollout in group.rollouts
        ]  # fmt: skip
        self._writer.write_table(pa.Table.from_pylist(rows, schema=self._schema))

    def close(self) -> None:
        self._steps.close()
        self._curriculum.close()
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
            "prompts_too_long": self.pool.num_too_long,
        }


def _mean(rows: list[dict[str, Any]], key: str) -> float:
    values = [row[key] for row in rows if key in row]
    return sum(values) / len(values) if values else 0.0


def learner_settings(stage: OnlineRlStage, checkpoint: Path, context: StageContext) -> list[LearnerSettings]:
    """One for each learner."""
    first = LearnerSettings(
        checkpoint=str(checkpoint),
        dtype=stage.dtype,
        learning_rate=stage.learning_rate,
        warmup_steps=stage.warmup_steps,
        weight_decay=stage.weight_decay,
        max_grad_norm=stage.max_grad_norm,
        micro_batch_tokens=stage.micro_batch_tokens,
        temperature=stage.temperature,
        router_policy=stage.router.policy,
        router_learning_rate_scale=stage.router.learning_rate_scale,
        balance_coef=stage.router.balance_coef,
        z_coef=stage.router.z_coef,
        clip_low=stage.objective.clip_low,
        clip_high=stage.objective.clip_high,
        mismatch_cap=stage.objective.mismatch_cap,
        seed=context.seed,
        fp8=fp8_settings(stage.fp8),
        world_size=context.recipe.cluster.learners,
        rendezvous=str(context.cluster.shared_dir / f"{stage.name}-learners"),
    )
    return [replace(first, rank=rank) for rank in range(first.world_size)]


def loop_settings(stage: OnlineRlStage, stop_token_ids: tuple[int, ...], shared: Path) -> LoopSettings:
    return LoopSettings(
        groups_per_step=stage.groups_per_step,
        group_size=stage.group_size,
        num_steps=stage.steps,
        max_staleness=stage.max_staleness,
        max_answer_tokens=stage.max_answer_tokens,
        temperature=stage.temperature,
        stop_token_ids=stop_token_ids,
        advantage=stage.objective.advantage,
        overlong_penalty=stage.objective.overlong_penalty,
        weights_path=str(shared / "v{version}.safetensors"),
    )


@dataclass(frozen=True, kw_only=True)
class Pool:
    """What tasks are drawn from."""

    cells: dict[str, tuple[str, int]]  # the curriculum's cell → (domain, level)
    task_of: Callable[[str, int], Task]  # (cell, slot) → task
    num_too_long: int = 0  # prompts left out

    @property
    def domains(self) -> dict[str, str]:
        return {cell: domain for cell, (domain, _) in self.cells.items()}


def task_pool(source: TaskSource, seed: int, fits: Callable[[Task], bool]) -> Pool:
    """Generated tasks: a cell is a (domain, level) and never runs dry. A data set: a cell is one prompt that fits."""
    if isinstance(source, DatasetTasks):
        tasks = load_tasks(source, seed)
        kept = {task.task_id: task for task in tasks if fits(task)}
        cells = {name: (task.domain, task.level) for name, task in kept.items()}
        return Pool(cells=cells, task_of=lambda cell, slot: kept[cell], num_too_long=len(tasks) - len(kept))
    assert isinstance(source, GeneratedTasks)
    from rewards.domains import generate

    levels = range(source.levels[0], source.levels[1] + 1)
    cells = {f"{domain}/{level}": (str(domain), level) for domain in source.domains for level in levels}

    def task_of(cell: str, slot: int) -> Task:
        domain, level = cells[cell]
        return generate(domain, level, seed * 1_000_003 + slot, "train")

    return Pool(cells=cells, task_of=task_of)
