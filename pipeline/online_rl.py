"""Stage `online_rl`: brings engines and learner up and hands the loop what it needs.

    pipeline/task_pool.py    what tasks are drawn from, and the curriculum over them
    pipeline/step_log.py     what every step leaves behind

Artifacts: `checkpoint/`, where asked for `checkpoints/step-…/` of steps on the way, `rollouts.parquet` (every answer),
`steps.jsonl` (a row of metrics a step), `curriculum.jsonl` (after every step the posterior of every domain and level,
and of the prompts it asked), `observations.jsonl` (of every group that began at its prompt what was expected, what
came, and of which version), `renewed.jsonl` (every prompt that was added to the pool: its source, its parents, the
task). A run that was killed goes on from the latter four and from what lies in the scratch folder, to the very end:
`state/` (the newest of `rl/run_state.py`) and `rollouts/` (a file a step).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from model.disk import remove
from pipeline.calibrate_difficulty import calibrate
from pipeline.cluster import Actor, ActorFailed
from pipeline.config import OnlineRlStage
from pipeline.engines import engine_settings
from pipeline.errors import DataError, GateStopped, InfrastructureError
from pipeline.stage import SCRATCH, StageContext
from pipeline.step_log import LOGS, StepLog
from pipeline.task_pool import curriculum_of, task_pool
from pipeline.trainer_actor import fp8_settings
from rewards.task import Task
from rl.controller import LeaseExhausted, NoGeneratorLeft
from rl.health import HealthMonitor
from rl.learner import LearnerSettings, PolicyLearner
from rl.loop import AsyncLoop, HealthStop, LoopSettings, NothingGraded, TaskPool
from rl.run_state import LEARNER, RunState, RunStates
from rl.types import (
    GeneratorGone,
    Published,
    SampledAnswer,
    SampleRequest,
    StepReport,
    SyncRefused,
    SyncReport,
    TrainBatch,
)

T = TypeVar("T")
GRADER_THREADS = 2
CHECKPOINTS = "checkpoints"


def run(context: StageContext) -> dict[str, Any]:
    from model.checkpoint import architecture_digest
    from model.tokenizer import decode_answer, encode_prompt, load_tokenizer, stop_token_ids
    from rewards.grade import grade
    from rewards.sandbox import Sandbox, SandboxUnavailable

    stage = context.stage
    assert isinstance(stage, OnlineRlStage)
    checkpoint = context.checkpoint(stage.policy)
    cluster = context.cluster
    engine = engine_settings(stage.dtype, checkpoint, context.seed, record_routes=stage.router.replay)
    cluster.prestart_generators(engine, architecture_digest(checkpoint))
    tokenizer = load_tokenizer(checkpoint)
    room = engine.max_model_len - stage.max_answer_tokens

    def fits(task: Task) -> bool:
        return len(encode_prompt(tokenizer, task.prompt)) <= room

    pool = task_pool(stage.tasks, context.seed, fits)
    if pool.num_too_long:
        what = "levels whose prompts" if pool.endless else "prompts that"
        context.emit("note", text=f"{pool.num_too_long} {what} are longer than {room} tokens, left out")
    if not pool.cells:
        raise DataError(f"stages.{stage.name}.tasks: no task fits; lower max_answer_tokens or give other tasks")
    curriculum = curriculum_of(stage, pool, context, fits)
    learners: list[Actor] = []
    try:
        asked, shared = context.recipe.cluster, cluster.shared_dir
        for settings in learner_settings(
            stage, checkpoint, context.seed, shared, asked.learners, cluster.weights_served_at, asked.expert_parallel
        ):
            learners.append(cluster.start(f"{stage.name}-learner-{settings.rank}", PolicyLearner, settings))
        asyncio.run(_start_all(learners, asked.start_deadline_s))
        actors = cluster.generators(engine, architecture_digest(checkpoint))

        def replace_generator(actor: Actor) -> Actor:
            return cluster.replace_generator(actor, engine, architecture_digest(checkpoint))

        with Sandbox() as sandbox, ThreadPoolExecutor(GRADER_THREADS, "grader") as graders:
            _remove_remains(context.work)
            checkpoints = context.work / CHECKPOINTS
            states = RunStates(context.scratch / "state")
            newest = states.newest()
            log = StepLog(context, stage.steps, pool.num_too_long, after=newest[0].protocol.version if newest else 0)
            states.before_publish = log.sync
            learner = RemoteLearner(learners, stage.deadline_s)
            loop = AsyncLoop(
                loop_settings(stage, tuple(stop_token_ids(tokenizer, checkpoint)), shared, checkpoints, context.seed),
                TaskPool(
                    task_of=pool.task_of,
                    encode=lambda prompt: encode_prompt(tokenizer, prompt),
                    decode=lambda ids: decode_answer(tokenizer, ids),
                    grade=lambda task, text: grade(task, text, sandbox),
                ),
                curriculum,
                [RemoteGenerator(actor, stage.deadline_s, replace_generator) for actor in actors],
                learner,
                graders,
                states,
                HealthMonitor(stage.health_limits()),
                on_step=log.write,
                on_lost=log.write_lost,
                on_event=context.emit,
            )
            try:
                asyncio.run(_run(loop, newest, log.steps, context))
            finally:
                log.close()
            log.finish()
            final = context.work / "checkpoint"
            asyncio.run(learner.save(str(final)))
            metrics = log.summary()
            if stage.curriculum.calibrate_entries:
                metrics["calibration"] = calibrate(context, curriculum, pool.task_of, final, sandbox)
    except HealthStop as error:
        raise GateStopped(str(error)) from error
    except (SandboxUnavailable, LeaseExhausted, NoGeneratorLeft, NothingGraded) as error:
        raise InfrastructureError(str(error)) from error
    finally:
        for actor in learners:
            cluster.stop(actor)
    return metrics


def _remove_remains(work: Path) -> None:
    """What a killed run left beside what a resumed one goes on from: a checkpoint that was being written, say."""
    for path in work.iterdir():
        if path.name not in (SCRATCH, CHECKPOINTS, *LOGS):
            remove(path) if path.is_dir() else path.unlink()


async def _run(
    loop: AsyncLoop, newest: tuple[RunState, Path] | None, rows: Sequence[Mapping[str, Any]], context: StageContext
) -> None:
    if newest is not None:
        state, folder = newest
        await loop.resume(state, str(folder / LEARNER), rows)
        version, groups = state.protocol.version, len(state.protocol.ready)
        context.emit("note", text=f"resumed after step {version}, with {groups} finished groups")
    await loop.run()


async def _start_all(learners: Sequence[Actor], deadline_s: float) -> None:
    """Together: they wait for each other. Ended by the last one's answer, or the first error or deadline."""
    await asyncio.gather(*(learner.call_async("start", timeout_s=deadline_s) for learner in learners))


class RemoteGenerator:
    """The place of one generator behind the loop's protocol: each call has a deadline, a dead actor a successor."""

    def __init__(self, actor: Actor, deadline_s: float, replace: Callable[[Actor], Actor]) -> None:
        self.actor, self.deadline_s, self.replace = actor, deadline_s, replace

    async def sample(self, request: SampleRequest) -> list[SampledAnswer]:
        """ValueError is a fault of the request, whose next try would end the same way; whatever else goes wrong is one
        of the engine."""
        return await self._asked(
            self.actor.call_async("sample", request, timeout_s=self.deadline_s), passed_on={"ValueError"}
        )

    async def take_weights(self, location: str, version: int, expected: Published, repair: bool = False) -> SyncReport:
        call = self.actor.call_async("take_weights", location, version, expected, repair, timeout_s=self.deadline_s)
        try:
            return await self._asked(call, passed_on={"WeightsRefused"})
        except ActorFailed as error:
            raise SyncRefused(str(error)) from error

    async def restart(self) -> None:
        try:
            self.actor = await asyncio.to_thread(self.replace, self.actor)
        except InfrastructureError as error:
            raise GeneratorGone(str(error)) from error

    async def _asked(self, call: Awaitable[T], passed_on: set[str]) -> T:
        try:
            return await call
        except InfrastructureError as error:
            if isinstance(error, ActorFailed) and error.kind in passed_on:
                raise
            raise GeneratorGone(str(error)) from error


class RemoteLearner:
    """The learner actors behind the loop's protocol: all do the same, the first one writes and reports."""

    def __init__(self, actors: Sequence[Actor], deadline_s: float) -> None:
        self.actors, self.deadline_s = actors, deadline_s

    async def step(self, batch: TrainBatch, publish_to: str | None = None) -> StepReport:
        return await self._all("step", batch, publish_to)

    async def publish(self, path: str) -> Published:
        return await self._all("publish", path)

    async def save_state(self, path: str) -> None:
        await self._all("save_state", path)

    async def load_state(self, path: str) -> None:
        await self._all("load_state", path)

    async def save(self, directory: str) -> None:
        await self._all("save", directory)

    async def _all(self, method: str, *args: Any) -> Any:
        calls = (actor.call_async(method, *args, timeout_s=self.deadline_s) for actor in self.actors)
        return (await asyncio.gather(*calls))[0]


def learner_settings(
    stage: OnlineRlStage,
    checkpoint: Path,
    seed: int,
    shared: Path,
    world_size: int,
    serve_at: str = "",
    expert_parallel: int = 1,
) -> list[LearnerSettings]:
    """One for each learner."""
    first = LearnerSettings(
        checkpoint=str(checkpoint),
        dtype=stage.dtype,
        learning_rate=stage.learning_rate,
        warmup_steps=stage.warmup_steps,
        num_steps=stage.steps,
        last_rate=stage.last_rate_share,
        weight_decay=stage.weight_decay,
        max_grad_norm=stage.max_grad_norm,
        micro_batch_tokens=stage.micro_batch_tokens,
        activation_checkpointing=stage.activation_checkpointing,
        temperature=stage.temperature,
        router_policy=stage.router.policy,
        router_learning_rate_scale=stage.router.learning_rate_scale,
        balance_coef=stage.router.balance_coef,
        z_coef=stage.router.z_coef,
        objective=stage.objective.switches(),
        optimizer=stage.optimizer,
        rate_scales={part: scale for part, scale in stage.rate_scales.items()},  # noqa: C416
        updates=stage.updates_per_step,
        longest_answer=stage.max_answer_tokens,
        seed=seed,
        fp8=fp8_settings(stage.fp8),
        world_size=world_size,
        expert_parallel=expert_parallel,
        rendezvous=str(shared / f"{stage.name}-learners"),
        serve_at=serve_at,
    )
    return [replace(first, rank=rank) for rank in range(first.world_size)]


def loop_settings(
    stage: OnlineRlStage, stop_token_ids: tuple[int, ...], shared: Path, checkpoints: Path, seed: int
) -> LoopSettings:
    return LoopSettings(
        groups_per_step=stage.groups_per_step,
        num_steps=stage.steps,
        max_staleness=stage.max_staleness,
        max_answer_tokens=stage.max_answer_tokens,
        temperature=stage.temperature,
        stop_token_ids=stop_token_ids,
        advantage=stage.objective.advantage,
        pass_at_k=stage.objective.pass_at_k,
        overlong_penalty=stage.objective.overlong_penalty,
        overlong_buffer=stage.objective.overlong_buffer_tokens,
        weights_path=str(shared / "v{version}.safetensors"),
        sync_every=stage.sync_every_steps,
        save_every=stage.save_every_steps,
        replay_steps=stage.curriculum.replay_steps,
        checkpoint_every=stage.checkpoint_every_steps,
        checkpoint_path=str(checkpoints / "step-{step:06}"),
        seed=seed,
    )
