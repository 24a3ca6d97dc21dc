"""Stage `online_rl`: brings engines and learner up, hands the loop what it needs, and writes down what happened.

Artifacts: `checkpoint/`, where asked for `checkpoints/step-…/` of steps on the way, `rollouts.parquet` (every answer),
`steps.jsonl` (a row of metrics a step), `curriculum.jsonl` (after every step the posterior of every domain and level,
and of the prompts it asked), `observations.jsonl` (of every group that began at its prompt what was expected, what
came, and of which version), `renewed.jsonl` (every prompt that was added to the pool: its source, its parents, the
task). A run that was killed goes on from the latter four and from what lies in the scratch folder, to the very end:
`state/` (the newest of `rl/run_state.py`) and `rollouts/` (a file a step).
"""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from model.disk import naming, remove, sync
from pipeline import own_class
from pipeline.calibrate_difficulty import calibrate
from pipeline.cluster import Actor, ActorFailed
from pipeline.config import DatasetTasks, EvaluateStage, GeneratedTasks, OnlineRlStage, TaskSource
from pipeline.data import load_tasks, task_to_json
from pipeline.engines import engine_settings
from pipeline.stage import SCRATCH, DataError, GateStopped, InfrastructureError, StageContext
from pipeline.trainer_actor import fp8_settings
from rewards.task import Task
from rl.band import reachable_band
from rl.controller import LeaseExhausted, NoGeneratorLeft
from rl.curriculum import GATES, SAMPLERS, Curriculum, CurriculumRules
from rl.difficulty import DifficultyRules, Entries
from rl.health import HealthMonitor
from rl.learner import LearnerSettings, PolicyLearner
from rl.loop import AsyncLoop, HealthStop, LoopSettings, StepRecord, TaskPool
from rl.renewal import Renewal, RenewalRules
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
STEPS, CURRICULUM, OBSERVATIONS, RENEWED = LOGS = (
    "steps.jsonl", "curriculum.jsonl", "observations.jsonl", "renewed.jsonl",
)  # fmt: skip
CHECKPOINTS = "checkpoints"
PARQUET_BUFFER = 1 << 20  # bytes; pyarrow itself writes every page and header apart
HARDEST, EASIEST = 5.0, 1.0  # a judge's scores: `judges/verdict.py`
TURN_SEEDS = 2**64  # generated tasks of a slot's turns are that far apart: further than slots of any run


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
            checkpoints = context.work / CHECKPOINTS
            states = RunStates(context.scratch / "state")
            newest = states.newest()
            log = StepLog(context, stage.steps, pool, after=newest[0].protocol.version if newest else 0)
            states.before_publish = log.sync
            curriculum = curriculum_of(stage, pool, context, fits)
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
                asyncio.run(_run(loop, newest, context))
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
    except (SandboxUnavailable, LeaseExhausted, NoGeneratorLeft) as error:
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


async def _run(loop: AsyncLoop, newest: tuple[RunState, Path] | None, context: StageContext) -> None:
    if newest is not None:
        state, folder = newest
        await loop.resume(state, str(folder / LEARNER))
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
        call = self.actor.call_async(
            "take_weights", location, version, expected, repair=repair, timeout_s=self.deadline_s
        )
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
        self.steps, *_ = (_rows_up_to(context.work / name, after) for name in LOGS)
        self._logs = {name: (context.work / name).open("a") for name in LOGS}
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
        """One step's row of metrics, its rollouts, what its groups said, and the posteriors after them. What was
        discarded stands under step 0, which trains on nothing, in the file of its step: undone with it by a kill."""
        rows = [*self._rollout_rows(record.groups, record.step), *self._rollout_rows(record.discarded, 0)]
        self._write_rollouts(rows, f"{record.step:06}")
        self.steps.append(record.metrics)
        self._append(STEPS, [record.metrics])
        asked = dict.fromkeys(outcome.choice.entry for outcome in record.outcomes)
        self._append(CURRICULUM, [{"step": record.step} | row for row in record.curriculum.rows(asked)])
        self._append(OBSERVATIONS, [
            {
                "step": record.step, "slot": one.slot, "turn": one.turn, "entry": one.choice.entry,
                "version": one.version, "expected": round(one.choice.expected, 4), "passes": one.passes,
                "total": one.total, "size": one.choice.size, "kept": one.kept,
            }
            for one in record.outcomes if not one.choice.prefix
        ])  # fmt: skip
        self._append(RENEWED, [
            {"step": record.step, "source": new.source, "parents": list(new.parents), "task": task_to_json(new.task)}
            for new in record.renewed
        ])  # fmt: skip
        metrics = record.metrics
        self.context.progress(
            record.step,
            self.num_steps,
            "steps",
            pass_rate=round(metrics["pass_rate"], 3),
            tokens_per_s=round(metrics["tokens_per_s"]),
            staleness=round(metrics.get("staleness_mean", 0.0), 2),
        )

    def _append(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        with naming(self.context.work / name):
            self._logs[name].write("".join(json.dumps(row) + "\n" for row in rows))
            self._logs[name].flush()

    def write_lost(self, group: RolloutGroup) -> None:
        """A group that is not used, graded by nobody or too late: its rollouts stand under step 0 too."""
        self._num_lost += 1
        self._write_rollouts(self._rollout_rows([group], 0), f"lost-{self._num_lost:06}")

    def _rollout_rows(self, groups: Sequence[RolloutGroup], step: int) -> list[dict[str, Any]]:
        return [
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

    def _write_rollouts(self, rows: list[dict[str, Any]], name: str) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        partial = self._parts / f"{name}.partial"
        with naming(partial), pa.output_stream(partial, buffer_size=PARQUET_BUFFER) as file:
            pq.write_table(pa.Table.from_pylist(rows, schema=self._schema), file)
        self._unsynced.append(partial.replace(partial.with_suffix(".parquet")))

    def sync(self) -> None:
        """Make durable what was written so far: before a state that says it was. From any thread."""
        written, self._unsynced = self._unsynced, []
        work = self.context.work
        for path in (*written, self._parts, self.context.scratch, *(work / name for name in LOGS), work):
            sync(path)

    def close(self) -> None:
        """What could not be written before is tried once more."""
        for name, log in self._logs.items():
            with naming(self.context.work / name):
                log.close()

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
            "tokens_discarded": sum(step["discarded_tokens"] for step in self.steps),
            "empty_slots": sum(step["empty_slots"] for step in self.steps),
            "states": self.steps[-1]["states"],
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
        num_steps=stage.steps,
        last_rate=stage.last_rate_share,
        weight_decay=stage.weight_decay,
        max_grad_norm=stage.max_grad_norm,
        micro_batch_tokens=stage.micro_batch_tokens,
        temperature=stage.temperature,
        router_policy=stage.router.policy,
        router_learning_rate_scale=stage.router.learning_rate_scale,
        balance_coef=stage.router.balance_coef,
        z_coef=stage.router.z_coef,
        objective=stage.objective.switches(),
        updates=stage.updates_per_step,
        longest_answer=stage.max_answer_tokens,
        seed=seed,
        fp8=fp8_settings(stage.fp8),
        world_size=world_size,
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


# --- what tasks are drawn from, and how -----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Pool:
    """What tasks are drawn from."""

    cells: dict[str, tuple[str, int]]  # the curriculum's entry → (domain, level)
    task_of: Callable[[str, int, int], Task]  # (entry, slot, turn) → task
    tasks: dict[str, Task] = field(default_factory=dict)  # entry → its task, where it has but one
    num_too_long: int = 0  # tasks left out

    @property
    def endless(self) -> bool:
        return not self.tasks


def task_pool(source: TaskSource, seed: int, fits: Callable[[Task], bool]) -> Pool:
    """Generated tasks: an entry is a (domain, level) and never runs dry. A data set: an entry is one prompt that
    fits."""
    if isinstance(source, DatasetTasks):
        tasks = load_tasks(source, seed)
        kept = {task.task_id: task for task in tasks if fits(task)}
        return Pool(
            cells={name: (task.domain, task.level) for name, task in kept.items()},
            task_of=lambda entry, slot, turn: kept[entry],
            tasks=kept,
            num_too_long=len(tasks) - len(kept),
        )
    assert isinstance(source, GeneratedTasks)
    from rewards.domains import generate

    levels = range(source.levels[0], source.levels[1] + 1)
    cells = {f"{domain}/{level}": (str(domain), level) for domain in source.domains for level in levels}

    def task_of(entry: str, slot: int, turn: int) -> Task:
        domain, level = cells[entry]
        return generate(domain, level, seed * 1_000_003 + slot + turn * TURN_SEEDS, "train")

    return Pool(cells=cells, task_of=task_of)


def curriculum_of(
    stage: OnlineRlStage, pool: Pool, context: StageContext, fits: Callable[[Task], bool]
) -> Curriculum:  # fmt: skip
    rules, settings = curriculum_rules(stage), stage.curriculum
    judged = judged_rates(pool, context.inputs[settings.judge] / "verdicts.parquet") if settings.judge else None
    entries = Entries(pool.cells, endless=pool.endless, judged=judged)
    sampler = SAMPLERS.get(settings.sampler) or own_class.load(settings.sampler)
    gate = GATES.get(settings.gate) or own_class.load(settings.gate)
    renewal = None
    if settings.renew is not None:
        how = settings.renew
        renewal_rules = RenewalRules(
            every=how.every_steps, prompts=how.prompts, share=how.synthetic_share, sources=tuple(how.sources),
            band=rules.band,
        )  # fmt: skip
        renewal = Renewal(renewal_rules, pool.tasks, held_out_prompts(context), fits, context.seed)
    return Curriculum(entries, rules, sampler(rules), gate(rules), context.seed, renewal)


def held_out_prompts(context: StageContext) -> Iterator[str]:
    """Of every set that this recipe evaluates on."""
    for stage in context.recipe.stages:
        if isinstance(stage, EvaluateStage):
            yield from (task.prompt for task in load_tasks(stage.tasks, context.seed))


def curriculum_rules(stage: OnlineRlStage) -> CurriculumRules:
    settings = stage.curriculum
    sets_aside = settings.sampler != "uniform"  # the control arm knows no difficulty
    difficulty = DifficultyRules(
        decay=settings.decay,
        judge_strength=settings.judge_strength,
        neighbour_strength=settings.neighbour_strength,
        retire_above=settings.retire_above if sets_aside else None,
        park_below=settings.park_below if sets_aside else None,
        retest_every=settings.retest_every_steps,
        retest_rise=settings.retest_rise,
        ordered_levels=settings.ordered_levels,
    )
    return CurriculumRules(
        band=reachable_band(stage.group_size, settings.band),
        group_size=stage.group_size,
        explore_share=settings.explore_share,
        prefix_share=settings.prefix_share,
        max_resamples=settings.max_resamples,
        allocator=settings.allocator,
        largest_group=settings.largest_group,
        screen=settings.screen,
        rare_answers=settings.rare_answers,
        domain_floor=settings.domain_floor,
        difficulty=difficulty,
    )


def judged_rates(pool: Pool, verdicts: Path) -> dict[str, float]:
    """Entry → pass rate that its judged difficulty stands for: 1 at the easiest score, 0 at the hardest. A prompt has
    its own score, else, like a level of generated tasks, the mean of what was judged of its domain and level. Only the
    order is to be trusted; what is measured corrects the rest."""
    import pyarrow.parquet as pq

    rows = pq.read_table(verdicts, columns=["domain", "level", "prompt", "score"]).to_pylist()
    rates = {row["prompt"]: (HARDEST - row["score"]) / (HARDEST - EASIEST) for row in rows if row["score"] is not None}
    by_cell: dict[tuple[str, int], list[float]] = defaultdict(list)
    for row in rows:
        if row["prompt"] in rates:
            by_cell[row["domain"], row["level"]].append(rates[row["prompt"]])
    means = {cell: sum(some) / len(some) for cell, some in by_cell.items()}
    own = {name: rates[task.prompt] for name, task in pool.tasks.items() if task.prompt in rates}
    found = {name: own.get(name, means.get(cell)) for name, cell in pool.cells.items()}
    return {name: rate for name, rate in found.items() if rate is not None}
