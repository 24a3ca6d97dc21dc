"""Stage `online_rl`: brings engines and learner up, hands the loop what it needs, and writes down what happened.

Artifacts: `checkpoint/`, `rollouts.parquet` (every answer), `steps.jsonl` (a row of metrics a step),
`curriculum.jsonl` (every posterior after every step). A run that was killed goes on from the latter two and from what
lies in the scratch folder, to the very end: `state/` (the newest of `rl/run_state.py`) and `rollouts/` (a file a step).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from model.disk import naming, remove, sync
from pipeline.cluster import Actor, ActorFailed
from pipeline.config import DatasetTasks, GeneratedTasks, OnlineRlStage, TaskSource
from pipeline.data import load_tasks, task_to_json
from pipeline.engines import engine_settings
from pipeline.stage import SCRATCH, DataError, GateStopped, InfrastructureError, StageContext
from pipeline.trainer_actor import fp8_settings
from rewards.task import Task
from rl.controller import LeaseExhausted, NoGeneratorLeft
from rl.curriculum import Curriculum
from rl.health import HealthMonitor
from rl.learner import LearnerSettings, PolicyLearner
from rl.loop import AsyncLoop, HealthStop, LoopSettings, NothingGraded, StepRecord, TaskPool
from rl.run_state import LEARNER, RunState, RunStates
from rl.types import (
    GeneratorGone,
    Published,
    RolloutGroup,
    SampledAnswer,
    SampleRequest,
    StepReport,
    SyncRefused,
    SyncReport,
    TrainBatch,
)

T = TypeVar("T")
GRADER_THREADS = 2
STEPS, CURRICULUM = "steps.jsonl", "curriculum.jsonl"
PARQUET_BUFFER = 1 << 20  # bytes; pyarrow itself writes every page and header apart


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
    pool = task_pool(stage.tasks, context.seed, lambda task: len(encode_prompt(tokenizer, task.prompt)) <= room)
    if pool.num_too_long:
        context.emit("note", text=f"{pool.num_too_long} prompts are longer than {room} tokens and are left out")
    if not pool.cells:
        raise DataError(f"stages.{stage.name}.tasks: no task fits; lower max_answer_tokens or give other tasks")
    learners: list[Actor] = []
    try:
        num_learners = context.recipe.cluster.learners
        shared, serve_at = cluster.shared_dir, cluster.weights_served_at
        for settings in learner_settings(stage, checkpoint, context.seed, shared, num_learners, serve_at):
            learners.append(cluster.start(f"{stage.name}-learner-{settings.rank}", PolicyLearner, settings))
        asyncio.run(_start_all(learners, context.recipe.cluster.start_deadline_s))
        actors = cluster.generators(engine, architecture_digest(checkpoint))

        def replace_generator(actor: Actor) -> Actor:
            return cluster.replace_generator(actor, engine, architecture_digest(checkpoint))

        with Sandbox() as sandbox, ThreadPoolExecutor(GRADER_THREADS, "grader") as graders:
            _remove_remains(context.work)
            states = RunStates(context.scratch / "state")
            newest = states.newest()
            log = StepLog(context, stage.steps, pool, after=newest[0].protocol.version if newest else 0)
            states.before_publish = log.sync
            loop = AsyncLoop(
                loop_settings(stage, tuple(stop_token_ids(tokenizer, checkpoint)), shared, context.seed),
                TaskPool(
                    task_of=pool.task_of,
                    encode=lambda prompt: encode_prompt(tokenizer, prompt),
                    decode=lambda ids: decode_answer(tokenizer, ids),
                    grade=lambda task, text: grade(task, text, sandbox),
                ),
                Curriculum(pool.domains, seed=context.seed, **stage.curriculum.model_dump()),
                [RemoteGenerator(actor, stage.deadline_s, replace_generator) for actor in actors],
                RemoteLearner(learners, stage.deadline_s),
                graders,
                states,
                HealthMonitor(stage.health_limits()),
                on_step=log.write,
                on_lost=log.write_lost,
                on_event=context.emit,
            )
            try:
                asyncio.run(_run(loop, newest, context))
            finally:
                log.close()
            log.finish()
        asyncio.run(RemoteLearner(learners, stage.deadline_s).save(str(context.work / "checkpoint")))
    except HealthStop as error:
        raise GateStopped(str(error)) from error
    except (SandboxUnavailable, LeaseExhausted, NoGeneratorLeft, NothingGraded) as error:
        raise InfrastructureError(str(error)) from error
    finally:
        for learner in learners:
            cluster.stop(learner)
    return log.summary()


def _remove_remains(work: Path) -> None:
    """What a killed run left beside what a resumed one goes on from: a checkpoint that was being written, say."""
    for path in work.iterdir():
        if path.name not in (SCRATCH, STEPS, CURRICULUM):
            remove(path) if path.is_dir() else path.unlink()


async def _run(loop: AsyncLoop, newest: tuple[RunState, Path] | None, context: StageContext) -> None:
    if newest is not None:
        state, folder = newest
        await loop.resume(state, str(folder / LEARNER))
        version, groups = state.protocol.version, len(state.groups)
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

    async def take_weights(self, location: str, version: int, expected: Published) -> SyncReport:
        call = self.actor.call_async("take_weights", location, version, expected, timeout_s=self.deadline_s)
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


class StepLog:
    """What every step leaves behind. A resumed run keeps steps up to `after`: later ones were undone by a kill."""

    def __init__(self, context: StageContext, num_steps: int, pool: Pool, after: int = 0) -> None:
        import pyarrow as pa

        self.context, self.num_steps, self.pool = context, num_steps, pool
        self.steps = _rows_up_to(context.work / STEPS, after)
        _rows_up_to(context.work / CURRICULUM, after)
        self._steps = (context.work / STEPS).open("a")
        self._curriculum = (context.work / CURRICULUM).open("a")
        self._parts = context.scratch / "rollouts"
        self._parts.mkdir(parents=True, exist_ok=True)
        for part in self._parts.iterdir():
            if part.suffix != ".parquet" or (part.stem.isdigit() and int(part.stem) > after):
                part.unlink()
        self._num_lost = sum(part.stem.startswith("lost") for part in self._parts.iterdir())
        self._unsynced: list[Path] = []  # parts
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

    def write(self, record: StepRecord) -> None:
        """One step's row of metrics, its rollouts, and the posterior of every cell tried so far."""
        self._write_rollouts(record.groups, record.step, f"{record.step:06}")
        self.steps.append(record.metrics)
        with naming(self.context.work / STEPS):
            self._steps.write(json.dumps(record.metrics) + "\n")
            self._steps.flush()
        for cell, sampled in record.curriculum.sampled.items():
            posterior, (domain, level) = record.curriculum.posteriors[cell], self.pool.cells[cell]
            row = {"step": record.step, "cell": cell, "domain": domain, "level": level, "sampled": sampled,
                   "alpha": round(posterior.alpha, 3), "beta": round(posterior.beta, 3)}  # fmt: skip
            self._curriculum.write(json.dumps(row) + "\n")
        with naming(self.context.work / CURRICULUM):
            self._curriculum.flush()
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
        """A group that is not used, graded by nobody or too late: its rollouts stand under step 0, which trains on
        nothing."""
        self._num_lost += 1
        self._write_rollouts([group], 0, f"lost-{self._num_lost:06}")

    def _write_rollouts(self, groups: Sequence[RolloutGroup], step: int, name: str) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

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
        partial = self._parts / f"{name}.partial"
        with naming(partial), pa.output_stream(partial, buffer_size=PARQUET_BUFFER) as file:
            pq.write_table(pa.Table.from_pylist(rows, schema=self._schema), file)
        self._unsynced.append(partial.replace(partial.with_suffix(".parquet")))

    def sync(self) -> None:
        """Make durable what was written so far: before a state that says it was. From any thread."""
        written, self._unsynced = self._unsynced, []
        work = self.context.work
        for path in (*written, self._parts, self.context.scratch, work / STEPS, work / CURRICULUM, work):
            sync(path)

    def close(self) -> None:
        """What could not be written before is tried once more."""
        for path, file in ((STEPS, self._steps), (CURRICULUM, self._curriculum)):
            with naming(self.context.work / path):
                file.close()

    def finish(self) -> None:
        """All rollouts in one file, in the order of the steps. The parts stay: a kill may still undo the file."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        place = self.context.work / "rollouts.parquet"
        with (
            naming(place),
            pa.output_stream(place, buffer_size=PARQUET_BUFFER) as file,
            pq.ParquetWriter(file, self._schema) as writer,
        ):
            for part in sorted(self._parts.iterdir()):
                writer.write_table(pq.read_table(part, schema=self._schema))

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


def _rows_up_to(path: Path, step: int) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines up to a step; the rest is cut away, at once: a kill undoes no row that stays.
    A torn line is a later one."""
    kept, end = [], 0
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            break
        if row["step"] > step:
            break
        kept.append(row)
        end += len(line)
    with path.open("ab") as file:
        file.truncate(end)
    return kept


def _mean(rows: list[dict[str, Any]], key: str) -> float:
    values = [row[key] for row in rows if key in row]
    return sum(values) / len(values) if values else 0.0


def learner_settings(
    stage: OnlineRlStage, checkpoint: Path, seed: int, shared: Path, world_size: int, serve_at: str = ""
) -> list[LearnerSettings]:
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
        objective=stage.objective.switches(),
        longest_answer=stage.max_answer_tokens,
        seed=seed,
        fp8=fp8_settings(stage.fp8),
        world_size=world_size,
        rendezvous=str(shared / f"{stage.name}-learners"),
        serve_at=serve_at,
    )
    return [replace(first, rank=rank) for rank in range(first.world_size)]


def loop_settings(stage: OnlineRlStage, stop_token_ids: tuple[int, ...], shared: Path, seed: int) -> LoopSettings:
    return LoopSettings(
        groups_per_step=stage.groups_per_step,
        group_size=stage.group_size,
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
        seed=seed,
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
